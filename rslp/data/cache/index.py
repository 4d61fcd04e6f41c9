"""The window index: all windows of a dataset in one memory-mapped file, and the choice of a split's windows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from rslearn.dataset import Dataset, Window
from rslearn.train.dataset import DataInput, SplitConfig, check_window, is_data_input_available
from rslearn.utils.geometry import Projection

from rslp import upstream
from rslp.data.cache.columns import Array, Texts, read_columns, write_columns
from rslp.data.cache.records import TimeRange
from rslp.data.cache.window_state import DIGEST, WindowState, scan_window, stamp_digest
from rslp.errors import DataError

FORMAT = 2
_TEXTS = ("group", "projection", "times", "options", "completed", "layout")


@dataclass(frozen=True)
class WindowIndex:
    """The windows of one dataset in the state they had when the index was made, one row each.

    Attributes:
        path: the index's file.
        layers: the layers whose files are indexed, sorted.
        groups: time stamp (ns) of each group's folder, which changes when a window is added or removed.
        names: the windows' names.
        texts: the columns ``group``, ``projection``, ``times``, ``options``, ``completed`` and ``layout`` of
            ``WindowState``.
        bounds: x0, y0, x1, y1 of each window (px), ``N 4``.
        order: rows in the order in which samples are numbered: by hash of the name, then by group.
        digests: the digests ``shortcut``, ``base`` and one per layer of ``WindowState``, each as uint64 ``N 2``.
    """

    path: Path
    layers: tuple[str, ...]
    groups: dict[str, int]
    names: Texts
    texts: dict[str, Texts]
    bounds: Array
    order: Array
    digests: dict[str, Array]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.bounds)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file itself."""
        return open_index, (self.path,)

    def identity(self, row: int) -> tuple[str, str]:
        """Group and name of a window."""
        return self.texts["group"][row], self.names[row]

    def identities(self) -> list[tuple[str, str]]:
        """Group and name of every window."""
        return list(zip(self.texts["group"].by_row(), self.names.by_row(), strict=True))

    def fingerprints(self, layers: Sequence[str]) -> Array:
        """The fingerprint of each window's records of these layers, uint64 ``N 2``."""
        mixed = self.digests["base"].copy()
        # Each digest is salted with its layer and window, so their exclusive or is as good as a digest of them all.
        for layer in sorted(set(layers)):
            mixed ^= self.digests[f"layer/{layer}"]
        return mixed

    def window_is_unchanged(self, row: int, root: str) -> bool:
        """Whether a window's files still have the digests of the index; ``root`` is the window's folder."""
        if stamp_digest(root, self.texts["layout"][row]) == self.digests["shortcut"][row].tobytes():
            return True
        try:
            state = scan_window(root, *self.identity(row), self.layers)
        except (OSError, ValueError, DataError):
            return False
        if state is None:
            return False
        digests = {"base": state.base, **{f"layer/{layer}": digest for layer, digest in state.layers.items()}}
        return all(self.digests[name][row].tobytes() == digest for name, digest in digests.items())

    def projection(self, row: int) -> Projection:
        """A window's projection."""
        return projection_of(self.texts["projection"][row])

    def time_range(self, row: int) -> TimeRange | None:
        """A window's time range, if it has one."""
        return _time_range(self.texts["times"][row])

    def window(self, row: int, dataset: Dataset) -> Window:
        """The window as rslearn would load it."""
        group, name = self.identity(row)
        x0, y0, x1, y1 = self.bounds[row].tolist()
        return Window(
            storage=dataset.storage,
            group=group,
            name=name,
            projection=self.projection(row),
            bounds=(x0, y0, x1, y1),
            time_range=self.time_range(row),
            options=json.loads(self.texts["options"][row]),
            data_factory=dataset.window_data_storage_factory,
        )


def open_index(path: Path) -> WindowIndex:
    """Open an index.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is of another format, or damaged.
    """
    columns = read_columns(path)
    if columns.meta.get("format") != FORMAT:
        raise ValueError("it is of another format")
    arrays = columns.arrays
    layers = tuple(columns.meta["layers"])
    return WindowIndex(
        path=path,
        layers=layers,
        groups=columns.meta["groups"],
        names=Texts.read("name", arrays),
        texts={name: Texts.read(name, arrays) for name in _TEXTS},
        bounds=arrays["bounds"],
        order=arrays["order"],
        digests={name: arrays[f"digest/{name}"] for name in _digest_names(layers)},
    )


def write_index(
    path: Path,
    states: Sequence[WindowState],
    *,
    layers: Sequence[str],
    groups: dict[str, int],
    old: WindowIndex | None = None,
    unchanged: Array | None = None,
) -> WindowIndex:
    """Write an index and open it.

    Args:
        path: the file to write.
        states: windows that were scanned.
        layers: the layers whose files were scanned.
        groups: time stamps of the groups' folders.
        old: an earlier index, of the same layers.
        unchanged: rows of ``old`` to copy, whose windows have not changed.

    Raises:
        DataError: a window's projection or time range can't be parsed.
    """
    _refuse_unusable(states)
    rows = np.empty(0, np.int64) if unchanged is None else unchanged
    columns = {name: [str(getattr(state, name)) for state in states] for name in _TEXTS}
    names = [state.name for state in states]
    texts = {name: old.texts[name].joined(rows, more) if old else Texts.of(more) for name, more in columns.items()}
    all_names = old.names.joined(rows, names) if old else Texts.of(names)
    bounds = np.array([state.bounds for state in states], np.int64).reshape(-1, 4)
    arrays: dict[str, Array] = {"bounds": np.concatenate([old.bounds[rows], bounds]) if old else bounds}
    for name in _digest_names(layers):
        fresh = np.frombuffer(b"".join(_digest(state, name) for state in states), "<u8").reshape(-1, DIGEST // 8)
        arrays[f"digest/{name}"] = np.concatenate([old.digests[name][rows], fresh]) if old else fresh
    arrays["order"] = _order(all_names, texts["group"])
    for name, column in {**texts, "name": all_names}.items():
        arrays |= column.arrays(name)
    write_columns(path, arrays, meta={"format": FORMAT, "layers": sorted(layers), "groups": groups})
    return open_index(path)


def _refuse_unusable(states: Sequence[WindowState]) -> None:
    for state in states:
        try:
            projection_of(state.projection)
            _time_range(state.times)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            window = f"window {state.group}/{state.name}"
            raise DataError(f"{window}: metadata.json is not what rslearn writes: {reason}") from error


def _digest_names(layers: Sequence[str]) -> list[str]:
    return ["shortcut", "base", *(f"layer/{layer}" for layer in sorted(layers))]


def _digest(state: WindowState, name: str) -> bytes:
    if name.startswith("layer/"):
        return state.layers[name.removeprefix("layer/")]
    return bytes(getattr(state, name))


def _order(names: Texts, groups: Texts) -> Array:
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names.all()]
    distinct_groups = groups.all()
    keys = [(hashes[n], distinct_groups[g]) for n, g in zip(names.codes.tolist(), groups.codes.tolist(), strict=True)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


@lru_cache(maxsize=1024)
def projection_of(text: str) -> Projection:
    """A projection from its JSON; the same object for the same text."""
    projection: Projection = Projection.deserialize(json.loads(text))
    return projection


@lru_cache(maxsize=1024)
def _time_range(text: str) -> TimeRange | None:
    if text == "null":
        return None
    start, end = json.loads(text)
    return datetime.fromisoformat(start), datetime.fromisoformat(end)


class CompletedGroups:
    """A stand-in for rslearn's window with the completed item groups alone, for many windows at a time."""

    name = ""

    def __init__(self, folders: str) -> None:
        self._folders = frozenset(folders.split("|"))

    def is_layer_completed(self, layer_name: str, group_idx: int = 0) -> bool:
        """Whether an item group is complete."""
        return (f"{layer_name}.{group_idx}" if group_idx else layer_name) in self._folders


def select(index: WindowIndex, inputs: Mapping[str, DataInput], config: SplitConfig) -> Array:
    """The rows of a split's windows; the same windows in the same order as ``upstream.list_windows``."""
    rows = index.order
    for names, column in ((config.groups, index.texts["group"]), (config.names, index.names)):
        if names:
            times = Counter(names)
            # As in rslearn, a window whose name is listed twice is two samples.
            counts = np.array([times[column.distinct(code)] for code in range(len(column.ends))], np.int64)
            rows = np.repeat(rows, counts[column.codes[rows]])
    rows = _with_tags(index, rows, config.tags or {})
    rows = _with_inputs(index, rows, inputs)
    return rows[: config.num_samples] if config.num_samples else rows


def _with_tags(index: WindowIndex, rows: Array, tags: dict[str, Any]) -> Array:
    if not tags:
        return rows
    options = index.texts["options"]
    good = np.zeros(len(options.ends), bool)
    for code in options.used(rows):
        good[code] = upstream.has_tags(json.loads(options.distinct(code)), tags)
    return rows[good[options.codes[rows]]]


def _with_inputs(index: WindowIndex, rows: Array, inputs: Mapping[str, DataInput]) -> Array:
    completed = index.texts["completed"]
    good = np.zeros(len(completed.ends), bool)
    for code in completed.used(rows):
        window = cast(Window, CompletedGroups(completed.distinct(int(code))))
        good[code] = check_window(dict(inputs), window)[0] is not None
    return rows[good[completed.codes[rows]]]


def available(completed: str, inputs: Mapping[str, DataInput]) -> Sequence[str]:
    """The inputs that a window has; ``completed`` lists its completed item groups, see ``WindowState``."""
    window = cast(Window, CompletedGroups(completed))
    return [name for name, spec in inputs.items() if spec.required or is_data_input_available(spec, window)]
