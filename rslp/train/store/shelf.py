"""The shelf: records in append-only segment files, and for each kind of input a list of where they lie.

A record is written whole before its entry is: a reader never finds half of one, and what a killed process leaves behind
is at most bytes that nothing points to. Only the holder of the store's lock writes; readers need no lock.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rslp.train.store.columns import Array

ENTRY = np.dtype(
    [
        ("print", "<u8", 2),
        ("segment", "<u8"),
        ("offset", "<u8"),
        ("payload", "<u8"),
        ("head", "<u4"),
        ("state", "<u4"),
        ("check", "<u8"),
    ]
)
_PLACE = struct.Struct("<16xQQQII8x")
_ALIGN = 64
GOOD, UNFIT, STRUCK = 0, 1, 2
_SEGMENT_BYTES = 1 << 32
# How much of the maps a process may have looked at before it lets go of the pages, which stay in the machine's cache.
_HELD_BYTES = 256 << 20


def segment_path(folder: Path, segment: int) -> Path:
    """The file of a segment."""
    return folder / "data" / f"{segment:016x}.seg"


@dataclass(frozen=True)
class Entry:
    """Where a record lies.

    Attributes:
        print: what the record depends on; the latest entry of a print counts.
        segment: the segment's number.
        offset: where the payload begins in it; the head follows the payload.
        payload: bytes of the payload.
        head: bytes of the head.
        state: ``GOOD``; ``UNFIT``: the window can't be packed, the head is the reason; ``STRUCK``: it was found wrong.
    """

    print: tuple[int, int]
    segment: int
    offset: int
    payload: int
    head: int
    state: int = GOOD


class SegmentWriter:
    """Appends records; one per process that packs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segment = 0
        self._handle = -1
        self._at = _SEGMENT_BYTES

    def add(self, print_: tuple[int, int], payload: bytes, head: bytes, *, state: int = GOOD) -> Entry:
        """Append one record.

        Raises:
            OSError: the disk is full, or can't be written.
        """
        if self._at >= _SEGMENT_BYTES:
            self._begin()
        offset = self._at
        parts = [payload, head, bytes(-(len(payload) + len(head)) % _ALIGN)]
        written = os.writev(self._handle, parts)
        self._at += written
        rest = memoryview(b"") if written == sum(map(len, parts)) else memoryview(b"".join(parts))[written:]
        while rest:
            written = os.write(self._handle, rest)
            self._at += written
            rest = rest[written:]
        return Entry(print_, self._segment, offset, len(payload), len(head), state)

    def flush(self) -> None:
        """Make sure that the records survive the machine."""
        if self._handle >= 0:
            os.fsync(self._handle)

    def close(self) -> None:
        """Close the segment."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle, self._at = -1, _SEGMENT_BYTES

    def _begin(self) -> None:
        self.flush()
        self.close()
        self._segment = secrets.randbits(64)
        path = segment_path(self._folder, self._segment)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._at = 0


def append_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Publish records.

    Raises:
        OSError: the disk is full, or can't be written.
    """
    rows = np.array([(e.print, e.segment, e.offset, e.payload, e.head, e.state, 0) for e in entries], ENTRY)
    rows["check"] = _check(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        # What a full disk or a crash left of an entry would shift all that follow.
        if torn := handle.tell() % ENTRY.itemsize:
            handle.truncate(handle.tell() - torn)
        handle.write(rows.tobytes())
        handle.flush()
        os.fsync(handle.fileno())


def read_entries(path: Path) -> Array:
    """All whole entries, oldest first; none if there is no such file."""
    if not path.exists():
        return np.empty(0, ENTRY)
    count = path.stat().st_size // ENTRY.itemsize
    rows = np.memmap(path, ENTRY, "r", shape=(count,)).view(np.ndarray) if count else np.empty(0, ENTRY)
    good = rows["check"] == _check(rows)
    return rows if good.all() else rows[good]


def _check(rows: Array) -> Array:
    mixed = np.full(len(rows), 0x9E3779B97F4A7C15, np.uint64)
    for part in (
        rows["print"][:, 0],
        rows["print"][:, 1],
        *(rows[name] for name in ("segment", "offset", "payload", "head", "state")),
    ):
        mixed = (mixed ^ part.astype(np.uint64)) * np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def find(entries: Array, prints: Array) -> Array:
    """For each fingerprint (``N 2`` words) the number of its latest entry, or -1."""
    if not len(entries) or not len(prints):
        return np.full(len(prints), -1, np.int64)
    # Sorted by the first word alone: two windows that share it would merely not be found.
    order = np.argsort(entries["print"][:, 0], kind="stable")
    keys = entries["print"][order, 0]
    at = np.searchsorted(keys, prints[:, 0], side="right") - 1
    found = order[np.maximum(at, 0)]
    return np.where((at >= 0) & (entries["print"][found] == prints).all(axis=1), found, -1)


@dataclass(frozen=True)
class Shelf:
    """The records of one input, for some windows.

    Attributes:
        entries: all entries of the input, mapped from the file.
        numbers: for each window the number of its entry, or -1.
    """

    entries: Array
    numbers: Array

    @cached_property
    def _raw(self) -> Any:
        # Unpacking from plain bytes is many times faster than from a structured array.
        return self.entries.view(np.uint8)

    def place(self, i: int) -> tuple[int, int, int, int] | None:
        """Segment, offset, and the sizes of payload and head of a window's record; None if it has none."""
        number = int(self.numbers[i])
        if number < 0:
            return None
        segment, offset, payload, head, state = _PLACE.unpack_from(self._raw, number * ENTRY.itemsize)
        return None if state != GOOD else (segment, offset, payload, head)


def catalogue(folder: Path, key: str) -> Path:
    """The file of an input's entries."""
    return folder / f"records-{key}.cat"


def shelf(folder: Path, key: str, prints: Array) -> Shelf:
    """The records of an input for windows with these fingerprints (``N 2`` words)."""
    entries = read_entries(catalogue(folder, key))
    return Shelf(entries, find(entries, prints).astype(np.int32))


class SegmentReader:
    """Opens segments; one per process, each segment when it is first read.

    Attributes:
        folder: the store's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._segments: dict[int, _Segment] = {}
        self._touched = 0

    def __reduce__(self) -> tuple[type[SegmentReader], tuple[Path]]:
        """Another process opens the files itself."""
        return SegmentReader, (self.folder,)

    def read(self, place: tuple[int, int, int, int]) -> tuple[memoryview, bytes]:
        """Payload and head of a record; the payload is a view of the file's map.

        Args:
            place: segment, offset, and the sizes of payload and head.

        Raises:
            OSError: the segment is gone.
            ValueError: it is shorter than its place says.
        """
        number, offset, payload, head = place
        segment = self._segments.get(number)
        if segment is None:
            segment = self._segments[number] = _Segment(segment_path(self.folder, number))
        middle = offset + payload
        view = segment.mapped(middle + head)
        self._touched += payload
        if self._touched > _HELD_BYTES:
            self._touched = payload
            for one in self._segments.values():
                one.let_go()
        return view[offset:middle], bytes(view[middle : middle + head])


class _Segment:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._view = memoryview(b"")
        self._map: mmap.mmap | None = None

    def mapped(self, end: int) -> memoryview:
        """The file, at least up to a place."""
        if len(self._view) < end:
            with self._path.open("rb") as handle:
                # Refuses an empty file.
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self._view = memoryview(self._map)
            if len(self._view) < end:
                raise ValueError(f"{self._path} is shorter than it should be")
        return self._view

    def let_go(self) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
