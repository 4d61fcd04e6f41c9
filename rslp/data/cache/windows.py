"""The windows of a split, and how the inputs of samples are read: from the sample cache, or from the dataset itself."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem
from rslearn.dataset import Dataset, Window
from rslearn.train.dataset import DataInput
from rslearn.utils.geometry import PixelBounds, Projection
from upath import UPath

from rslp import upstream
from rslp.data.cache.columns import Array
from rslp.data.cache.index import WindowIndex, available
from rslp.data.cache.records import TimeRange, decode_raster, decode_vector, parse_head, vector_groups
from rslp.data.cache.segments import InputRecords, SegmentReader
from rslp.data.cache.window_state import layer_of


class Windows:
    """The windows of a split, numbered in the split's order, read from the dataset itself."""

    def __init__(self, dataset: Dataset, windows: Sequence[Window]) -> None:
        self._dataset = dataset
        self._windows = windows

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._windows)

    def __getitem__(self, i: int) -> Window:
        """A window as rslearn's own object."""
        return self._windows[i]

    def identity(self, i: int) -> tuple[str, str]:
        """Group and name of a window."""
        return self[i].group, self[i].name

    def bounds(self, i: int) -> PixelBounds:
        """A window's bounds x0, y0, x1, y1 (px)."""
        bounds: PixelBounds = self[i].bounds
        return bounds

    def time_range(self, i: int) -> TimeRange | None:
        """A window's time range, if it has one."""
        span: TimeRange | None = self[i].time_range
        return span

    def projection(self, i: int) -> Projection:
        """A window's projection."""
        return self[i].projection

    def read(
        self, i: int, *, bounds: PixelBounds, inputs: Mapping[str, DataInput], rng: random.Random
    ) -> upstream.RawInputs:
        """Read the inputs of one sample.

        Args:
            i: the window's number.
            bounds: the crop to read, x0, y0, x1, y1 (px).
            inputs: the inputs to read.
            rng: random generator for the choice of item groups.
        """
        window = self[i]
        return upstream.read_inputs(self._dataset, window, bounds=bounds, inputs=dict(inputs), rng=rng)


class CachedWindows(Windows):
    """The windows of a split, read from the sample cache where it has them, bit for bit the same.

    The dataset's index has the state of all windows, which gives fingerprints of their content.

    Args:
        dataset: the dataset itself.
        index: the dataset's windows.
        rows: rows of the index, in the split's order.
        records: for each cached input the places of the windows' records.
        reader: reads the records.
        trusted: the index was not checked at the start, so each window is checked when it is first read.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        index: WindowIndex,
        rows: Array,
        records: Mapping[str, InputRecords],
        reader: SegmentReader,
        trusted: bool,
    ) -> None:
        super().__init__(dataset, ())
        self._process = os.getpid()
        self._index = index
        self._rows = rows
        self._records = records
        self._reader = reader
        # For each window: 0 not checked, 1 as in the index, 2 changed.
        self._state = bytearray([0 if trusted else 1]) * len(rows)
        # For each window the number of the text that lists its item groups; for each text and input whether it has it.
        self._completed = index.texts["completed"].codes[rows]
        self._available: dict[tuple[int, str], bool] = {}

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._rows)

    def __getitem__(self, i: int) -> Window:
        """A window as rslearn's own object."""
        path = self._dataset.path
        if self._process != os.getpid() and not isinstance(path.fs, LocalFileSystem):
            # A dataset on an object store is opened again after a fork, since connections do not survive it.
            self._dataset = upstream.open_dataset(UPath(str(path), **path.storage_options))
            self._process = os.getpid()
        return self._index.window(int(self._rows[i]), self._dataset)

    def identity(self, i: int) -> tuple[str, str]:
        """Group and name of a window."""
        return self._index.identity(int(self._rows[i]))

    def bounds(self, i: int) -> PixelBounds:
        """A window's bounds x0, y0, x1, y1 (px)."""
        x0, y0, x1, y1 = self._index.bounds[self._rows[i]].tolist()
        return x0, y0, x1, y1

    @property
    def folder(self) -> Path:
        """The folder of the sample cache."""
        return self._reader.folder

    def time_range(self, i: int) -> TimeRange | None:
        """A window's time range, if it has one."""
        return self._index.time_range(int(self._rows[i]))

    def projection(self, i: int) -> Projection:
        """A window's projection."""
        return self._index.projection(int(self._rows[i]))

    def read(
        self, i: int, *, bounds: PixelBounds, inputs: Mapping[str, DataInput], rng: random.Random
    ) -> upstream.RawInputs:
        """Read the inputs of one sample, see ``Windows``."""
        if not self.is_unchanged(i):
            return super().read(i, bounds=bounds, inputs=inputs, rng=rng)
        x, y, *_ = window = self.bounds(i)
        crop = None if bounds == window else (bounds[0] - x, bounds[1] - y, bounds[2] - x, bounds[3] - y)
        raw: upstream.RawInputs = {}
        for name, data_input in inputs.items():
            if not self._has(i, name, data_input):
                continue
            value = self._from_cache(i, name, data_input, crop=crop, rng=rng)
            if value is not None:
                raw[name] = value
            else:
                raw |= super().read(i, bounds=bounds, inputs={name: data_input}, rng=rng)
        return raw

    def fingerprints(self, inputs: Mapping[str, DataInput]) -> Array:
        """Content fingerprint of each window, uint64 ``N 2``, which changes with any of its files."""
        layers = [layer_of(option) for data_input in inputs.values() for option in data_input.layers]
        fingerprints = self._index.fingerprints(layers)[self._rows]
        # The index's fingerprints leave out the time range: records have none, but samples do.
        return fingerprints ^ self._index.texts["times"].digests(self._rows)

    def is_unchanged(self, i: int) -> bool:
        """Whether a window's files still have the fingerprint that ``fingerprints`` gives."""
        if not self._state[i]:
            unchanged = self._index.window_is_unchanged(int(self._rows[i]), str(self[i].window_root.path))
            self._state[i] = 1 if unchanged else 2
        return self._state[i] == 1

    def has_single_item_groups(self, inputs: Mapping[str, DataInput]) -> bool:
        """Whether each input has one item group at most in every window, so that each read gives the same."""
        completed = self._index.texts["completed"]
        folders_of_windows = [completed.distinct(int(code)).split("|") for code in completed.used(self._rows)]
        for data_input in inputs.values():
            layers = {layer_of(option) for option in data_input.layers}
            if data_input.load_all_layers and data_input.load_all_item_groups:
                continue
            if any(sum(layer_of(folder) in layers for folder in folders) > 1 for folders in folders_of_windows):
                return False
        return True

    def _from_cache(
        self, i: int, name: str, data_input: DataInput, *, crop: PixelBounds | None, rng: random.Random
    ) -> upstream.RawInput | None:
        """Read one input from its record; None if there is no usable record, or the crop can't be cut from it.

        Args:
            i: the window's number.
            name: the input's name.
            data_input: the input.
            crop: x0, y0, x1, y1 from the window's corner (px); None means the whole window.
            rng: random generator for the choice of the item group.
        """
        place = self._records[name].place(i) if name in self._records else None
        record = None if place is None else self._reader.read(place)
        if record is None:
            return None
        payload, raw_head = record
        if data_input.data_type == "vector":
            group = None if data_input.load_all_layers else rng.choice(range(vector_groups(raw_head)))
            return decode_vector(payload, self.projection(i), group=group)
        head = parse_head(raw_head)
        if crop is not None and not head.has_crop(crop):
            return None
        # Drawn only now that the record is known to be usable: reading the dataset draws from the same generator.
        group = None if data_input.load_all_layers else rng.choice(range(len(head.steps)))
        return decode_raster(payload, head, group=group, crop=crop)

    def _has(self, i: int, name: str, data_input: DataInput) -> bool:
        """Whether a window has an input; one that is not required may be absent."""
        key = (self._completed.item(i), name)
        has = self._available.get(key)
        if has is None:
            folders = self._index.texts["completed"].distinct(key[0])
            has = self._available[key] = bool(available(folders, {name: data_input}))
        return has
