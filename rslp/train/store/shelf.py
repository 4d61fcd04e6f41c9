"""Catalogues: for each kind of input a list of where its records lie in the segment files, and of their checksums."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rslp.train.store.columns import Array, mapped

ENTRY = np.dtype(
    [
        ("print", "<u8", 2),
        ("segment", "<u8"),
        ("offset", "<u8"),
        ("payload", "<u8"),
        ("head", "<u4"),
        ("state", "<u4"),
        ("checksum", "<u8"),
        ("check", "<u8"),
    ]
)
_PLACE = struct.Struct("<16xQQQIIQ8x")
GOOD, UNFIT = 0, 1
# Segment, offset, sizes of payload and head, checksum.
Place = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Entry:
    """Where a record lies.

    Attributes:
        print: what the record depends on; the latest entry of a print counts.
        segment: the segment's number.
        offset: where the payload begins in it; the head follows the payload.
        payload: bytes of the payload.
        head: bytes of the head.
        checksum: of payload and head.
        state: ``GOOD``; ``UNFIT``: the window can't be packed, the head is the reason.
    """

    print: tuple[int, int]
    segment: int
    offset: int
    payload: int
    head: int
    checksum: int
    state: int = GOOD


def append_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Publish records.

    Raises:
        OSError: the disk is full, or can't be written.
    """
    rows = np.array([(e.print, e.segment, e.offset, e.payload, e.head, e.state, e.checksum, 0) for e in entries], ENTRY)
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
        return np.empty(0, ENTRY), 0
    rows = np.frombuffer(raw, ENTRY, len(raw) // ENTRY.itemsize)
    good = rows["check"] == _check(rows)
    return (rows, 0) if good.all() else (rows[good], int((~good).sum()))


def _check(rows: Array) -> Array:
    mixed = np.full(len(rows), 0x9E3779B97F4A7C15, np.uint64)
    for part in (
        rows["print"][:, 0],
        rows["print"][:, 1],
        *(rows[name] for name in ("segment", "offset", "payload", "head", "state", "checksum")),
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

    def place(self, i: int) -> Place | None:
        """Where a window's record lies; None if it has none."""
        number = int(self.numbers[i])
        if number < 0:
            return None
        segment, offset, payload, head, state, checksum = _PLACE.unpack_from(self._raw, number * ENTRY.itemsize)
        return None if state != GOOD else (segment, offset, payload, head, checksum)


def catalogue(folder: Path, key: str) -> Path:
    """The file of an input's entries."""
    return folder / f"records-{key}.cat"
