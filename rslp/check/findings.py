"""What a check found: a fault or a remark, and the key of the run config that it is about."""

from __future__ import annotations

from dataclasses import dataclass

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know before the run.

    Attributes:
        what: what is wrong, what was got, what would be right.
        at: key path in the run config; the nearest key that the config holds is where it is shown.
        error: whether the run must not start; else it is a warning.
    """

    what: str
    at: KeyPath = ()
    error: bool = True


def warning(what: str, at: KeyPath = ()) -> Finding:
    """A remark that stops nobody."""
    return Finding(what, at, error=False)


def listed(names: object, most: int = 6) -> str:
    """Names for a message, cut after a few: ``a, b, c and 4 more``."""
    words = [str(name) for name in names] if isinstance(names, list | tuple | set | dict) else [str(names)]
    rest = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + rest
