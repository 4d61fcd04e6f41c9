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
from typing import Any, TypeVar

import numpy as np
from fsspec import AbstractFileSystem

from rslp.data.cache import window_state
from rslp.data.cache.columns import Array
from rslp.data.cache.index import WindowIndex, open_index, write_index
from rslp.data.cache.window_state import (
    COARSE_TICK_NS,
    DIGEST,
    MARKER,
    NEVER,
    WindowState,
    digest,
    location_text,
    metadata_fields,
    parsed_metadata,
    salted_digest,
)
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


def refresh_local_index(
    store: Path, key: str, windows: Path, *, layers: Sequence[str], workers: int, old: WindowIndex | None
) -> WindowIndex:
    """Check every window against the old index, scan those that changed, and write a new index if any did.

    Args:
        store: the folder of the sample cache.
        key: fingerprint of the set of layers; part of the index's name.
        windows: the folder ``windows`` of the dataset.
        layers: the layers whose files count.
        workers: number of processes.
        old: the newest index, if there is one.

    Raises:
        OSError: a folder can't be read.
        ValueError: a window's bounds are not whole pixels.
        DataError: a window's metadata is broken.
    """
    groups = list_groups(windows)
    names = {g: sorted(e.name for e in os.scandir(windows / g) if not e.name.startswith(".")) for g in groups}
    identities = [(group, name) for group, group_names in names.items() for name in group_names]
    unchanged, to_scan = _unchanged_rows(old, windows, identities, workers)
    states: list[WindowState] = []
    if to_scan:
        scan = partial(_scan_windows, str(windows), tuple(layers))
        states = [state for part in _map_in_processes(scan, to_scan, workers) for state in part]
    # Files and folders that are no windows are scanned each time, since they may have become windows.
    if old is not None and not states and len(unchanged) == len(old) and old.groups == groups:
        return old
    states = _rescan_fresh(states, windows, layers)
    path = store / f"windows-{key}-{time.time_ns():020d}.idx"
    index = write_index(path, states, layers=layers, groups=groups, old=old, unchanged=unchanged)
    remove_old_indices(store, key, path)
    return index


def _unchanged_rows(
    old: WindowIndex | None, windows: Path, identities: list[Identity], workers: int
) -> tuple[Array, list[Identity]]:
    """The rows of the old index whose windows have not changed, and the windows that have to be scanned."""
    if old is None:
        return np.empty(0, np.int64), identities
    row_of = {identity: row for row, identity in enumerate(old.identities())}
    indexed = [identity for identity in identities if identity in row_of]
    layouts = old.texts["layout"].by_row()
    tasks = [(f"{group}/{name}", layouts[row_of[group, name]]) for group, name in indexed]
    stamps = sum(layout.count("\n") + 1 for _, layout in tasks)
    processes = workers if stamps >= _STAMPS_WORTH_A_PROCESS else 1
    rows = np.array([row_of[identity] for identity in indexed], np.int64)
    digests = b"".join(_map_in_processes(partial(_stamp_digests, str(windows)), tasks, processes))
    same = _equal_digests(digests, old.digests["shortcut"][rows])
    changed = {identity for identity, is_same in zip(indexed, same.tolist(), strict=True) if not is_same}
    return rows[same], [identity for identity in identities if identity not in row_of or identity in changed]


def _equal_digests(digests: bytes, old: Array) -> Array:
    """Which digests, end to end, equal the old ones (uint64 ``N 2``); ``NEVER`` equals none."""
    words = np.frombuffer(digests, "<u8").reshape(-1, DIGEST // 8)
    equal: Array = (words == old).all(axis=1) & (words != 0).any(axis=1)
    return equal


def _stamp_digests(windows: str, tasks: Sequence[tuple[str, str]]) -> bytes:
    with window_state.open_folder(windows) as folder:
        return b"".join(window_state.stamp_digest(root, layout, dir_fd=folder) or NEVER for root, layout in tasks)


def _scan_windows(windows: str, layers: Sequence[str], identities: Sequence[Identity]) -> list[WindowState]:
    states = [window_state.scan_window(f"{windows}/{group}/{name}", group, name, layers) for group, name in identities]
    return [state for state in states if state is not None]


def _rescan_fresh(states: list[WindowState], windows: Path, layers: Sequence[str]) -> list[WindowState]:
    """Scan windows that were written a moment ago again, after a pause in which their clocks tick."""
    if not any(state.fresh for state in states):
        return states
    time.sleep(window_state.TICK_NS / 1e9)
    scanned = [_scan_windows(str(windows), layers, [(s.group, s.name)]) if s.fresh else [s] for s in states]
    return [state for part in scanned for state in part]


def _map_in_processes(work: Callable[[Sequence[T]], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """The results of ``work`` for parts of the tasks, in order; in several processes if there are enough tasks."""
    if workers < 2 or len(tasks) < _WORTH_A_PROCESS:
        yield work(tasks)
        return
    size = -(-len(tasks) // (4 * workers))
    with pool_of(workers, "fork", what="lists windows") as pool:
        yield from pool.map(work, [tasks[start : start + size] for start in range(0, len(tasks), size)])


def remove_old_indices(store: Path, key: str, current: Path) -> None:
    """Remove indices so old that no run should use them any more."""
    for path in sorted(store.glob(f"windows-{key}-*.idx")):
        # Another process may remove it at the same time.
        with suppress(OSError):
            if path != current and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()


def refresh_remote_index(
    store: Path, key: str, windows: str, *, layers: Sequence[str], fs: AbstractFileSystem, old: WindowIndex | None
) -> WindowIndex:
    """List all objects, fetch the metadata of windows that changed, and write a new index if any did.

    The arguments are those of ``refresh_local_index``; ``windows`` is a path of the file system ``fs``.

    Raises:
        OSError: the object store can't be reached.
        ValueError: the file system does not show when objects change, or a window's bounds are not whole pixels.
        DataError: a window's metadata is broken.
    """
    windows_objects = list_windows(fs, windows)
    unchanged: dict[Identity, int] = {}
    if old is not None:
        identities = old.identities()
        digests = b"".join(_objects_digest(windows_objects.get(identity, {}), layers) for identity in identities)
        same = _equal_digests(digests, old.digests["shortcut"]).tolist()
        unchanged = {identity: row for row, identity in enumerate(identities) if same[row]}
    to_fetch = {identity: objects for identity, objects in windows_objects.items() if identity not in unchanged}
    if old is not None and not to_fetch and len(unchanged) == len(old):
        return old
    states = list(_fetch_states(fs, windows, to_fetch, layers))
    rows = np.array(list(unchanged.values()), np.int64)
    path = store / f"windows-{key}-{time.time_ns():020d}.idx"
    index = write_index(path, states, layers=layers, groups={}, old=old, unchanged=rows)
    remove_old_indices(store, key, path)
    return index


def window_is_unchanged(index: WindowIndex, row: int, root: str, fs: AbstractFileSystem) -> bool:
    """Whether the objects of a window still have the digest of the index."""
    digest_now = _objects_digest(dict(_list_objects(fs, root)), index.layers)
    return digest_now != NEVER and digest_now == bytes(index.digests["shortcut"][row].tobytes())


def list_windows(fs: AbstractFileSystem, windows: str) -> dict[Identity, Objects]:
    """The objects of each window, by group and name, sorted; objects that belong to no window are left out."""
    by_window: dict[Identity, Objects] = {}
    for path, state in _list_objects(fs, windows):
        parts = path.split("/", 2)
        if len(parts) == 3 and not parts[0].startswith(".") and not parts[1].startswith("."):
            by_window.setdefault((parts[0], parts[1]), {})[parts[2]] = state
    return {identity: objects for identity, objects in by_window.items() if "metadata.json" in objects}


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


def _relevant(objects: Objects, layers: Sequence[str]) -> Objects:
    """The objects on which samples of these layers depend."""
    wanted = set(layers)
    relevant: Objects = {}
    for path, state in objects.items():
        top, _, below = path.partition("/")
        if top in ("metadata.json", "items.json") or (top == "layers" and _layer(below) in wanted):
            relevant[path] = state
    return relevant


def _layer(path: str) -> str:
    return path.partition("/")[0].partition(".")[0]


def _objects_digest(objects: Objects, layers: Sequence[str]) -> bytes:
    """The digest ``shortcut`` of a window; ``NEVER`` for no objects, or if one may change without a new digest."""
    relevant = _relevant(objects, layers)
    now = time.time_ns()
    if not objects or any(_is_fresh(state, now) for state in relevant.values()):
        return NEVER
    return digest(repr([(path, text) for path, (text, _) in relevant.items()]).encode())


def _is_fresh(state: ObjectState, now: int) -> bool:
    """Whether only a time shows changes of an object, and it may change again within the same tick of the clock."""
    return state[1] is not None and abs(now - state[1]) < COARSE_TICK_NS


def _fetch_states(
    fs: AbstractFileSystem, windows: str, windows_objects: Mapping[Identity, Objects], layers: Sequence[str]
) -> Iterator[WindowState]:
    identities = list(windows_objects)
    for start in range(0, len(identities), _AT_ONCE):
        portion = identities[start : start + _AT_ONCE]
        paths = [f"{windows}/{group}/{name}/metadata.json" for group, name in portion]
        raw = fs.cat(paths)
        for identity, path in zip(portion, paths, strict=True):
            # For a single path, cat may return the bytes alone.
            document = raw if isinstance(raw, bytes) else raw.get(path, raw.get(path.lstrip("/")))
            root = path.removesuffix("/metadata.json")
            yield _remote_state(*identity, windows_objects[identity], document, layers, root)


def _remote_state(group: str, name: str, objects: Objects, raw: bytes, layers: Sequence[str], root: str) -> WindowState:
    metadata = parsed_metadata(raw, root)
    relevant, now = _relevant(objects, layers), time.time_ns()
    folders = sorted({path.split("/")[1] for path in relevant if path.startswith("layers/")})
    location = location_text(group, name, metadata)
    files = {
        layer: [path for path in relevant if path.startswith("layers/") and _layer(path[7:]) == layer]
        for layer in layers
    }
    return WindowState(
        group=group,
        name=name,
        **metadata_fields(metadata, root),
        completed="|".join(folder for folder in folders if f"layers/{folder}/{MARKER}" in relevant),
        layout="",
        shortcut=_objects_digest(objects, layers),
        base=_files_digest(location, ["items.json"] if "items.json" in relevant else [], relevant, now),
        layers={layer: _files_digest(layer + location, paths, relevant, now) for layer, paths in files.items()},
        fresh=any(_is_fresh(state, now) for state in relevant.values()),
    )


def _files_digest(salt: str, paths: Sequence[str], objects: Objects, now: int) -> bytes:
    # Of marker files only their existence counts.
    texts = (path if path.endswith(f"/{MARKER}") else f"{path} {objects[path][0]}" for path in paths)
    return salted_digest(salt, zip(texts, (_is_fresh(objects[path], now) for path in paths), strict=True))
