"""Bring the window index up to date: find windows that were added, removed or changed, in a folder or object store."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
    parsed_metadata,
    pixel_bounds,
)
from rslp.runtime.children import pool as pool_of

# So many windows are looked at in a second or so; beyond, each is looked at when it is first read.
CHECKED_AT_START = 50_000
# Below so many windows to read, or time stamps to look at, a second process costs more than it saves.
_WORTH_A_PROCESS = 2_000
_STAMPS_WORTH_A_PROCESS = 200_000
# Other runs may have an older index open, and their workers open it by name.
_KEPT_SECONDS = 86_400

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class GroupListing:
    """The windows' folder: names by group, and the time stamp of each group's folder."""

    names: dict[str, list[str]]
    stamps: dict[str, int]


def list_groups(windows: Path) -> dict[str, int]:
    """Time stamps of the groups' folders."""
    if not windows.is_dir():
        return {}
    return {e.name: e.stat().st_ctime_ns for e in sorted(os.scandir(windows), key=lambda e: e.name) if _shown(e)}


def _shown(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def latest_index(store: Path, key: str, *, dataset: str) -> WindowIndex | None:
    """The newest index of a set of layers, if it can be read."""
    path = max(store.glob(f"windows-{key}-*.idx"), default=None)
    try:
        return None if path is None else open_index(path)
    except (OSError, ValueError) as error:
        log.warning("dataset %r: %s can't be read, so the windows are listed anew: %s", dataset, path, error)
        return None


def may_trust_index(index: WindowIndex, windows: Path) -> bool:
    """Whether an index is to be used without a look at each window: it is large, and no window came or went."""
    return len(index) > CHECKED_AT_START and index.groups == list_groups(windows)


def refresh_local_index(
    store: Path, key: str, windows: Path, *, layers: Sequence[str], workers: int, old: WindowIndex | None
) -> WindowIndex:
    """Check every window against the index, look at what changed, and write a new index if anything did.

    Args:
        store: the store's folder.
        key: names the set of layers.
        windows: the folder ``windows`` of the dataset.
        layers: the layers whose files matter.
        workers: processes to look with.
        old: the index so far.

    Raises:
        OSError: a folder can't be read.
        ValueError: a window's bounds are no whole pixels.
        DataError: a window's metadata is broken.
    """
    groups = list_groups(windows)
    names = {g: sorted(e.name for e in os.scandir(windows / g) if not e.name.startswith(".")) for g in groups}
    places = [(group, name) for group, found in names.items() for name in found]
    kept, unknown = _unchanged(old, windows, places, workers)
    seen: list[WindowState] = []
    for part in (
        _map_in_processes(partial(_scan_windows, str(windows), tuple(layers)), unknown, workers) if unknown else ()
    ):
        seen += part
    # What is no window is looked at each time: it may be one by now.
    if old is not None and not seen and len(kept) == len(old) and old.groups == groups:
        return old
    seen = _recheck_recent(seen, windows, layers)
    path = store / f"windows-{key}-{time.time_ns():020d}.idx"
    index = write_index(path, seen, layers=layers, groups=groups, old=old, kept=kept)
    remove_old_indices(store, key, path)
    return index


def _unchanged(
    old: WindowIndex | None, windows: Path, places: list[tuple[str, str]], workers: int
) -> tuple[Array, list[tuple[str, str]]]:
    """Rows of the old index that still hold, and the windows that have to be looked at."""
    if old is None:
        return np.empty(0, np.int64), places
    rows = {place: row for row, place in enumerate(old.identities())}
    known = [place for place in places if place in rows]
    layouts = old.texts["layout"].by_row()
    tasks = [(f"{group}/{name}", layouts[rows[group, name]]) for group, name in known]
    stamps = sum(layout.count("\n") + 1 for _, layout in tasks)
    spread = workers if stamps >= _STAMPS_WORTH_A_PROCESS else 1
    now = b"".join(part for part in _map_in_processes(partial(_shortcuts, str(windows)), tasks, spread))
    words = np.frombuffer(now, "<u8").reshape(-1, window_state.DIGEST // 8)
    at = np.array([rows[place] for place in known], np.int64)
    same = (words == old.digests["shortcut"][at]).all(axis=1) & (words != 0).any(axis=1)
    changed = {place for place, good in zip(known, same.tolist(), strict=True) if not good}
    return at[same], [place for place in places if place not in rows or place in changed]


def _shortcuts(windows: str, tasks: Sequence[tuple[str, str]]) -> bytes:
    gone = bytes(window_state.DIGEST)
    with window_state.open_folder(windows) as at:
        return b"".join(window_state.stamp_digest(place, layout, at=at) or gone for place, layout in tasks)


def _scan_windows(windows: str, layers: Sequence[str], places: Sequence[tuple[str, str]]) -> list[WindowState]:
    seen = [window_state.scan_window(f"{windows}/{group}/{name}", group, name, layers) for group, name in places]
    return [one for one in seen if one is not None]


def _recheck_recent(seen: list[WindowState], windows: Path, layers: Sequence[str]) -> list[WindowState]:
    """Look again, after a moment, at windows that were written just now."""
    if not any(one.fresh for one in seen):
        return seen
    time.sleep(window_state.TICK_NS / 1e9)
    again = [_scan_windows(str(windows), layers, [(one.group, one.name)]) if one.fresh else [one] for one in seen]
    return [one for found in again for one in found]


def _map_in_processes(work: Callable[[Sequence[T]], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Results in order, over several processes if it is worth it."""
    if workers < 2 or len(tasks) < _WORTH_A_PROCESS:
        yield work(tasks)
        return
    size = -(-len(tasks) // (4 * workers))
    with pool_of(workers, "fork", what="lists windows") as pool:
        yield from pool.map(work, [tasks[at : at + size] for at in range(0, len(tasks), size)])


def remove_old_indices(store: Path, key: str, current: Path) -> None:
    """Remove indices that no running process can have opened any more."""
    for path in sorted(store.glob(f"windows-{key}-*.idx")):
        # Another process may be at it, too.
        with suppress(OSError):
            if path != current and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()


# Where file systems say of which state an object is: a hash or number of its content, or else a time.
_CONTENT = ("ETag", "etag", "md5Hash", "content_md5", "generation", "VersionId", "version_id", "crc32c", "checksum")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
_AT_ONCE = 1000

# Objects of a window by their path below it: text that changes with the object, and its time in ns if only that tells.
Objects = dict[str, tuple[str, int | None]]


def refresh_remote_index(
    store: Path, key: str, windows: str, *, layers: Sequence[str], fs: AbstractFileSystem, old: WindowIndex | None
) -> WindowIndex:
    """List all objects, look at the windows where something changed, and write a new index if anything did.

    Args:
        store: the store's folder.
        key: names the set of layers.
        windows: the folder ``windows`` of the dataset, a path of the file system.
        layers: the layers whose objects matter.
        fs: the file system.
        old: the index so far.

    Raises:
        OSError: the store can't be reached.
        ValueError: it does not say when objects change, or a window's bounds are no whole pixels.
        DataError: a window's metadata is broken.
    """
    found = list_windows(fs, windows)
    shortcuts = {place: _shortcut(objects, layers) for place, objects in found.items()}
    kept = _unchanged_objects(old, shortcuts)
    same = {} if old is None else {place: row for row, place in enumerate(old.identities()) if kept[row]}
    unknown = [place for place in found if place not in same]
    if old is not None and not unknown and len(same) == len(old):
        return old
    seen = list(_look(fs, windows, {place: found[place] for place in unknown}, layers))
    rows = np.array(list(same.values()), np.int64)
    path = store / f"windows-{key}-{time.time_ns():020d}.idx"
    index = write_index(path, seen, layers=layers, groups={}, old=old, kept=rows)
    remove_old_indices(store, key, path)
    return index


def window_is_unchanged(index: WindowIndex, row: int, root: str, fs: AbstractFileSystem) -> bool:
    """Whether the objects of a window are as they were when the index was made."""
    now = _shortcut(dict(_objects(fs, root)), index.layers)
    return now != NEVER and now == bytes(index.digests["shortcut"][row].tobytes())


def list_windows(fs: AbstractFileSystem, windows: str) -> dict[tuple[str, str], Objects]:
    """The objects of each window, by group and name, sorted; what else lies among the windows is left out."""
    found: dict[tuple[str, str], Objects] = {}
    for path, state in _objects(fs, windows):
        parts = path.split("/", 2)
        if len(parts) == 3 and not parts[0].startswith(".") and not parts[1].startswith("."):
            found.setdefault((parts[0], parts[1]), {})[parts[2]] = state
    return {place: objects for place, objects in found.items() if "metadata.json" in objects}


def _objects(fs: AbstractFileSystem, root: str) -> Iterator[tuple[str, tuple[str, int | None]]]:
    # Listings that were kept may be old; and what s3fs keeps of this one names folders twice, which rslearn would read.
    fs.invalidate_cache()
    listing = sorted(fs.find(root, detail=True).items())
    fs.invalidate_cache()
    for path, info in listing:
        # Some stores keep an empty object for each folder.
        if below := path.removeprefix(root).strip("/"):
            yield below, _state(path, info)


def _state(path: str, info: Mapping[str, Any]) -> tuple[str, int | None]:
    content = [f"{name}={info[name]}" for name in _CONTENT if info.get(name)]
    times = [info[name] for name in _TIMES if info.get(name)]
    if not content and not times:
        raise ValueError(f"the file system tells neither a hash nor a time of {path}")
    text = " ".join([str(info.get("size")), *content, *map(str, times)])
    return text, None if content else max(map(_nanoseconds, times))


def _nanoseconds(moment: Any) -> int:
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if isinstance(moment, datetime):
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e9)
    return int(float(moment) * 1e9)


def _relevant(objects: Objects, layers: Sequence[str]) -> Objects:
    """Those that samples depend on."""
    wanted = set(layers)
    kept: Objects = {}
    for path, state in objects.items():
        top, _, rest = path.partition("/")
        if top in ("metadata.json", "items.json") or (top == "layers" and _layer(rest) in wanted):
            kept[path] = state
    return kept


def _layer(rest: str) -> str:
    return rest.partition("/")[0].partition(".")[0]


def _shortcut(objects: Objects, layers: Sequence[str]) -> bytes:
    relevant = _relevant(objects, layers)
    now = time.time_ns()
    if any(_fresh(state, now) for state in relevant.values()):
        return NEVER
    return digest(repr([(path, text) for path, (text, _) in relevant.items()]).encode())


def _fresh(state: tuple[str, int | None], now: int) -> bool:
    """Whether the object may change again within the same tick of a clock, which is all that would tell."""
    return state[1] is not None and abs(now - state[1]) < COARSE_TICK_NS


def _unchanged_objects(old: WindowIndex | None, shortcuts: Mapping[tuple[str, str], bytes]) -> Array:
    if old is None:
        return np.empty(0, bool)
    now = b"".join(shortcuts.get(place, NEVER) for place in old.identities())
    words = np.frombuffer(now, "<u8").reshape(-1, DIGEST // 8)
    same: Array = (words == old.digests["shortcut"]).all(axis=1) & (words != 0).any(axis=1)
    return same


def _look(
    fs: AbstractFileSystem, windows: str, found: Mapping[tuple[str, str], Objects], layers: Sequence[str]
) -> Iterator[WindowState]:
    places = list(found)
    for at in range(0, len(places), _AT_ONCE):
        paths = [f"{windows}/{group}/{name}/metadata.json" for group, name in places[at : at + _AT_ONCE]]
        raw = fs.cat(paths)
        for place, path in zip(places[at : at + _AT_ONCE], paths, strict=True):
            # One path is given back without its name.
            document = raw if isinstance(raw, bytes) else raw.get(path, raw.get(path.lstrip("/")))
            yield _see(*place, found[place], document, layers, path.removesuffix("/metadata.json"))


def _see(group: str, name: str, objects: Objects, raw: bytes, layers: Sequence[str], root: str) -> WindowState:
    metadata = parsed_metadata(raw, root)
    relevant, now = _relevant(objects, layers), time.time_ns()
    folders = sorted({path.split("/")[1] for path in relevant if path.startswith("layers/")})
    place = location_text(group, name, metadata)
    files = {
        layer: [path for path in relevant if path.startswith("layers/") and _layer(path[7:]) == layer]
        for layer in layers
    }
    return WindowState(
        group=group,
        name=name,
        bounds=pixel_bounds(metadata, root),
        projection=json.dumps(metadata["projection"]),
        times=json.dumps(metadata.get("time_range") or None),
        options=json.dumps(metadata["options"]),
        completed="|".join(folder for folder in folders if f"layers/{folder}/{MARKER}" in relevant),
        layout="",
        shortcut=_shortcut(objects, layers),
        base=_of_objects(place, ["items.json"] if "items.json" in relevant else [], relevant, now),
        layers={layer: _of_objects(layer + place, paths, relevant, now) for layer, paths in files.items()},
        fresh=any(_fresh(state, now) for state in relevant.values()),
    )


def _of_objects(salt: str, paths: Sequence[str], objects: Objects, now: int) -> bytes:
    lines = [salt]
    for path in paths:
        # A marker counts by being there.
        lines.append(path if path.endswith(f"/{MARKER}") else f"{path} {objects[path][0]}")
        if _fresh(objects[path], now):
            # No later look will match this one.
            lines.append(os.urandom(DIGEST).hex())
    return digest("\n".join(lines).encode())
