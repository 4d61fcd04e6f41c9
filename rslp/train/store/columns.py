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
# The checksum, and the length of the head.
_NUMBERS = 16
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
    head += b" " * (-(len(_MAGIC) + _NUMBERS + len(head)) % _ALIGN)
    body = b"".join([len(head).to_bytes(8, "little"), head, *parts])
    write_atomic(path, b"".join([_MAGIC, xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"), body]))


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
    start = len(_MAGIC) + _NUMBERS + int.from_bytes(raw[middle : middle + 8], "little")
    head = json.loads(raw[len(_MAGIC) + _NUMBERS : start])
    arrays: dict[str, Array] = {}
    for name, (dtype, shape, at) in head["arrays"].items():
        count = int(np.prod(shape, dtype=np.int64))
        # frombuffer refuses an empty tail.
        flat = np.frombuffer(raw, np.dtype(dtype), count, start + at) if count else np.empty(0, np.dtype(dtype))
        arrays[name] = flat.reshape(shape)
    return Columns(head["meta"], arrays)
