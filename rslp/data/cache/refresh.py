"""Refresh the window index: find windows that were added, removed or changed, in a folder or on an object store."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from fsspec import AbstractFileSystem

from rslp.data.cache import window_state
from rslp.data.cache.columns import Array
from rslp.data.cache.index import WindowIndex, open_index, write_index
from rslp.data.cache.window_state import COARSE_TICK_NS, DIGEST, NEVER, WindowState, digest, layer_of
from rslp.runtime.children import pool as pool_of

# Up to this many windows are checked at the start, in about a second; in larger datasets each when it is first read.
CHECKED_AT_START = 50_000
# With fewer windows to scan, or stamps to compare, a second process costs more than it saves.
_WORTH_A_PROCESS = 2_000
_STAMPS_WORTH_A_PROCESS = 200_000
# Age at which an old index is deleted (s): until then other runs may use it, and their workers open it by name.
_KEPT_SECONDS = 86_400

# Keys with which file systems identify the content of an object, and keys of times, which are used if none is there.
_CONTENT = ("ETag", "etag", "md5Hash", "content_md5", "generation", "VersionId", "version_id", "crc32c", "checksum")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
# Number of objects that are fetched at a time.
_AT_ONCE = 1000

# Group and name.
Identity = tuple[str, str]
# For an object a text that changes with it, and its time (ns) if only that shows changes.
ObjectState = tuple[str, int | None]
# The objects of a window by their path below it.
Objects = dict[str, ObjectState]

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


def list_groups(windows: Path) -> dict[str, int]:
    """The time of change (ns) of each group's folder."""
    if not windows.is_dir():
        return {}
    entries = sorted(os.scandir(windows), key=lambda entry: entry.name)
    return {entry.name: entry.stat().st_ctime_ns for entry in entries if _is_visible_folder(entry)}


def _is_visible_folder(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def latest_index(store: Path, key: str, *, dataset: str) -> WindowIndex | None:
    """The newest index of a set of layers; None, after a warning, if it can't be read."""
    path = max(store.glob(f"windows-{key}-*.idx"), default=None)
    try:
        return None if path is None else open_index(path)
    except (OSError, ValueError) as error:
        log.warning("dataset %r: %s can't be read, so the windows are listed again: %s", dataset, path, error)
        return None


def may_trust_index(index: WindowIndex, windows: Path) -> bool:
    """Whether to use an index without a check of each window: it is large, and no window was added or removed."""
    return len(index) > CHECKED_AT_START and index.groups == list_groups(windows)


class Scanner(Protocol):
    """Finds the windows of a dataset and the state of their files: ``LocalScanner`` or ``RemoteScanner``.

    Attributes:
        layers: the layers whose files count.
        groups: the time of change (ns) of each group's folder, if folders have one.
        identities: group and name of all windows, and of files and folders that may be windows.
    """

    layers: Sequence[str]
    groups: dict[str, int]
    identities: list[Identity]

    def digests(self, identities: Sequence[Identity], layouts: Sequence[str]) -> bytes:
        """The present digests ``shortcut`` of windows, end to end; ``layouts`` are those of their ``WindowState``."""

    def states(self, identities: Sequence[Identity]) -> list[WindowState]:
        """The states of windows, without files and folders that are none."""


def refresh_index(store: Path, key: str, scanner: Scanner, old: WindowIndex | None) -> WindowIndex:
    """Check every window against the old index, scan those that changed, and write a new index if any did.

    Args:
        store: the folder of the sample cache.
        key: fingerprint of the set of layers; part of the index's name.
        scanner: finds the windows.
        old: the newest index, if there is one.

    Raises:
        OSError: a folder can't be read, or the object store can't be reached.
        ValueError: a window's bounds are not whole pixels, or the file system does not show when objects change.
        DataError: a window's metadata is broken.
    """
    unchanged, to_scan = _unchanged_rows(old, scanner)
    states = scanner.states(to_scan) if to_scan else []
    # Files and folders that are no windows are scanned each time, since they may have become windows.
    if old is not None and not states and len(unchanged) == len(old) and old.groups == scanner.groups:
        return old
    path = store / f"windows-{key}-{time.time_ns():020d}.idx"
    index = write_index(path, states, layers=scanner.layers, groups=scanner.groups, old=old, unchanged=unchanged)
    _remove_old_indices(store, key, path)
    return index


def _unchanged_rows(old: WindowIndex | None, scanner: Scanner) -> tuple[Array, list[Identity]]:
    """The rows of the old index whose windows have not changed, and the windows that have to be scanned."""
    if old is None:
        return np.empty(0, np.int64), scanner.identities
    row_of = {identity: row for row, identity in enumerate(old.identities())}
    indexed = [identity for identity in scanner.identities if identity in row_of]
    rows = np.array([row_of[identity] for identity in indexed], np.int64)
    layouts = old.texts["layout"].by_row()
    digests = scanner.digests(indexed, [layouts[row] for row in rows.tolist()])
    words = np.frombuffer(digests, "<u8").reshape(-1, DIGEST // 8)
    # ``NEVER``, which is zero, equals no digest.
    same = (words == old.digests["shortcut"][rows]).all(axis=1) & (words != 0).any(axis=1)
    unchanged = {identity for identity, is_same in zip(indexed, same.tolist(), strict=True) if is_same}
    return rows[same], [identity for identity in scanner.identities if identity not in unchanged]


def _remove_old_indices(store: Path, key: str, current: Path) -> None:
    """Remove indices so old that no run should use them any more."""
    for path in sorted(store.glob(f"windows-{key}-*.idx")):
        # Another process may remove it at the same time.
        with suppress(OSError):
            if path != current and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()


class LocalScanner:
    """Scans the folder ``windows`` of a dataset, in several processes where that pays; see ``Scanner``."""

    def __init__(self, windows: Path, layers: Sequence[str], *, workers: int) -> None:
        self.layers = layers
        self.groups = list_groups(windows)
        self._windows = windows
        self._workers = workers
        names = {g: sorted(e.name for e in os.scandir(windows / g) if not e.name.startswith(".")) for g in self.groups}
        self.identities = [(group, name) for group, group_names in names.items() for name in group_names]

    def digests(self, identities: Sequence[Identity], layouts: Sequence[str]) -> bytes:
        """The present digests of windows, see ``Scanner``."""
        tasks = [(f"{group}/{name}", layout) for (group, name), layout in zip(identities, layouts, strict=True)]
        stamps = sum(layout.count("\n") + 1 for layout in layouts)
        workers = self._workers if stamps >= _STAMPS_WORTH_A_PROCESS else 1
        return b"".join(_map_in_processes(partial(_stamp_digests, str(self._windows)), tasks, workers))

    def states(self, identities: Sequence[Identity]) -> list[WindowState]:
        """The states of windows, see ``Scanner``."""
        scan = partial(_scan_windows, str(self._windows), tuple(self.layers))
        states = [state for part in _map_in_processes(scan, identities, self._workers) for state in part]
        if not any(state.fresh for state in states):
            return states
        # Windows that were written a moment ago are scanned again, after a pause in which their clocks tick.
        time.sleep(window_state.TICK_NS / 1e9)
        scanned = [scan([(state.group, state.name)]) if state.fresh else [state] for state in states]
        return [state for part in scanned for state in part]


def _stamp_digests(windows: str, tasks: Sequence[tuple[str, str]]) -> bytes:
    with window_state.open_folder(windows) as folder:
        return b"".join(window_state.stamp_digest(root, layout, dir_fd=folder) or NEVER for root, layout in tasks)


def _scan_windows(windows: str, layers: Sequence[str], identities: Sequence[Identity]) -> list[WindowState]:
    states = [window_state.scan_window(f"{windows}/{group}/{name}", group, name, layers) for group, name in identities]
    return [state for state in states if state is not None]


def _map_in_processes(work: Callable[[Sequence[T]], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """The results of ``work`` for parts of the tasks, in order; in several processes if there are enough tasks."""
    if workers < 2 or len(tasks) < _WORTH_A_PROCESS:
        yield work(tasks)
        return
    size = -(-len(tasks) // (4 * workers))
    with pool_of(workers, "fork", what="lists windows") as pool:
        yield from pool.map(work, [tasks[start : start + size] for start in range(0, len(tasks), size)])


class RemoteScanner:
    """Lists all objects of a dataset on an object store, and fetches the metadata of windows; see ``Scanner``.

    Args:
        fs: the file system.
        windows: the path of the folder ``windows`` there.
        layers: the layers whose files count.

    Raises:
        OSError: the object store can't be reached.
        ValueError: the file system does not show when objects change.
    """

    def __init__(self, fs: AbstractFileSystem, windows: str, layers: Sequence[str]) -> None:
        self.layers = layers
        self.groups: dict[str, int] = {}
        self._fs = fs
        self._windows = windows
        self._objects: dict[Identity, Objects] = {}
        for path, state in _list_objects(fs, windows):
            parts = path.split("/", 2)
            if len(parts) == 3 and not parts[0].startswith(".") and not parts[1].startswith("."):
                self._objects.setdefault((parts[0], parts[1]), {})[parts[2]] = state
        self.identities = [identity for identity, objects in self._objects.items() if "metadata.json" in objects]

    def digests(self, identities: Sequence[Identity], layouts: Sequence[str]) -> bytes:  # noqa: ARG002
        """The present digests of windows, see ``Scanner``."""
        return b"".join(_objects_digest(_files(self._objects[identity], self.layers)) for identity in identities)

    def states(self, identities: Sequence[Identity]) -> list[WindowState]:
        """The states of windows, see ``Scanner``."""
        states = []
        for start in range(0, len(identities), _AT_ONCE):
            portion = identities[start : start + _AT_ONCE]
            roots = [f"{self._windows}/{group}/{name}" for group, name in portion]
            fetched = self._fs.cat([f"{root}/metadata.json" for root in roots])
            for (group, name), root in zip(portion, roots, strict=True):
                path = f"{root}/metadata.json"
                # For a single path, cat may return the bytes alone.
                raw = fetched if isinstance(fetched, bytes) else fetched.get(path, fetched.get(path.lstrip("/")))
                files = _files(self._objects[group, name], self.layers)
                states.append(
                    window_state.window_state(
                        root, group, name, raw=raw, layers=self.layers, files=files, shortcut=_objects_digest(files)
                    )
                )
        return states


def window_is_unchanged(index: WindowIndex, row: int, root: str, fs: AbstractFileSystem) -> bool:
    """Whether the objects of a window still have the digest of the index; ``root`` is the window's folder."""
    present = _objects_digest(_files(dict(_list_objects(fs, root)), index.layers))
    return present != NEVER and present == bytes(index.digests["shortcut"][row].tobytes())


def _list_objects(fs: AbstractFileSystem, root: str) -> Iterator[tuple[str, ObjectState]]:
    # The cached listing may be old; and s3fs would cache this one with folders named twice, for rslearn to read.
    fs.invalidate_cache()
    listing = sorted(fs.find(root, detail=True).items())
    fs.invalidate_cache()
    for path, info in listing:
        # Some object stores have an empty object for each folder.
        if below := path.removeprefix(root).strip("/"):
            yield below, _object_state(path, info)


def _object_state(path: str, info: Mapping[str, Any]) -> ObjectState:
    content = [f"{name}={info[name]}" for name in _CONTENT if info.get(name)]
    times = [info[name] for name in _TIMES if info.get(name)]
    if not content and not times:
        raise ValueError(f"the file system gives neither a hash nor a time of {path}")
    text = " ".join([str(info.get("size")), *content, *map(str, times)])
    return text, None if content else max(map(_nanoseconds, times))


def _nanoseconds(moment: Any) -> int:
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if isinstance(moment, datetime):
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e9)
    return int(float(moment) * 1e9)


def _files(objects: Objects, layers: Sequence[str]) -> window_state.Files:
    """The objects on which samples of these layers depend."""
    now = time.time_ns()
    files: dict[str, tuple[str, bool]] = {}
    for path, (text, moment) in objects.items():
        top, _, below = path.partition("/")
        layer = layer_of(below)
        if top in ("metadata.json", "items.json") or (top == "layers" and layer in layers):
            # Where only a time shows changes, the object may change again within the same tick of the clock.
            is_fresh = moment is not None and abs(now - moment) < COARSE_TICK_NS
            files[path] = text, is_fresh
    return files


def _objects_digest(files: window_state.Files) -> bytes:
    """The digest ``shortcut`` of a window; ``NEVER`` for no objects, or if one may change without a new digest."""
    if not files or any(is_fresh for _, is_fresh in files.values()):
        return NEVER
    return digest(repr([(path, text) for path, (text, _) in files.items()]).encode())
