"""What the windows of a dataset on an object store look like: from one listing of all objects, before any is read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from rslp.train.store import checking
from rslp.train.store.columns import Array
from rslp.train.store.folder import (
    COARSE_TICK_NS,
    DIGEST,
    MARKER,
    NEVER,
    Seen,
    digest,
    parsed_metadata,
    pixel_bounds,
    place_of,
)
from rslp.train.store.index import WindowIndex, write_index

# Where file systems say of which state an object is: a hash or number of its content, or else a time.
_CONTENT = ("ETag", "etag", "md5Hash", "content_md5", "generation", "VersionId", "version_id", "crc32c", "checksum")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
_AT_ONCE = 1000

# Objects of a window by their path below it: text that changes with the object, and its time in ns if only that tells.
Objects = dict[str, tuple[str, int | None]]


def refresh(
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
    kept = _unchanged(old, shortcuts)
    same = {} if old is None else {place: row for row, place in enumerate(old.identities()) if kept[row]}
    unknown = [place for place in found if place not in same]
    if old is not None and not unknown and len(same) == len(old):
        return old
    seen = list(_look(fs, windows, {place: found[place] for place in unknown}, layers))
    rows = np.array(list(same.values()), np.int64)
    path = store / f"windows-{key}-{time.time_ns():020d}.idx"
    index = write_index(path, seen, layers=layers, groups={}, old=old, kept=rows)
    checking.forget_older(store, key, path)
    return index


def still_holds(index: WindowIndex, row: int, root: str, fs: AbstractFileSystem) -> bool:
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


def _unchanged(old: WindowIndex | None, shortcuts: Mapping[tuple[str, str], bytes]) -> Array:
    if old is None:
        return np.empty(0, bool)
    now = b"".join(shortcuts.get(place, NEVER) for place in old.identities())
    words = np.frombuffer(now, "<u8").reshape(-1, DIGEST // 8)
    same: Array = (words == old.digests["shortcut"]).all(axis=1) & (words != 0).any(axis=1)
    return same


def _look(
    fs: AbstractFileSystem, windows: str, found: Mapping[tuple[str, str], Objects], layers: Sequence[str]
) -> Iterator[Seen]:
    places = list(found)
    for at in range(0, len(places), _AT_ONCE):
        paths = [f"{windows}/{group}/{name}/metadata.json" for group, name in places[at : at + _AT_ONCE]]
        raw = fs.cat(paths)
        for place, path in zip(places[at : at + _AT_ONCE], paths, strict=True):
            # One path is given back without its name.
            document = raw if isinstance(raw, bytes) else raw.get(path, raw.get(path.lstrip("/")))
            yield _see(*place, found[place], document, layers, path.removesuffix("/metadata.json"))


def _see(group: str, name: str, objects: Objects, raw: bytes, layers: Sequence[str], root: str) -> Seen:
    metadata = parsed_metadata(raw, root)
    relevant, now = _relevant(objects, layers), time.time_ns()
    folders = sorted({path.split("/")[1] for path in relevant if path.startswith("layers/")})
    place = place_of(group, name, metadata)
    files = {
        layer: [path for path in relevant if path.startswith("layers/") and _layer(path[7:]) == layer]
        for layer in layers
    }
    return Seen(
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
