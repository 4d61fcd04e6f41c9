"""Bring the window index up to date: find windows that were added, removed or changed, and look at only those."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from rslp.runtime.children import pool as pool_of
from rslp.train.store import folder
from rslp.train.store.columns import Array
from rslp.train.store.folder import Seen
from rslp.train.store.index import WindowIndex, open_index, write_index

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
class Listing:
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


def latest(store: Path, key: str, *, dataset: str) -> WindowIndex | None:
    """The newest index of a set of layers, if it can be read."""
    path = max(store.glob(f"windows-{key}-*.idx"), default=None)
    try:
        return None if path is None else open_index(path)
    except (OSError, ValueError) as error:
        log.warning("dataset %r: %s can't be read, so the windows are listed anew: %s", dataset, path, error)
        return None


def trusted(index: WindowIndex, windows: Path) -> bool:
    """Whether an index is to be used without a look at each window: it is large, and no window came or went."""
    return len(index) > CHECKED_AT_START and index.groups == list_groups(windows)


def refresh(
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
    seen: list[Seen] = []
    for part in _spread(partial(_look, str(windows), tuple(layers)), unknown, workers) if unknown else ():
        seen += part
    # What is no window is looked at each time: it may be one by now.
    if old is not None and not seen and len(kept) == len(old) and old.groups == groups:
        return old
    seen = _settled(seen, windows, layers)
    path = store / f"windows-{key}-{time.time_ns():020d}.idx"
    index = write_index(path, seen, layers=layers, groups=groups, old=old, kept=kept)
    forget_older(store, key, path)
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
    now = b"".join(part for part in _spread(partial(_shortcuts, str(windows)), tasks, spread))
    words = np.frombuffer(now, "<u8").reshape(-1, folder.DIGEST // 8)
    at = np.array([rows[place] for place in known], np.int64)
    same = (words == old.digests["shortcut"][at]).all(axis=1) & (words != 0).any(axis=1)
    changed = {place for place, good in zip(known, same.tolist(), strict=True) if not good}
    return at[same], [place for place in places if place not in rows or place in changed]


def _shortcuts(windows: str, tasks: Sequence[tuple[str, str]]) -> bytes:
    gone = bytes(folder.DIGEST)
    with folder.opened(windows) as at:
        return b"".join(folder.shortcut(place, layout, at=at) or gone for place, layout in tasks)


def _look(windows: str, layers: Sequence[str], places: Sequence[tuple[str, str]]) -> list[Seen]:
    seen = [folder.look(f"{windows}/{group}/{name}", group, name, layers) for group, name in places]
    return [one for one in seen if one is not None]


def _settled(seen: list[Seen], windows: Path, layers: Sequence[str]) -> list[Seen]:
    """Look again, after a moment, at windows that were written just now."""
    if not any(one.fresh for one in seen):
        return seen
    time.sleep(folder.TICK_NS / 1e9)
    again = [_look(str(windows), layers, [(one.group, one.name)]) if one.fresh else [one] for one in seen]
    return [one for found in again for one in found]


def _spread(work: Callable[[Sequence[T]], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Results in order, over several processes if it is worth it."""
    if workers < 2 or len(tasks) < _WORTH_A_PROCESS:
        yield work(tasks)
        return
    size = -(-len(tasks) // (4 * workers))
    with pool_of(workers, "fork", what="lists windows") as pool:
        yield from pool.map(work, [tasks[at : at + size] for at in range(0, len(tasks), size)])


def forget_older(store: Path, key: str, current: Path) -> None:
    """Remove indices that no running process can have opened any more."""
    for path in sorted(store.glob(f"windows-{key}-*.idx")):
        # Another process may be at it, too.
        with suppress(OSError):
            if path != current and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
