"""Guess what was meant by a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The known name that is most like this one, or None when none is.

    Args:
        name: what was written; case and ``-`` against ``_`` do not matter.
        known: what is allowed.
        cutoff: how alike they must be, 0 to 1 (``difflib.SequenceMatcher.ratio``).
    """
    # Sorted: of equally near names the first is taken.
    flat = {str(option).lower().replace("-", "_"): str(option) for option in sorted(set(map(str, known)), reverse=True)}
    found = difflib.get_close_matches(str(name).lower().replace("-", "_"), flat, n=1, cutoff=cutoff)
    return flat[found[0]] if found else None


def did_you_mean(name: object, known: Iterable[object], *, otherwise: str = "") -> str:
    """The end of a message about an unknown name: ``; did you mean X?``.

    Args:
        name: what was written.
        known: what is allowed.
        otherwise: what stands before the names that are allowed where none is near, such as ``known``; an empty text
            says nothing then.
    """
    options = [str(option) for option in known]
    if near := nearest(name, options):
        return f"; did you mean {near}?"
    return f"; {otherwise}: {', '.join(options)}" if otherwise else ""
