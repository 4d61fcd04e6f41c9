"""Segments, append-only files of records, and their catalogues: where each record lies, and its checksum.

A record is written whole before its entry is: a reader never finds half of one, and what a killed process leaves behind
is at most bytes that nothing points to. Readers need no lock. A process compares the checksum of a record when it first
reads it. The place of one that differs goes into a list (``*.bad``), which later starts look into, so that it is made
anew. No byte is ever changed that another process may have mapped.
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
_PLACE_STRUCT = struct.Struct("<16xQQQIIQ8x")
GOOD, UNFIT = 0, 1
# Segment, offset, sizes of payload and head, checksum.
RecordPlace = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class RecordEntry:
    """Where a record lies.

    Attributes:
        fingerprint: what the record depends on; the latest entry of a print counts.
        segment: the segment's number.
        offset: where the payload begins in it; the head follows the payload.
        payload: bytes of the payload.
        head: bytes of the head.
        checksum: of payload and head.
        state: ``GOOD``; ``UNFIT``: the window can't be packed, the head is the reason.
    """

    fingerprint: tuple[int, int]
    segment: int
    offset: int
    payload: int
    head: int
    checksum: int
    state: int = GOOD


def append_entries(path: Path, entries: Iterable[RecordEntry]) -> None:
    """Publish records.

    Raises:
        OSError: the disk is full, or can't be written.
    """
    rows = np.array(
        [(e.fingerprint, e.segment, e.offset, e.payload, e.head, e.state, e.checksum, 0) for e in entries], ENTRY_DTYPE
    )
    rows["check"] = _check(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        # What a full disk or a crash left of an entry would shift all that follow.
        if torn := handle.tell() % ENTRY_DTYPE.itemsize:
            handle.truncate(handle.tell() - torn)
        handle.write(rows.tobytes())
        handle.flush()
        os.fsync(handle.fileno())


def read_entries(path: Path) -> Array:
    """All sound entries, oldest first; none if there is no such file.

    Raises:
        OSError: it can't be read.
    """
    return sound_entries(path)[0]


def sound_entries(path: Path) -> tuple[Array, int]:
    """As ``read_entries``, and the number of entries that are damaged."""
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
    """For each fingerprint (``N 2`` words) the number of its latest entry, or -1."""
    if not len(entries) or not len(fingerprints):
        return np.full(len(fingerprints), -1, np.int64)
    # Sorted by the first word alone: two windows that share it would merely not be found.
    order = np.argsort(entries["fingerprint"][:, 0], kind="stable")
    keys = entries["fingerprint"][order, 0]
    at = np.searchsorted(keys, fingerprints[:, 0], side="right") - 1
    found = order[np.maximum(at, 0)]
    return np.where((at >= 0) & (entries["fingerprint"][found] == fingerprints).all(axis=1), found, -1)


@dataclass(frozen=True)
class InputRecords:
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

    def place(self, i: int) -> RecordPlace | None:
        """Where a window's record lies; None if it has none."""
        number = int(self.numbers[i])
        if number < 0:
            return None
        segment, offset, payload, head, state, checksum = _PLACE_STRUCT.unpack_from(
            self._raw, number * ENTRY_DTYPE.itemsize
        )
        return None if state != GOOD else (segment, offset, payload, head, checksum)


def catalogue(folder: Path, key: str) -> Path:
    """The file of an input's entries."""
    return folder / f"records-{key}.cat"


_ALIGN = 64
_SEGMENT_BYTES = 1 << 32
# How much of the maps a process may have looked at before it lets go of the pages, which stay in the machine's cache.
_HELD_BYTES = 256 << 20

log = logging.getLogger(__name__)


def segment_path(folder: Path, segment: int) -> Path:
    """The file of a segment."""
    return folder / "data" / f"{segment:016x}.seg"


class SegmentWriter:
    """Appends records; one per process that packs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segment = 0
        self._handle = -1
        self._at = _SEGMENT_BYTES

    def add(self, fingerprint: tuple[int, int], payload: bytes, head: bytes, *, state: int = GOOD) -> RecordEntry:
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
        checksum = xxhash.xxh3_64(payload)
        checksum.update(head)
        return RecordEntry(fingerprint, self._segment, offset, len(payload), len(head), checksum.intdigest(), state)

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


class SegmentReader:
    """Reads records; one per process and cache, each segment is opened when it is first read.

    Attributes:
        folder: the cache's folder.
        dataset: the dataset's key, for messages.
    """

    def __init__(self, folder: Path, *, dataset: str) -> None:
        self.folder = folder
        self.dataset = dataset
        self._segments: dict[int, _Segment] = {}
        self._touched = 0
        # Segment and offset of records that are damaged, and files that a message was about.
        self._bad: set[tuple[int, int]] = set()
        self._named: set[Path] = set()
        self._list = f"{secrets.token_hex(4)}.bad"

    def __reduce__(self) -> tuple[object, ...]:
        """Another process opens the files itself."""
        return partial(SegmentReader, dataset=self.dataset), (self.folder,)

    def read(self, place: RecordPlace) -> tuple[memoryview, bytes] | None:
        """Payload and head of a record; the payload is a view of the file's map.

        Returns:
            None where it can't be read or is damaged, after one message for each file.
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
            self._say(segment_path(self.folder, number), f"can't be read; its part of the dataset can ({reason})")
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
            for one in self._segments.values():
                one.release_pages()
        return view[offset:middle], bytes(view[middle : middle + head])

    def entries(self, names: str) -> Array:
        """The entries of the catalogues whose names match a pattern; of two for one record, the later one is behind."""
        paths = sorted(self.folder.glob(names), key=lambda path: path.stat().st_mtime_ns)
        found = [self._entries_of(path) for path in paths]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, ENTRY_DTYPE), *found])

    def _entries_of(self, catalogue: Path) -> Array:
        """Those that are damaged are taken out of the file, with a message."""
        try:
            good, bad = sound_entries(catalogue)
        except OSError as error:
            self._say(catalogue, f"can't be read, so what it lists is made anew ({error.strerror})")
            return np.empty(0, ENTRY_DTYPE)
        if bad:
            # Whoever appends to it meanwhile adds to the file of before: that is lost, and made again later.
            with suppress(OSError):
                write_atomic(catalogue, good.tobytes())
            self._say(catalogue, f"is damaged: {bad} of its entries are made anew")
        return good

    def find(self, entries: Array, fingerprints: Array) -> Array:
        """For each fingerprint the number of its latest entry, or -1 where none has a record that can be read."""
        numbers = find_entries(entries, fingerprints)
        if len(entries) and len(numbers):
            numbers[(numbers >= 0) & ~self._are_valid(entries[numbers])] = -1
        return numbers

    def exclude_records(self, entries: Iterable[RecordEntry]) -> None:
        """Note records that are not to be read any more, for this process and all later starts."""
        listed = list(entries)
        self._bad |= {(entry.segment, entry.offset) for entry in listed}
        # Where the cache can't be written, the next start finds them again.
        with suppress(OSError):
            append_entries(self.folder / f"{os.getpid()}-{self._list}", listed)

    def check(self, names: str) -> tuple[int, int]:
        """Compare the checksums of all records in some catalogues; the numbers of records and of damaged ones."""
        entries = self.entries(names)
        latest = entries[np.unique(find_entries(entries, entries["fingerprint"]))]
        places = np.sort(latest[self._are_valid(latest)][["segment", "offset", "payload", "head", "checksum"]])
        bad = len(latest) - len(places) + sum(self.read(place) is None for place in places.tolist())
        return len(latest), bad

    def _are_valid(self, entries: Array) -> Array:
        """Which of some entries have a record that lies in its file and is in no list of damaged ones."""
        sizes = _sizes(self.folder / "data")
        numbers, ends = np.array([*sorted(sizes.items()), (0, 0)], np.uint64).T
        # The last one stands for those that are not there.
        at = np.searchsorted(numbers[:-1], entries["segment"])
        stop = entries["offset"] + entries["payload"] + entries["head"]
        there: Array = (numbers[at] == entries["segment"]) & (stop <= ends[at])
        for number in np.unique(entries["segment"][~there]).tolist():
            self._say(segment_path(self.folder, number), "is missing or shorter than it was; what it held is made anew")
        if bad := self._listed() | self._bad:
            struck = np.array(sorted(bad), np.uint64)
            # A mixture of both words: two places that share it would merely be made anew.
            there &= ~np.isin(_mixed(entries["segment"], entries["offset"]), _mixed(struck[:, 0], struck[:, 1]))
        return there

    def _listed(self) -> set[tuple[int, int]]:
        return set(self.entries("*.bad")[["segment", "offset"]].tolist())

    def _exclude_damaged(self, place: RecordPlace) -> None:
        at = place[:2]
        if at in self._bad:
            return
        # Another process of the run may have met it before.
        if at not in self._listed():
            path = segment_path(self.folder, place[0])
            self._say(path, "is damaged: what differs from its checksum is not used any more, and made anew")
        self.exclude_records([RecordEntry((0, 0), *place)])

    def _say(self, path: Path, what: str) -> None:
        if path not in self._named:
            self._named.add(path)
            log.warning("dataset %r: %s %s", self.dataset, path, what)


def _mixed(segment: Array, offset: Array) -> Array:
    mixed: Array = segment ^ offset * np.uint64(0x9E3779B97F4A7C15)
    return mixed


def _sizes(folder: Path) -> dict[int, int]:
    """Bytes of each segment."""
    with suppress(OSError):
        files = [
            entry
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            if entry.name.endswith(".seg") and entry.is_file()
        ]
        return {int(entry.name.removesuffix(".seg"), 16): entry.stat().st_size for entry in files}
    return {}


class _Segment:
    """A segment's map; ``checked`` has a bit for each 64 bytes: whether the record that begins there was compared."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._view = memoryview(b"")
        self._map: mmap.mmap | None = None
        self.checked = bytearray()

    def view(self, end: int) -> memoryview:
        """The file, at least up to a place."""
        if len(self._view) < end:
            self._map = mapped(self._path)
            self._view = memoryview(self._map)
            if len(self._view) < end:
                raise ValueError("it is shorter than it was")
            self.checked.extend(bytes(len(self._view) // (8 * _ALIGN) + 1 - len(self.checked)))
        return self._view

    def release_pages(self) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
