"""Did you mean: the allowed name that is most similar to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The known name that is most similar to a name, or None when none is similar.

    Args:
        name: the name as written; case, and ``-`` for ``_``, do not matter.
        known: the allowed names.
        cutoff: the least similarity, 0 to 1 (``difflib.SequenceMatcher.ratio``).
    """
    # Sorted in reverse: of equally similar names, the alphabetically first one is taken.
    flat = {str(option).lower().replace("-", "_"): str(option) for option in sorted(set(map(str, known)), reverse=True)}
    matches = difflib.get_close_matches(str(name).lower().replace("-", "_"), flat, n=1, cutoff=cutoff)
    return flat[matches[0]] if matches else None


def did_you_mean(name: object, known: Iterable[object], *, otherwise: str = "") -> str:
    """The end of a message about an unknown name: ``; did you mean X?``.

    Args:
        name: the name as written.
        known: the allowed names.
        otherwise: where no name is similar, the word before a list of the allowed names, such as ``known``; no list
            when it is empty.
    """
    options = [str(option) for option in known]
    if near := nearest(name, options):
        return f"; did you mean {near}?"
    return f"; {otherwise}: {', '.join(options)}" if otherwise else ""
