"""Segments: append-only files of records, written by one process each, read through memory maps and checked.

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
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from rslp.files import write_atomic
from rslp.train.store import shelf
from rslp.train.store.columns import Array, mapped
from rslp.train.store.shelf import ENTRY, GOOD, Entry, Place, append_entries, sound_entries

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
        checksum = xxhash.xxh3_64(payload)
        checksum.update(head)
        return Entry(print_, self._segment, offset, len(payload), len(head), checksum.intdigest(), state)

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

    def read(self, place: Place) -> tuple[memoryview, bytes] | None:
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
                self._found_bad(place)
                return None
            segment.checked[offset >> 9] |= 1 << (offset >> 6 & 7)
        self._touched += payload
        if self._touched > _HELD_BYTES:
            self._touched = payload
            for one in self._segments.values():
                one.let_go()
        return view[offset:middle], bytes(view[middle : middle + head])

    def entries(self, names: str) -> Array:
        """The entries of the catalogues whose names match a pattern; of two for one record, the later one is behind."""
        paths = sorted(self.folder.glob(names), key=lambda path: path.stat().st_mtime_ns)
        found = [self._entries_of(path) for path in paths]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, ENTRY), *found])

    def _entries_of(self, catalogue: Path) -> Array:
        """Those that are damaged are taken out of the file, with a message."""
        try:
            good, bad = sound_entries(catalogue)
        except OSError as error:
            self._say(catalogue, f"can't be read, so what it lists is made anew ({error.strerror})")
            return np.empty(0, ENTRY)
        if bad:
            # Whoever appends to it meanwhile adds to the file of before: that is lost, and made again later.
            with suppress(OSError):
                write_atomic(catalogue, good.tobytes())
            self._say(catalogue, f"is damaged: {bad} of its entries are made anew")
        return good

    def find(self, entries: Array, prints: Array) -> Array:
        """For each fingerprint the number of its latest entry, or -1 where none has a record that can be read."""
        numbers = shelf.find(entries, prints)
        if len(entries) and len(numbers):
            numbers[(numbers >= 0) & ~self._sound(entries[numbers])] = -1
        return numbers

    def strike(self, entries: Iterable[Entry]) -> None:
        """Note records that are not to be read any more, for this process and all later starts."""
        listed = list(entries)
        self._bad |= {(entry.segment, entry.offset) for entry in listed}
        # Where the cache can't be written, the next start finds them again.
        with suppress(OSError):
            append_entries(self.folder / f"{os.getpid()}-{self._list}", listed)

    def check(self, names: str) -> tuple[int, int]:
        """Compare the checksums of all records in some catalogues; the numbers of records and of damaged ones."""
        entries = self.entries(names)
        latest = entries[np.unique(shelf.find(entries, entries["print"]))]
        places = np.sort(latest[self._sound(latest)][["segment", "offset", "payload", "head", "checksum"]])
        bad = len(latest) - len(places) + sum(self.read(place) is None for place in places.tolist())
        return len(latest), bad

    def _sound(self, entries: Array) -> Array:
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

    def _found_bad(self, place: Place) -> None:
        at = place[:2]
        if at in self._bad:
            return
        # Another process of the run may have met it before.
        if at not in self._listed():
            path = segment_path(self.folder, place[0])
            self._say(path, "is damaged: what differs from its checksum is not used any more, and made anew")
        self.strike([Entry((0, 0), *place)])

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

    def let_go(self) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
