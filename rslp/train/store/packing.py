"""Pack windows: decode them in several processes, each into a segment of its own, and publish what is done."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rasterio.errors import RasterioError
from rslearn.dataset import Dataset, Window
from rslearn.train.dataset import DataInput
from upath import UPath

from rslp.train import adapters
from rslp.train.store import decoding, records
from rslp.train.store.decoding import NotingFormat, Unfit
from rslp.train.store.index import WindowIndex
from rslp.train.store.shelf import Entry, SegmentWriter

CHUNK = 8
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNREADABLE = (Unfit, OSError, ValueError, KeyError, AssertionError, NotImplementedError, RuntimeError, RasterioError)


class DiskFull(Exception):
    """The store's disk has no room left."""


@dataclass(frozen=True)
class Work:
    """What a packing process needs to know.

    Attributes:
        dataset: the dataset's folder.
        store: the store's folder.
        index: its windows.
        inputs: inputs by the key of their records.
        prints: for each of them the windows' fingerprints.
    """

    dataset: UPath
    store: Path
    index: WindowIndex
    inputs: Mapping[str, DataInput]
    prints: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Packed:
    """What became of some windows.

    Attributes:
        entries: new entries by the key of the input.
        windows: how many windows were looked at.
        moving: windows that changed while they were read; they are left for the next time.
    """

    entries: dict[str, list[Entry]]
    windows: int
    moving: int


Task = tuple[int, tuple[str, ...]]


class Packer:
    """Packs windows in this process."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._dataset = adapters.keep_formats(Dataset(work.dataset))
        self._formats: list[NotingFormat] = []
        adapters.wrap_raster_formats(self._dataset, self._note)
        self._writer = SegmentWriter(work.store)

    def pack(self, tasks: Sequence[Task]) -> Packed:
        """Pack some windows.

        Args:
            tasks: rows of the index, each with the keys of the inputs that are missing.

        Raises:
            DiskFull: there is no room.
        """
        entries: dict[str, list[Entry]] = {}
        moving = 0
        for row, keys in tasks:
            window = self._work.index.window(row, self._dataset)
            decoded = {key: self._decode(window, self._work.inputs[key]) for key in keys}
            if not self._work.index.still_holds(row, str(window.window_root.path)):
                # What was read may be of either state.
                moving += 1
                continue
            for key, (payload, head, unfit) in decoded.items():
                print_ = tuple(self._work.prints[key][row].tolist())
                entries.setdefault(key, []).append(self._write(print_, payload, head, unfit=unfit))
        self._flush()
        return Packed(entries, len(tasks), moving)

    def close(self) -> None:
        """Close the segment."""
        self._writer.close()

    def _note(self, inner: Any) -> NotingFormat:
        self._formats.append(NotingFormat(inner))
        return self._formats[-1]

    def _decode(self, window: Window, data_input: DataInput) -> tuple[bytes, bytes, bool]:
        for one in self._formats:
            one.on_grid = True
        try:
            if data_input.data_type == "vector":
                groups = decoding.read_vectors(self._dataset, window, data_input)
                return *records.encode_vector(groups, window), False
            rasters = decoding.read_rasters(self._dataset, window, data_input)
            plain = data_input.resolution_factor.numerator == data_input.resolution_factor.denominator == 1
            crops = plain and all(one.on_grid for one in self._formats)
            return *records.encode_raster(rasters, narrow=self._dtypes(data_input), crops=crops), False
        except _UNREADABLE as error:
            # Whoever trains on it meets the same error on the direct way, if it is one.
            return b"", f"{type(error).__name__}: {error}"[:500].encode(), True

    def _dtypes(self, data_input: DataInput) -> list[str]:
        layers = {option.partition(".")[0] for option in data_input.layers}
        found = {str(band_set.dtype.value) for name in layers for band_set in self._dataset.layers[name].band_sets}
        return sorted({*found, "uint8"}) if len(found) == 1 else ["uint16"]

    def _write(self, print_: tuple[int, int], payload: bytes, head: bytes, *, unfit: bool) -> Entry:
        try:
            return self._writer.add(print_, payload, head, unfit=unfit)
        except OSError as error:
            raise _as_full(error) from error

    def _flush(self) -> None:
        try:
            self._writer.flush()
        except OSError as error:
            raise _as_full(error) from error


def _as_full(error: OSError) -> Exception:
    return DiskFull(str(error)) if error.errno in _FULL else error


def pack_all(work: Work, tasks: Iterable[Task], *, workers: int) -> Iterator[Packed]:
    """Pack windows; memory does not grow with their number.

    Args:
        work: what is packed, and where to.
        tasks: rows with the inputs that are missing.
        workers: processes; below 2, everything is done in this one.

    Yields:
        What became of each portion, as it is done.

    Raises:
        DiskFull: there is no room.
    """
    portions = _portions(iter(tasks))
    if workers < 2:
        packer = Packer(work)
        try:
            yield from map(packer.pack, portions)
        finally:
            packer.close()
        return
    # Forked, as the loader's workers are: a fresh interpreter would import torch for seconds before it packs anything.
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin, (work,))
    try:
        running: set[Future[Packed]] = {pool.submit(_pack, one) for one in islice(portions, 3 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_pack, one) for one in islice(portions, len(done))}
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _portions(tasks: Iterator[Task]) -> Iterator[list[Task]]:
    while portion := list(islice(tasks, CHUNK)):
        yield portion


_PACKER: list[Packer] = []


def _begin(work: Work) -> None:
    _PACKER[:] = [Packer(work)]


def _pack(tasks: list[Task]) -> Packed:
    return _PACKER[0].pack(tasks)


def default_workers() -> int:
    """Processes to pack with: one per processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
