"""Columns of texts: each distinct text once, and a number per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from rslp.train.store.columns import Array

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
