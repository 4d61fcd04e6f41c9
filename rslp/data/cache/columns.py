"""Files of named columns: memory-mapped arrays with a checksum, and columns of text with each distinct text once."""

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
    """An opened file of columns: arrays, read-only views of the mapped file, and the JSON values stored with them."""

    meta: Mapping[str, Any]
    arrays: Mapping[str, Array]


def write_columns(path: Path, arrays: Mapping[str, Array], *, meta: Mapping[str, Any]) -> None:
    """Write a file of columns, arrays of any plain dtype, atomically; ``meta`` are JSON values to store with them."""
    layout: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        layout[name] = [array.dtype.str, list(array.shape), offset]
        padding = -len(raw) % _ALIGN
        parts += [raw, bytes(padding)]
        offset += len(raw) + padding
    head = json.dumps({"meta": meta, "arrays": layout}).encode()
    # The head is preceded by the magic bytes, the checksum and its own length, 8 bytes each.
    head += b" " * (-(len(_MAGIC) + 16 + len(head)) % _ALIGN)
    parts = [len(head).to_bytes(8, "little"), head, *parts]
    checksum = xxhash.xxh3_64()
    for part in parts:
        checksum.update(part)
    write_atomic(path, b"".join([_MAGIC, checksum.intdigest().to_bytes(8, "little"), *parts]))


def mapped(path: Path) -> mmap.mmap:
    """Map a file into memory, read-only.

    Raises:
        OSError: the path can't be read, or is no file.
        ValueError: the file is empty.
    """
    with path.open("rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def read_columns(path: Path) -> Columns:
    """Open a file of ``write_columns``.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is of another format, or damaged.
    """
    raw = mapped(path)
    if raw[: len(_MAGIC)] != _MAGIC:
        raise ValueError("it is of another format")
    middle = len(_MAGIC) + 8
    if raw[len(_MAGIC) : middle] != xxhash.xxh3_64_intdigest(memoryview(raw)[middle:]).to_bytes(8, "little"):
        raise ValueError("it is damaged")
    # The pages that were just read stay in the machine's cache of files, not in this process's memory.
    raw.madvise(mmap.MADV_DONTNEED)
    start = middle + 8 + int.from_bytes(raw[middle : middle + 8], "little")
    head = json.loads(raw[middle + 8 : start])
    arrays: dict[str, Array] = {}
    for name, (dtype, shape, offset) in head["arrays"].items():
        count = int(np.prod(shape, dtype=np.int64))
        # np.frombuffer refuses an empty array at the end of the file.
        flat = np.frombuffer(raw, np.dtype(dtype), count, start + offset) if count else np.empty(0, np.dtype(dtype))
        arrays[name] = flat.reshape(shape)
    return Columns(head["meta"], arrays)


# The number of decoded texts that a column keeps in memory.
_MAX_DECODED = 1024


@dataclass(frozen=True)
class Texts:
    """A column of text: each distinct text once, encoded, and a number (code) for each row.

    Attributes:
        ends: end of each distinct text in ``raw``.
        raw: the distinct texts in UTF-8, end to end.
        codes: for each row the number of its text.
    """

    ends: Array
    raw: Array
    codes: Array
    _decoded: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, rows: Iterable[str]) -> Texts:
        """Make a column; texts are numbered in the order in which they first appear."""
        numbers: dict[str, int] = {}
        codes = np.fromiter((numbers.setdefault(text, len(numbers)) for text in rows), np.uint32)
        encoded = [text.encode() for text in numbers]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(ends, np.frombuffer(b"".join(encoded), np.uint8), codes)

    @classmethod
    def read(cls, name: str, arrays: Mapping[str, Array]) -> Texts:
        """The column that ``arrays`` of the same name wrote."""
        return cls(arrays[f"{name}/ends"], arrays[f"{name}/raw"], arrays[f"{name}/codes"])

    def arrays(self, name: str) -> dict[str, Array]:
        """The arrays to write for a column of this name."""
        return {f"{name}/ends": self.ends, f"{name}/raw": self.raw, f"{name}/codes": self.codes}

    def __getitem__(self, row: int) -> str:
        """The text of a row."""
        return self.distinct(int(self.codes[row]))

    def distinct(self, code: int) -> str:
        """The text of a number."""
        text = self._decoded.get(code)
        if text is None:
            start = int(self.ends[code - 1]) if code else 0
            text = self.raw[start : int(self.ends[code])].tobytes().decode()
            if len(self._decoded) < _MAX_DECODED:
                self._decoded[code] = text
        return text

    def all(self) -> list[str]:
        """Every distinct text, by number."""
        raw, ends = self.raw.tobytes(), self.ends.tolist()
        return [raw[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]

    def by_row(self) -> list[str]:
        """The text of each row; many times faster than row by row."""
        texts = self.all()
        return [texts[code] for code in self.codes.tolist()]

    def used(self, rows: Array) -> Array:
        """The distinct codes of some rows, sorted."""
        is_used = np.zeros(len(self.ends), bool)
        is_used[self.codes[rows]] = True
        return np.flatnonzero(is_used)

    def digests(self, rows: Array) -> Array:
        """A digest of the text of each of some rows, uint64 ``N 2``."""
        table = np.zeros((len(self.ends), 2), np.uint64)
        for code in self.used(rows).tolist():
            raw = blake2b(self.distinct(code).encode(), digest_size=16).digest()
            table[code] = np.frombuffer(raw, "<u8")
        return table[self.codes[rows]]

    def joined(self, rows: Sequence[int] | Array, more: Iterable[str]) -> Texts:
        """A column of some of these rows, followed by the rows ``more``."""
        codes = self.codes[np.asarray(rows, np.int64)]
        texts = {int(code): self.distinct(int(code)) for code in np.unique(codes)}
        return Texts.of([*(texts[code] for code in codes.tolist()), *more])
