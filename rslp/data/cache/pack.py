"""Pack windows: decode their inputs in several processes, each of which writes records into its own segment."""

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
from rslp.data.cache.index import WindowIndex
from rslp.data.cache.records import GridCheckingFormat, UncacheableWindow
from rslp.data.cache.segments import InputRecords, RecordEntry, SegmentReader, SegmentWriter
from rslp.data.cache.window_state import layer_of
from rslp.errors import DataError
from rslp.io import full_disk
from rslp.runtime import preemption
from rslp.runtime.children import pool as pool_of
from rslp.runtime.slow_reads import read_with_notice

CHUNK = 8
_UNREADABLE = (UncacheableWindow, *READ_ERRORS, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class PackJob:
    """Where a packing process reads from and writes to.

    Attributes:
        dataset: the dataset's folder.
        folder: the folder of the sample cache.
        index: the dataset's windows.
        inputs: inputs by key, see ``input_key``.
        fingerprints: for each key the fingerprints of all windows, uint64 ``N 2``.
        verify: compare existing records with the dataset instead of making new ones.
        read_timeout: seconds after which reading an input of a window is given up; None waits for ever.
        name: the dataset's key in the run config, for messages.
    """

    dataset: UPath
    folder: Path
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
    """The result of some tasks.

    Attributes:
        entries: entries of new records by the key of the input; with ``verify`` those of records that differ.
        windows: number of windows that were worked on.
    """

    entries: dict[str, list[RecordEntry]]
    windows: int


class EncodedInput(NamedTuple):
    """One input of one window as a record.

    Attributes:
        payload: the data.
        head: how to decode the payload, or the reason why the input can't be packed.
        state: ``GOOD`` or ``UNFIT``.
    """

    payload: bytes
    head: bytes
    state: int


# A row of the index, and the keys of its inputs that have no record.
Task = tuple[int, tuple[str, ...]]


class Packer:
    """Packs windows in this process, or compares them with their records.

    Attributes:
        job: where to read from and write to.
    """

    def __init__(self, job: PackJob) -> None:
        self.job = job
        self._open()
        self._writer = SegmentWriter(job.folder)
        self._reader = SegmentReader(job.folder, dataset=job.name)
        self._records: dict[str, InputRecords] = {}
        if job.verify:
            self._records = {k: self._reader.records(segments.catalogue(k), f) for k, f in job.fingerprints.items()}

    def pack(self, tasks: Sequence[Task]) -> Packed:
        """Pack some windows; with ``verify``, find records that differ.

        Raises:
            DiskError: there is no room.
        """
        entries: dict[str, list[RecordEntry]] = {}
        for row, keys in tasks:
            window = self.job.index.window(row, self._dataset)
            work = self._differing(row, keys, window) if self.job.verify else self._new_records(row, keys, window)
            for key, entry in work:
                entries.setdefault(key, []).append(entry)
        self._writer.flush()
        return Packed(entries, len(tasks))

    def _new_records(self, row: int, keys: Sequence[str], window: Window) -> Iterator[tuple[str, RecordEntry]]:
        decoded = {key: self.decode(window, self.job.inputs[key]) for key in keys}
        # If one could not be read, or the window changed meanwhile, the window stays for next time: its records may mix
        # files from before and after a change.
        if None not in decoded.values() and self._is_unchanged(row, window):
            for key, record in decoded.items():
                assert record is not None
                yield key, self._write(self._fingerprint(key, row), record)

    def _differing(self, row: int, keys: Sequence[str], window: Window) -> Iterator[tuple[str, RecordEntry]]:
        for key in keys:
            place = self._records[key].place(row)
            decoded = None if place is None else self.decode(window, self.job.inputs[key])
            if place is not None and decoded is not None:
                record = self._reader.read(place)
                if record is None or (bytes(record[0]), record[1], segments.GOOD) != decoded:
                    yield key, RecordEntry(self._fingerprint(key, row), *place)

    def close(self) -> None:
        """Close the segment."""
        self._writer.close()

    def _open(self) -> None:
        self._dataset = upstream.open_dataset(self.job.dataset)
        self._formats: list[GridCheckingFormat] = []
        upstream.wrap_raster_formats(self._dataset, self._wrap)

    def _wrap(self, inner: Any) -> GridCheckingFormat:
        self._formats.append(GridCheckingFormat(inner))
        return self._formats[-1]

    def _fingerprint(self, key: str, row: int) -> tuple[int, int]:
        first, second = self.job.fingerprints[key][row].tolist()
        return first, second

    def _is_unchanged(self, row: int, window: Window) -> bool:
        root = str(window.window_root.path)
        if self.job.is_local:
            return self.job.index.window_is_unchanged(row, root)
        return refresh.window_is_unchanged(self.job.index, row, root, self._dataset.path.fs)

    def decode(self, window: Window, data_input: DataInput) -> EncodedInput | None:
        """Read and encode an input of a window; None where a later try may succeed (a timeout, the network)."""
        subject = f"{self.job.dataset}: window {window.group}/{window.name}: layer {', '.join(data_input.layers)}"
        try:
            return read_with_notice(self.job.read_timeout, lambda: self._encode(window, data_input), what=subject)
        except DataError:
            # Training reports the timeout. The read that was given up still uses the formats, so open new ones.
            self._open()
            return None

    def _encode(self, window: Window, data_input: DataInput) -> EncodedInput | None:
        for raster_format in self._formats:
            raster_format.on_grid = True
        try:
            if data_input.data_type == "vector":
                groups = records.read_vectors(self._dataset, window, data_input)
                return EncodedInput(*records.encode_vector(groups, window), segments.GOOD)
            rasters = records.read_rasters(self._dataset, window, data_input)
            plain = data_input.resolution_factor.numerator == data_input.resolution_factor.denominator == 1
            crops = plain and all(raster_format.on_grid for raster_format in self._formats)
            return EncodedInput(
                *records.encode_raster(rasters, narrow=self._dtypes(data_input), crops=crops), segments.GOOD
            )
        except _UNREADABLE as error:
            if isinstance(error, OSError) and not self.job.is_local:
                return None
            # If this is an error of the data, training meets it when it reads the dataset itself.
            return EncodedInput(b"", f"{type(error).__name__}: {error}"[:500].encode(), segments.UNFIT)

    def _dtypes(self, data_input: DataInput) -> list[str]:
        layers = {layer_of(option) for option in data_input.layers}
        dtypes = {str(band_set.dtype.value) for name in layers for band_set in self._dataset.layers[name].band_sets}
        return sorted(dtypes) if len(dtypes) == 1 else ["uint8", "uint16"]

    def _write(self, fingerprint: tuple[int, int], record: EncodedInput) -> RecordEntry:
        try:
            return self._writer.add(fingerprint, record.payload, record.head, state=record.state)
        except OSError as error:
            size = len(record.payload) + len(record.head)
            raise full_disk(error, self.job.folder / "data", needed=size) or error from error


def pack_all(job: PackJob, tasks: Iterable[Task], *, workers: int) -> Iterator[Packed]:
    """Pack windows, or verify their records; memory does not grow with their number.

    Args:
        job: where to read from and write to.
        tasks: rows of the index with keys of inputs.
        workers: number of processes; below 2, everything is done in this one.

    Yields:
        The result of each portion of the tasks, as it is done.

    Raises:
        DiskError: there is no room.
        MachineError: a process of the pool was killed.
    """
    portions = _portions(iter(tasks))
    if workers < 2:
        packer = Packer(job)
        try:
            yield from map(packer.pack, portions)
        finally:
            packer.close()
        return
    # Forked, as the loader's workers are: a new interpreter would import torch for seconds before it packs anything.
    # But connections to object stores do not survive a fork.
    method: Literal["fork", "spawn"] = "fork" if job.is_local else "spawn"
    with pool_of(workers, method, what=f"packs windows into {job.folder}", begin=_begin, argument=job) as pool:
        try:
            running: set[Future[Packed]] = {pool.submit(_pack, portion) for portion in islice(portions, 3 * workers)}
            while running:
                # any order: records are looked up by their fingerprints
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(_pack, portion) for portion in islice(portions, len(done))}
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            # A scheduler that stops a job may end the pool's processes before this one gets its signal.
            preemption.raise_if_preempted()
            raise


def _portions(tasks: Iterator[Task]) -> Iterator[list[Task]]:
    while portion := list(islice(tasks, CHUNK)):
        yield portion


# The packer of a process of the pool.
_PACKER: list[Packer] = []


def _begin(job: PackJob) -> None:
    _PACKER[:] = [Packer(job)]


def _pack(tasks: list[Task]) -> Packed:
    return _PACKER[0].pack(tasks)


def default_workers() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
