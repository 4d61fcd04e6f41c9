"""Segments, append-only files of records, and catalogues, files of entries with each record's place and checksum.

A record is written before its entry, so a reader never finds half a record, and a killed process leaves at most bytes
to which no entry points. Readers need no lock. A process compares the checksum of a record when it first reads it. The
place of a damaged record is appended to a list (``*.bad``), which later starts read, so that it is made again. No byte
is ever changed that another process may have mapped.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rslp.data.cache.columns import Array, mapped
from rslp.io import write_atomic

ENTRY_DTYPE = np.dtype(
    [
        ("fingerprint", "<u8", 2),
        ("segment", "<u8"),
        ("offset", "<u8"),
        ("payload", "<u8"),
        ("head", "<u4"),
        ("state", "<u4"),
        ("checksum", "<u8"),
        ("check", "<u8"),
    ]
)
# An entry without its fingerprint and check.
_PLACE_STRUCT = struct.Struct("<16xQQQIIQ8x")
# States of an entry: a record, or an input that can't be packed.
GOOD, UNFIT = 0, 1
# Segment, offset, sizes of payload and head, checksum.
RecordPlace = tuple[int, int, int, int, int]
# Records begin at multiples of this (bytes).
_ALIGN = 64
_SEGMENT_BYTES = 1 << 32
# A process that read this much from the maps releases their pages, which stay in the machine's cache of files.
_HELD_BYTES = 256 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordEntry:
    """One line of a catalogue: the place of a record.

    Attributes:
        fingerprint: fingerprint of the record's content; of several entries with the same, the latest counts.
        segment: number of the segment.
        offset: offset of the payload in the segment (bytes); the head follows the payload.
        payload: size of the payload (bytes).
        head: size of the head (bytes).
        checksum: xxh3 of payload and head.
        state: ``GOOD``, or ``UNFIT`` for an input that can't be packed, with the reason as head.
    """

    fingerprint: tuple[int, int]
    segment: int
    offset: int
    payload: int
    head: int
    checksum: int
    state: int = GOOD


def append_entries(path: Path, entries: Iterable[RecordEntry]) -> None:
    """Append entries to a catalogue, which publishes their records.

    Raises:
        OSError: the disk is full, or can't be written.
    """
    rows = np.array(
        [(e.fingerprint, e.segment, e.offset, e.payload, e.head, e.state, e.checksum, 0) for e in entries], ENTRY_DTYPE
    )
    rows["check"] = _check(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        # Part of an entry, left by a full disk or a crash, would shift all entries that follow.
        if torn := handle.tell() % ENTRY_DTYPE.itemsize:
            handle.truncate(handle.tell() - torn)
        handle.write(rows.tobytes())
        handle.flush()
        os.fsync(handle.fileno())


def read_entries(path: Path) -> tuple[Array, int]:
    """The undamaged entries of a catalogue, oldest first, and the number of damaged ones; none if there is no file.

    Raises:
        OSError: the file can't be read.
    """
    try:
        raw = mapped(path)
    except (FileNotFoundError, ValueError):
        return np.empty(0, ENTRY_DTYPE), 0
    rows = np.frombuffer(raw, ENTRY_DTYPE, len(raw) // ENTRY_DTYPE.itemsize)
    good = rows["check"] == _check(rows)
    return (rows, 0) if good.all() else (rows[good], int((~good).sum()))


def _check(rows: Array) -> Array:
    mixed = np.full(len(rows), 0x9E3779B97F4A7C15, np.uint64)
    for part in (
        rows["fingerprint"][:, 0],
        rows["fingerprint"][:, 1],
        *(rows[name] for name in ("segment", "offset", "payload", "head", "state", "checksum")),
    ):
        mixed = (mixed ^ part.astype(np.uint64)) * np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def find_entries(entries: Array, fingerprints: Array) -> Array:
    """The number of the latest entry of each fingerprint (uint64 ``N 2``), or -1."""
    if not len(entries) or not len(fingerprints):
        return np.full(len(fingerprints), -1, np.int64)
    # Sorted by the first word alone: if two windows share it, the record of one of them is not found.
    order = np.argsort(entries["fingerprint"][:, 0], kind="stable")
    keys = entries["fingerprint"][order, 0]
    position = np.searchsorted(keys, fingerprints[:, 0], side="right") - 1
    numbers = order[np.maximum(position, 0)]
    return np.where((position >= 0) & (entries["fingerprint"][numbers] == fingerprints).all(axis=1), numbers, -1)


@dataclass(frozen=True)
class InputRecords:
    """The places of the records of one input, for some windows; or of a feature cache.

    Attributes:
        entries: all entries of the input, of ``ENTRY_DTYPE``, mapped from the file.
        numbers: for each window the number of its entry, or -1.
    """

    entries: Array
    numbers: Array

    @cached_property
    def _raw(self) -> Any:
        # Unpacking from plain bytes is many times faster than from a structured array.
        return self.entries.view(np.uint8)

    def place(self, i: int) -> RecordPlace | None:
        """The place of a window's record; None if it has none."""
        number = int(self.numbers[i])
        if number < 0:
            return None
        segment, offset, payload, head, state, checksum = _PLACE_STRUCT.unpack_from(
            self._raw, number * ENTRY_DTYPE.itemsize
        )
        return None if state != GOOD else (segment, offset, payload, head, checksum)


def catalogue(key: str) -> str:
    """The name of the catalogue of an input."""
    return f"records-{key}.cat"


def segment_path(folder: Path, segment: int) -> Path:
    """The file of a segment."""
    return folder / "data" / f"{segment:016x}.seg"


class SegmentWriter:
    """Appends records to segments of its own; each writing process has one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segment = 0
        self._handle = -1
        self._end = _SEGMENT_BYTES

    def add(self, fingerprint: tuple[int, int], payload: bytes, head: bytes, *, state: int = GOOD) -> RecordEntry:
        """Append one record.

        Raises:
            OSError: the disk is full, or can't be written.
        """
        if self._end >= _SEGMENT_BYTES:
            self._begin_segment()
        offset = self._end
        parts = [payload, head, bytes(-(len(payload) + len(head)) % _ALIGN)]
        written = os.writev(self._handle, parts)
        self._end += written
        remaining = memoryview(b"") if written == sum(map(len, parts)) else memoryview(b"".join(parts))[written:]
        while remaining:
            written = os.write(self._handle, remaining)
            self._end += written
            remaining = remaining[written:]
        checksum = xxhash.xxh3_64(payload)
        checksum.update(head)
        return RecordEntry(fingerprint, self._segment, offset, len(payload), len(head), checksum.intdigest(), state)

    def flush(self) -> None:
        """Sync the segment, so that the records survive a crash of the machine."""
        if self._handle >= 0:
            os.fsync(self._handle)

    def close(self) -> None:
        """Close the segment."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle, self._end = -1, _SEGMENT_BYTES

    def _begin_segment(self) -> None:
        self.flush()
        self.close()
        self._segment = secrets.randbits(64)
        path = segment_path(self._folder, self._segment)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._end = 0


class SegmentReader:
    """Reads the records of one cache; a segment is mapped when it is first read.

    Attributes:
        folder: the cache's folder.
        dataset: the dataset's key, for messages.
    """

    def __init__(self, folder: Path, *, dataset: str) -> None:
        self.folder = folder
        self.dataset = dataset
        self._segments: dict[int, _Segment] = {}
        self._touched = 0
        # Segment and offset of damaged records, and files about which there was a warning.
        self._bad: set[tuple[int, int]] = set()
        self._reported: set[Path] = set()
        self._bad_list = f"{secrets.token_hex(4)}.bad"

    def __reduce__(self) -> tuple[object, ...]:
        """Another process opens the files itself."""
        return partial(SegmentReader, dataset=self.dataset), (self.folder,)

    def read(self, place: RecordPlace) -> tuple[memoryview, bytes] | None:
        """Payload and head of a record; the payload is a view of the file's map.

        Returns:
            None where the record can't be read or is damaged, after one warning for each file.
        """
        number, offset, payload, head, checksum = place
        middle = offset + payload
        try:
            segment = self._segments.get(number)
            if segment is None:
                segment = self._segments[number] = _Segment(segment_path(self.folder, number))
            view = segment.view(middle + head)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            message = f"can't be read ({reason}); the dataset's own files are read instead"
            self._warn(segment_path(self.folder, number), message)
            return None
        # One bit for each place where a record may begin.
        if not segment.checked[offset >> 9] >> (offset >> 6 & 7) & 1:
            if xxhash.xxh3_64_intdigest(view[offset : middle + head]) != checksum:
                self._exclude_damaged(place)
                return None
            segment.checked[offset >> 9] |= 1 << (offset >> 6 & 7)
        self._touched += payload
        if self._touched > _HELD_BYTES:
            self._touched = payload
            for mapped_segment in self._segments.values():
                mapped_segment.release_pages()
        return view[offset:middle], bytes(view[middle : middle + head])

    def entries(self, names: str) -> Array:
        """The entries of the catalogues whose names match a pattern, the oldest catalogue first."""
        paths = sorted(self.folder.glob(names), key=lambda path: path.stat().st_mtime_ns)
        parts = [self._entries_of(path) for path in paths]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, ENTRY_DTYPE), *parts])

    def _entries_of(self, catalogue: Path) -> Array:
        """The undamaged entries of a catalogue; damaged ones are removed from the file, with a warning."""
        try:
            good, bad = read_entries(catalogue)
        except OSError as error:
            self._warn(catalogue, f"can't be read, so the records that it lists are made again ({error.strerror})")
            return np.empty(0, ENTRY_DTYPE)
        if bad:
            # Entries that another process appends meanwhile go to the old file: they are lost, and made again later.
            with suppress(OSError):
                write_atomic(catalogue, good.tobytes())
            self._warn(catalogue, f"is damaged: {bad} of its entries are made again")
        return good

    def find(self, entries: Array, fingerprints: Array) -> Array:
        """The number of the latest entry of each fingerprint; -1 if it has none, or its record can't be read."""
        numbers = find_entries(entries, fingerprints)
        if len(entries) and len(numbers):
            numbers[(numbers >= 0) & ~self._are_valid(entries[numbers])] = -1
        return numbers

    def records(self, names: str, fingerprints: Array) -> InputRecords:
        """The places of the records with these fingerprints, from the catalogues whose names match a pattern."""
        entries = self.entries(names)
        return InputRecords(entries, self.find(entries, fingerprints).astype(np.int32))

    def exclude_records(self, entries: Iterable[RecordEntry]) -> None:
        """Exclude records from reading, in this process and in all that start later."""
        listed = list(entries)
        self._bad |= {(entry.segment, entry.offset) for entry in listed}
        # If the cache can't be written, the next start finds them again.
        with suppress(OSError):
            append_entries(self.folder / f"{os.getpid()}-{self._bad_list}", listed)

    def check(self, names: str) -> tuple[int, int]:
        """Compare the checksums of all records of some catalogues; returns how many there are, and how many damaged."""
        entries = self.entries(names)
        latest = entries[np.unique(find_entries(entries, entries["fingerprint"]))]
        places = np.sort(latest[self._are_valid(latest)][["segment", "offset", "payload", "head", "checksum"]])
        bad = len(latest) - len(places) + sum(self.read(place) is None for place in places.tolist())
        return len(latest), bad

    def _are_valid(self, entries: Array) -> Array:
        """Which entries have a record that lies within its segment and is not excluded, bool ``N``."""
        sizes = _sizes(self.folder / "data")
        # The last element stands for missing segments.
        numbers, ends = np.array([*sorted(sizes.items()), (0, 0)], np.uint64).T
        position = np.searchsorted(numbers[:-1], entries["segment"])
        stop = entries["offset"] + entries["payload"] + entries["head"]
        valid: Array = (numbers[position] == entries["segment"]) & (stop <= ends[position])
        for number in np.unique(entries["segment"][~valid]).tolist():
            path = segment_path(self.folder, number)
            self._warn(path, "is missing or shorter than it was; its records are made again")
        if bad := self._listed_bad() | self._bad:
            excluded = np.array(sorted(bad), np.uint64)
            # Segment and offset mixed into one word: if two places share it, a good record is made again.
            valid &= ~np.isin(_mixed(entries["segment"], entries["offset"]), _mixed(excluded[:, 0], excluded[:, 1]))
        return valid

    def _listed_bad(self) -> set[tuple[int, int]]:
        return set(self.entries("*.bad")[["segment", "offset"]].tolist())

    def _exclude_damaged(self, place: RecordPlace) -> None:
        if place[:2] in self._bad:
            return
        # Another process of the run may have reported it.
        if place[:2] not in self._listed_bad():
            path = segment_path(self.folder, place[0])
            self._warn(path, "is damaged: records that differ from their checksum are made again")
        self.exclude_records([RecordEntry((0, 0), *place)])

    def _warn(self, path: Path, message: str) -> None:
        if path not in self._reported:
            self._reported.add(path)
            log.warning("dataset %r: %s %s", self.dataset, path, message)


def _mixed(segment: Array, offset: Array) -> Array:
    mixed: Array = segment ^ offset * np.uint64(0x9E3779B97F4A7C15)
    return mixed


def _sizes(folder: Path) -> dict[int, int]:
    """The size of each segment (bytes) by its number."""
    with suppress(OSError):
        files = [
            entry
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            if entry.name.endswith(".seg") and entry.is_file()
        ]
        return {int(entry.name.removesuffix(".seg"), 16): entry.stat().st_size for entry in files}
    return {}


class _Segment:
    """A mapped segment; ``checked`` has a bit for each 64 bytes: whether the record that begins there was checked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._view = memoryview(b"")
        self._map: mmap.mmap | None = None
        self.checked = bytearray()

    def view(self, end: int) -> memoryview:
        """The mapped file, at least up to byte ``end``.

        Raises:
            OSError: the file can't be read.
            ValueError: the file is empty, or shorter than ``end``.
        """
        if len(self._view) < end:
            self._map = mapped(self._path)
            self._view = memoryview(self._map)
            if len(self._view) < end:
                raise ValueError("it is shorter than it was")
            self.checked.extend(bytes(len(self._view) // (8 * _ALIGN) + 1 - len(self.checked)))
        return self._view

    def release_pages(self) -> None:
        """Give the memory of the mapped pages back to the system; the next read maps them anew."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
