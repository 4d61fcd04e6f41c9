"""A file of named arrays, memory-mapped, with a checksum of all that is compared when it is opened."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rslp.files import write_atomic

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
