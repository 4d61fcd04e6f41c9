"""Guess what was meant by a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """Give the known name that is most like this one, or None when none is.

    Args:
        name: what was written.
        known: what is allowed.
        cutoff: how alike they must be, 0 to 1.
    """
    options = sorted(set(map(str, known)))
    flat = {option.lower().replace("-", "_"): option for option in options}
    found = difflib.get_close_matches(str(name).lower().replace("-", "_"), flat, n=1, cutoff=cutoff)
    return flat[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Give ``; did you mean X?``, or an empty text when nothing is near."""
    near = nearest(name, known, cutoff=0.6)
    return f"; did you mean {near}?" if near else ""
