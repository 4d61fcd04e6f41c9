"""Files of named columns: memory-mapped arrays with a checksum, and texts as numbers of distinct texts."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rslp.io import write_atomic

Array = np.ndarray[Any, np.dtype[Any]]
_MAGIC = b"rslpcol2"
_ALIGN = 64


@dataclass(frozen=True)
class Columns:
    """Arrays by name, read-only views of one file.

    Attributes:
        meta: what was written with them.
        arrays: the arrays.
    """

    meta: Mapping[str, Any]
    arrays: Mapping[str, Array]


def write_columns(path: Path, arrays: Mapping[str, Array], *, meta: Mapping[str, Any]) -> None:
    """Write a file that a reader sees whole or not at all.

    Args:
        path: the file.
        arrays: arrays of any plain dtype.
        meta: JSON values to keep with them.
    """
    places: dict[str, Any] = {}
    parts: list[bytes] = []
    at = 0
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        places[name] = [array.dtype.str, list(array.shape), at]
        padding = -len(raw) % _ALIGN
        parts += [raw, bytes(padding)]
        at += len(raw) + padding
    head = json.dumps({"meta": meta, "arrays": places}).encode()
    # Before it, the checksum and its length.
    head += b" " * (-(len(_MAGIC) + 16 + len(head)) % _ALIGN)
    parts = [len(head).to_bytes(8, "little"), head, *parts]
    checksum = xxhash.xxh3_64()
    for part in parts:
        checksum.update(part)
    write_atomic(path, b"".join([_MAGIC, checksum.intdigest().to_bytes(8, "little"), *parts]))


def mapped(path: Path) -> mmap.mmap:
    """Map a file into memory.

    Raises:
        OSError: it can't be read, or is no file.
        ValueError: it is empty.
    """
    with path.open("rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def read_columns(path: Path) -> Columns:
    """Open a file of ``write_columns``.

    Raises:
        OSError: it can't be read.
        ValueError: it is of another format, or damaged.
    """
    raw = mapped(path)
    if raw[: len(_MAGIC)] != _MAGIC:
        raise ValueError("it is of another format")
    middle = len(_MAGIC) + 8
    if raw[len(_MAGIC) : middle] != xxhash.xxh3_64_intdigest(memoryview(raw)[middle:]).to_bytes(8, "little"):
        raise ValueError("it is damaged")
    # What was compared stays in the machine's cache of files, not in this process.
    raw.madvise(mmap.MADV_DONTNEED)
    start = middle + 8 + int.from_bytes(raw[middle : middle + 8], "little")
    head = json.loads(raw[middle + 8 : start])
    arrays: dict[str, Array] = {}
    for name, (dtype, shape, at) in head["arrays"].items():
        count = int(np.prod(shape, dtype=np.int64))
        # frombuffer refuses an empty tail.
        flat = np.frombuffer(raw, np.dtype(dtype), count, start + at) if count else np.empty(0, np.dtype(dtype))
        arrays[name] = flat.reshape(shape)
    return Columns(head["meta"], arrays)


# Texts of a column that a process keeps decoded.
_REMEMBERED = 1024


@dataclass(frozen=True)
class Texts:
    """Distinct texts end to end in one array of bytes; nothing is decoded before it is asked for.

    Attributes:
        ends: where each text ends in ``raw``.
        raw: the texts in UTF-8.
        codes: for each row the number of its text.
    """

    ends: Array
    raw: Array
    codes: Array
    _known: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, rows: Iterable[str]) -> Texts:
        """Number the texts of some rows in the order they appear."""
        numbers: dict[str, int] = {}
        codes = np.fromiter((numbers.setdefault(text, len(numbers)) for text in rows), np.uint32)
        encoded = [text.encode() for text in numbers]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(ends, np.frombuffer(b"".join(encoded), np.uint8), codes)

    @classmethod
    def read(cls, name: str, arrays: Mapping[str, Array]) -> Texts:
        """What ``arrays`` of the same name wrote."""
        return cls(arrays[f"{name}/ends"], arrays[f"{name}/raw"], arrays[f"{name}/codes"])

    def arrays(self, name: str) -> dict[str, Array]:
        """The arrays to write under a name."""
        return {f"{name}/ends": self.ends, f"{name}/raw": self.raw, f"{name}/codes": self.codes}

    def __getitem__(self, row: int) -> str:
        """The text of a row."""
        return self.distinct(int(self.codes[row]))

    def distinct(self, code: int) -> str:
        """The text of a number."""
        text = self._known.get(code)
        if text is None:
            start = int(self.ends[code - 1]) if code else 0
            text = self.raw[start : int(self.ends[code])].tobytes().decode()
            if len(self._known) < _REMEMBERED:
                self._known[code] = text
        return text

    def all(self) -> list[str]:
        """Every distinct text, by number."""
        raw, ends = self.raw.tobytes(), self.ends.tolist()
        return [raw[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]

    def by_row(self) -> list[str]:
        """The text of each row; all at once is many times faster than one by one."""
        texts = self.all()
        return [texts[code] for code in self.codes.tolist()]

    def used(self, rows: Array) -> Array:
        """The numbers that some rows hold, each once."""
        seen = np.zeros(len(self.ends), bool)
        seen[self.codes[rows]] = True
        return np.flatnonzero(seen)

    def digests(self, rows: Array) -> Array:
        """A digest of the text of each of some rows: ``N 2`` words."""
        table = np.zeros((len(self.ends), 2), np.uint64)
        for code in self.used(rows).tolist():
            raw = blake2b(self.distinct(code).encode(), digest_size=16).digest()
            table[code] = np.frombuffer(raw, "<u8")
        return table[self.codes[rows]]

    def joined(self, rows: Sequence[int] | Array, more: Iterable[str]) -> Texts:
        """Some of these rows, then further ones."""
        kept = self.codes[np.asarray(rows, np.int64)]
        texts = {int(code): self.distinct(int(code)) for code in np.unique(kept)}
        return Texts.of([*(texts[code] for code in kept.tolist()), *more])
