"""A file of named arrays, memory-mapped: opening it costs the same for ten windows as for a million."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rslp.files import write_atomic

Array = np.ndarray[Any, np.dtype[Any]]
_MAGIC = b"rslpcol1"
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
    head += b" " * (-(len(_MAGIC) + 8 + len(head)) % _ALIGN)
    write_atomic(path, b"".join([_MAGIC, len(head).to_bytes(8, "little"), head, *parts]))


def read_columns(path: Path) -> Columns:
    """Open a file of ``write_columns``.

    Raises:
        OSError: it can't be read.
        ValueError: it is no such file, or not a whole one.
    """
    with path.open("rb") as handle:
        if handle.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path} is no file of columns")
        length = int.from_bytes(handle.read(8), "little")
        head = json.loads(handle.read(length))
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    start = len(_MAGIC) + 8 + length
    arrays: dict[str, Array] = {}
    for name, (dtype, shape, at) in head["arrays"].items():
        count = int(np.prod(shape, dtype=np.int64))
        # frombuffer refuses an empty tail.
        flat = np.frombuffer(mapped, np.dtype(dtype), count, start + at) if count else np.empty(0, np.dtype(dtype))
        arrays[name] = flat.reshape(shape)
    return Columns(head["meta"], arrays)
