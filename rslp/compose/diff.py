"""The structural difference of two configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rslp.compose.merge import KeyPath, dotted, short


def differences(old: Any, new: Any) -> list[str]:
    """List what differs, one line for each place: ``~`` changed, ``+`` new, ``-`` gone.

    Args:
        old: the config before.
        new: the config now.
    """
    return list(_differences(old, new, ()))


def _differences(old: Any, new: Any, at: KeyPath) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        yield from _between(old, new, list(dict.fromkeys([*old, *new])), at)
    elif isinstance(old, list) and isinstance(new, list):
        longer = range(max(len(old), len(new)))
        yield from _between(dict(enumerate(old)), dict(enumerate(new)), list(longer), at)
    elif type(old) is not type(new) or old != new:
        yield f"~ {dotted(at)}: {short(old)} -> {short(new)}"


def _between(old: Mapping[Any, Any], new: Mapping[Any, Any], keys: list[Any], at: KeyPath) -> Iterator[str]:
    for key in keys:
        if key not in old:
            yield f"+ {dotted((*at, key))}: {short(new[key])}"
        elif key not in new:
            yield f"- {dotted((*at, key))}: {short(old[key])}"
        else:
            yield from _differences(old[key], new[key], (*at, key))
