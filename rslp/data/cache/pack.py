"""Pack windows: decode them in several processes, each into a segment of its own, and publish what is done."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fsspec.implementations.local import LocalFileSystem
from rslearn.dataset import Window
from rslearn.train.dataset import DataInput
from upath import UPath

from rslp import upstream
from rslp.data.bad_samples import READ_ERRORS
from rslp.data.cache import records, refresh, segments
from rslp.data.cache.index import WindowIndex, layer_of
from rslp.data.cache.records import GridCheckingFormat, UncacheableWindow
from rslp.data.cache.segments import InputRecords, RecordEntry, RecordPlace, SegmentReader, SegmentWriter
from rslp.errors import DataError
from rslp.io import full_disk
from rslp.runtime import preemption
from rslp.runtime.children import pool as pool_of
from rslp.runtime.slow_reads import read_with_notice

CHUNK = 8
_UNREADABLE = (UncacheableWindow, *READ_ERRORS, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class PackJob:
    """What a packing process needs to know.

    Attributes:
        dataset: the dataset's folder.
        store: the store's folder.
        index: its windows.
        inputs: inputs by the key of their records.
        fingerprints: for each of them the windows' fingerprints.
        verify: compare the records that are there with the dataset, instead of making new ones.
        read_timeout: seconds that reading an input of a window may take; None means for ever.
        name: the dataset's key, for messages.
    """

    dataset: UPath
    store: Path
    index: WindowIndex
    inputs: Mapping[str, DataInput]
    fingerprints: Mapping[str, Any] = field(repr=False)
    verify: bool = False
    read_timeout: float | None = None
    name: str = ""

    @property
    def is_local(self) -> bool:
        """Whether the dataset lies on this machine's file system."""
        return isinstance(self.dataset.fs, LocalFileSystem)


@dataclass(frozen=True)
class Packed:
    """What became of some windows.

    Attributes:
        entries: new entries by the key of the input; of a comparison, those of the records that differ.
        windows: how many windows were looked at.
        moving: windows that changed while they were read; they are left for the next time.
    """

    entries: dict[str, list[RecordEntry]]
    windows: int
    moving: int


class EncodedInput(NamedTuple):
    """What is written of an input of a window.

    Attributes:
        payload: the data.
        head: how to read it, or why there is none.
        state: of its entry.
    """

    payload: bytes
    head: bytes
    state: int


Task = tuple[int, tuple[str, ...]]


class Packer:
    """Packs windows in this process.

    Attributes:
        work: what is packed, and where to.
    """

    def __init__(self, work: PackJob) -> None:
        self.work = work
        self._open()
        self._writer = SegmentWriter(work.store)

    def pack(self, tasks: Sequence[Task]) -> Packed:
        """Pack some windows.

        Args:
            tasks: rows of the index, each with the keys of the inputs that are missing.

        Raises:
            DiskError: there is no room.
        """
        entries: dict[str, list[RecordEntry]] = {}
        moving = 0
        for row, keys in tasks:
            window = self.work.index.window(row, self._dataset)
            decoded = {key: self.decode(window, self.work.inputs[key]) for key in keys}
            if None in decoded.values() or not self._still_holds(row, window):
                # What was read may be of either state.
                moving += 1
                continue
            for key, record in decoded.items():
                assert record is not None
                entries.setdefault(key, []).append(self._write(self.record_fingerprint(key, row), record))
        self._writer.flush()
        return Packed(entries, len(tasks), moving)

    def close(self) -> None:
        """Close the segment."""
        self._writer.close()

    def _open(self) -> None:
        self._dataset = upstream.open_dataset(self.work.dataset)
        self._formats: list[GridCheckingFormat] = []
        upstream.wrap_raster_formats(self._dataset, self._note)

    def _note(self, inner: Any) -> GridCheckingFormat:
        self._formats.append(GridCheckingFormat(inner))
        return self._formats[-1]

    def record_fingerprint(self, key: str, row: int) -> tuple[int, int]:
        """What a record of a window depends on."""
        first, second = self.work.fingerprints[key][row].tolist()
        return first, second

    def _still_holds(self, row: int, window: Window) -> bool:
        root = str(window.window_root.path)
        if self.work.is_local:
            return self.work.index.window_is_unchanged(row, root)
        return refresh.window_is_unchanged(self.work.index, row, root, self._dataset.path.fs)

    def decode(self, window: Window, data_input: DataInput) -> EncodedInput | None:
        """What an input of a window holds, or why it can't be packed; None if that may be the network's fault."""
        what = f"{self.work.dataset}: window {window.group}/{window.name}: layer {', '.join(data_input.layers)}"
        try:
            return read_with_notice(self.work.read_timeout, lambda: self._decoded(window, data_input), what=what)
        except DataError:
            # Who trains on it says so. The formats are still in the hands of the read that was left behind.
            self._open()
            return None

    def _decoded(self, window: Window, data_input: DataInput) -> EncodedInput | None:
        for one in self._formats:
            one.on_grid = True
        try:
            if data_input.data_type == "vector":
                groups = records.read_vectors(self._dataset, window, data_input)
                return EncodedInput(*records.encode_vector(groups, window), segments.GOOD)
            rasters = records.read_rasters(self._dataset, window, data_input)
            plain = data_input.resolution_factor.numerator == data_input.resolution_factor.denominator == 1
            crops = plain and all(one.on_grid for one in self._formats)
            return EncodedInput(
                *records.encode_raster(rasters, narrow=self._dtypes(data_input), crops=crops), segments.GOOD
            )
        except _UNREADABLE as error:
            if isinstance(error, OSError) and not self.work.is_local:
                return None
            # Whoever trains on it meets the same error on the direct way, if it is one.
            return EncodedInput(b"", f"{type(error).__name__}: {error}"[:500].encode(), segments.UNFIT)

    def _dtypes(self, data_input: DataInput) -> list[str]:
        layers = {layer_of(option) for option in data_input.layers}
        found = {str(band_set.dtype.value) for name in layers for band_set in self._dataset.layers[name].band_sets}
        return sorted(found) if len(found) == 1 else ["uint8", "uint16"]

    def _write(self, fingerprint: tuple[int, int], record: EncodedInput) -> RecordEntry:
        try:
            return self._writer.add(fingerprint, record.payload, record.head, state=record.state)
        except OSError as error:
            size = len(record.payload) + len(record.head)
            raise full_disk(error, self.work.store / "data", needed=size) or error from error


class Verifier(Packer):
    """Decodes windows anew and compares them with their records."""

    def __init__(self, work: PackJob) -> None:
        super().__init__(work)
        self._reader = SegmentReader(work.store, dataset=work.name)
        self._shelves = {}
        for key in work.inputs:
            entries = self._reader.entries(segments.catalogue(work.store, key).name)
            self._shelves[key] = InputRecords(entries, self._reader.find(entries, work.fingerprints[key]))

    def pack(self, tasks: Sequence[Task]) -> Packed:
        """Compare some windows; the entries are those of what is not as the dataset has it."""
        entries: dict[str, list[RecordEntry]] = {}
        for row, keys in tasks:
            window = self.work.index.window(row, self._dataset)
            for key in keys:
                place = self._shelves[key].place(row)
                if place is None:
                    continue
                now = self.decode(window, self.work.inputs[key])
                if now is not None and self._stored(place) != now:
                    entries.setdefault(key, []).append(RecordEntry(self.record_fingerprint(key, row), *place))
        return Packed(entries, len(tasks), 0)

    def _stored(self, place: RecordPlace) -> EncodedInput | None:
        found = self._reader.read(place)
        return None if found is None else EncodedInput(bytes(found[0]), found[1], segments.GOOD)


def _worker(work: PackJob) -> Packer:
    return Verifier(work) if work.verify else Packer(work)


def pack_all(work: PackJob, tasks: Iterable[Task], *, workers: int) -> Iterator[Packed]:
    """Pack windows; memory does not grow with their number.

    Args:
        work: what is packed, and where to.
        tasks: rows with the inputs that are missing.
        workers: processes; below 2, everything is done in this one.

    Yields:
        What became of each portion, as it is done.

    Raises:
        DiskError: there is no room.
        MachineError: a process of the pool was killed.
    """
    portions = _portions(iter(tasks))
    if workers < 2:
        packer = _worker(work)
        try:
            yield from map(packer.pack, portions)
        finally:
            packer.close()
        return
    # Forked, as the loader's workers are: a fresh interpreter would import torch for seconds before it packs anything.
    # But connections to object stores do not live on in a forked process.
    how: Literal["fork", "spawn"] = "fork" if work.is_local else "spawn"
    with pool_of(workers, how, what=f"packs windows into {work.store}", begin=_begin, argument=work) as pool:
        try:
            running: set[Future[Packed]] = {pool.submit(_pack, one) for one in islice(portions, 3 * workers)}
            while running:
                # any order: records are found by their fingerprints, wherever they lie
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(_pack, one) for one in islice(portions, len(done))}
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            # Whoever asks a whole job to leave may end its processes first.
            preemption.raise_if_preempted()
            raise


def _portions(tasks: Iterator[Task]) -> Iterator[list[Task]]:
    while portion := list(islice(tasks, CHUNK)):
        yield portion


_PACKER: list[Packer] = []


def _begin(work: PackJob) -> None:
    _PACKER[:] = [_worker(work)]


def _pack(tasks: list[Task]) -> Packed:
    return _PACKER[0].pack(tasks)


def default_workers() -> int:
    """Processes to pack with: one per processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
