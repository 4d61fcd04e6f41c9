"""Read samples' inputs from the store, and whatever it does not hold from the dataset itself."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from rslearn.dataset import Dataset, Window
from rslearn.train.dataset import DataInput
from rslearn.utils.geometry import PixelBounds, Projection
from upath import UPath

from rslp import upstream
from rslp.data.cache import records
from rslp.data.cache.columns import Array
from rslp.data.cache.index import WindowIndex, available, layer_of
from rslp.data.cache.segments import InputRecords, SegmentReader


class CachedWindows:
    """The windows of a split, with what the store holds of them.

    Args:
        dataset: the dataset itself.
        index: its windows.
        rows: which of them, in the split's order.
        shelves: where the records of each packed input lie.
        reader: gives the records.
        trusted: the index was not checked at the start, so each window is when it is first read.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        index: WindowIndex,
        rows: Array,
        shelves: Mapping[str, InputRecords],
        reader: SegmentReader,
        trusted: bool,
    ) -> None:
        self._opened = dataset
        self._process = os.getpid()
        self._index = index
        self._rows = rows
        self._shelves = shelves
        self._reader = reader
        # 0 not looked at, 1 as in the index, 2 changed.
        self._state = np.full(len(rows), 0 if trusted else 1, np.uint8)
        self._available: dict[tuple[int, tuple[str, ...]], frozenset[str]] = {}

    @property
    def _dataset(self) -> Dataset:
        """The dataset; a forked process opens one on an object store anew, since connections do not live on in it."""
        path = self._opened.path
        if self._process != os.getpid() and not isinstance(path.fs, LocalFileSystem):
            self._opened = upstream.open_dataset(UPath(str(path), **path.storage_options))
            self._process = os.getpid()
        return self._opened

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._rows)

    def __getitem__(self, i: int) -> Window:
        """The window as rslearn's own object."""
        return self._index.window(int(self._rows[i]), self._dataset)

    def identity(self, i: int) -> tuple[str, str]:
        """Group and name of a window."""
        return self._index.identity(int(self._rows[i]))

    def bounds(self, i: int) -> PixelBounds:
        """A window's bounds (pixels)."""
        x0, y0, x1, y1 = self._index.bounds[self._rows[i]].tolist()
        return x0, y0, x1, y1

    def combined_fingerprint(self, numbers: Iterable[int], inputs: Mapping[str, DataInput]) -> str | None:
        """What is read of some windows depends on this; None where the store can't tell, or does not hold it all.

        Args:
            numbers: which windows.
            inputs: what is read of them.
        """
        digest = hashlib.sha256()
        texts = self._index.texts
        fingerprints = {
            name: self._index.fingerprints([layer_of(option) for option in spec.layers])
            for name, spec in inputs.items()
        }
        for i in dict.fromkeys(numbers):
            row = int(self._rows[i])
            present = self._present(i, inputs)
            if any(name not in self._shelves or self._shelves[name].place(i) is None for name in present):
                return None
            if not self._unchanged(i):
                return None
            known = [*self._index.identity(row), *(texts[name][row] for name in ("options", "times", "projection"))]
            digest.update(repr([known, self._index.bounds[row].tolist(), sorted(present)]).encode())
            for name in sorted(present):
                digest.update(fingerprints[name][row].tobytes())
        return digest.hexdigest()

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self._reader.folder

    def time_range(self, i: int) -> records.TimeRange | None:
        """A window's time range, if it has one."""
        return self._index.time_range(int(self._rows[i]))

    def projection(self, i: int) -> Projection:
        """A window's projection."""
        return self._index.projection(int(self._rows[i]))

    def read(
        self, i: int, *, bounds: PixelBounds, inputs: Mapping[str, DataInput], rng: random.Random
    ) -> upstream.RawInputs:
        """Read a sample's inputs, the same as ``upstream.read_inputs`` bit for bit.

        Args:
            i: which window.
            bounds: the crop to read, pixels.
            inputs: what to read.
            rng: where draws of item groups come from.
        """
        if not self._unchanged(i):
            return upstream.read_inputs(self._dataset, self[i], bounds=bounds, inputs=dict(inputs), rng=rng)
        raw: upstream.RawInputs = {}
        present = self._present(i, inputs)
        for name, data_input in inputs.items():
            if name not in present:
                continue
            found = self._from_store(i, name, data_input, bounds=bounds, rng=rng)
            if found is None:
                found = upstream.read_inputs(
                    self._dataset, self[i], bounds=bounds, inputs={name: data_input}, rng=rng
                ).get(name)
            if found is not None:
                raw[name] = found
        return raw

    def fingerprints(self, inputs: Mapping[str, DataInput]) -> Array | None:
        """What each window holds of some inputs, as ``N 2`` words that change with any of its files."""
        layers = [option.partition(".")[0] for data_input in inputs.values() for option in data_input.layers]
        fingerprints = self._index.fingerprints(layers)[self._rows]
        # Records do not hold the window's time range, samples do.
        return fingerprints ^ self._index.texts["times"].digests(self._rows)

    def window_is_unchanged(self, i: int) -> bool:
        """Whether a window still is what ``prints`` says."""
        return self._unchanged(i)

    def has_single_item_groups(self, inputs: Mapping[str, DataInput]) -> bool:
        """Whether no window leaves a choice of item groups."""
        completed = self._index.texts["completed"]
        folders = [completed.distinct(int(code)).split("|") for code in completed.used(self._rows)]
        for data_input in inputs.values():
            layers = {option.partition(".")[0] for option in data_input.layers}
            if data_input.load_all_layers and data_input.load_all_item_groups:
                continue
            if any(sum(folder.partition(".")[0] in layers for folder in one) > 1 for one in folders):
                return False
        return True

    def _from_store(
        self, i: int, name: str, data_input: DataInput, *, bounds: PixelBounds, rng: random.Random
    ) -> upstream.RawInput | None:
        place = self._shelves[name].place(i) if name in self._shelves else None
        record = None if place is None else self._reader.read(place)
        if record is None:
            # The dataset itself is still there.
            return None
        payload, raw = record
        if data_input.data_type == "vector":
            group = None if data_input.load_all_layers else rng.choice(range(records.vector_groups(raw)))
            return records.decode_vector(payload, self.projection(i), group=group)
        head, window = records.parse_head(raw), self.bounds(i)
        crop = None if bounds == window else _relative(bounds, window)
        if crop is not None and not (head.crops and records.crop_is_inside(bounds, window)):
            return None
        # Drawn only when the record is good: the direct way draws from the same generator.
        group = None if data_input.load_all_layers else rng.choice(range(len(head.steps)))
        return records.decode_raster(payload, head, group=group, crop=crop)

    def _present(self, i: int, inputs: Mapping[str, DataInput]) -> frozenset[str]:
        """The inputs that the window has: the others are not required."""
        code = int(self._index.texts["completed"].codes[self._rows[i]])
        key = (code, tuple(inputs))
        if key not in self._available:
            folders = self._index.texts["completed"].distinct(code)
            self._available[key] = frozenset(available(folders, inputs))
        return self._available[key]

    def _unchanged(self, i: int) -> bool:
        if not self._state[i]:
            # Of a trusted index.
            same = self._index.window_is_unchanged(int(self._rows[i]), str(self[i].window_root.path))
            self._state[i] = 1 if same else 2
        return bool(self._state[i] == 1)


def _relative(crop: PixelBounds, window: PixelBounds) -> PixelBounds:
    return crop[0] - window[0], crop[1] - window[1], crop[2] - window[0], crop[3] - window[1]
