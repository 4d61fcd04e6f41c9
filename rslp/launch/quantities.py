"""Amounts as people write them: memory, durations, NAME=VALUE pairs, SOURCE:TARGET mounts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta

from rslp.errors import UsageError
from rslp.launch.job import Mount

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(MiB|GiB|TiB|MB|GB|TB|M|G|T)", re.IGNORECASE)
_MEBIBYTES = {"m": 1, "g": 1024, "t": 1024**2}
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d{2}):(\d{2})")
_SPELLED = re.compile(r"(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+)s)?")


def parse_memory(text: str) -> int:
    """Memory in MiB: ``64GiB``, ``64GB`` and ``64G`` all mean 64 x 1024 MiB, as they do to schedulers.

    Raises:
        UsageError: anything else.
    """
    match = _MEMORY.fullmatch(text.strip())
    amount = round(float(match[1]) * _MEBIBYTES[match[2][0].lower()]) if match else 0
    if not amount:
        raise UsageError(f"--memory {text!r} is no amount of memory: write it as 64GiB or 512MiB")
    return amount


def parse_duration(text: str) -> timedelta:
    """A duration: ``90m``, ``36h``, ``2d12h``, ``12:00:00`` or ``2-12:00:00``.

    Raises:
        UsageError: anything else, a bare number too: schedulers disagree about its unit.
    """
    bare = text.strip()
    match = _CLOCK.fullmatch(bare) or _SPELLED.fullmatch(bare)
    if match:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        if length := timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds):
            return length
    raise UsageError(f"--time_limit {text!r} is no duration: write it as 90m, 36h, 2d12h or 12:00:00")


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` texts as a mapping; a value may hold anything, ``=`` too.

    Raises:
        UsageError: a text without ``=``, or a name given twice. The value is not repeated: it might be secret.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{option} takes NAME=VALUE; one of its values has no '='")
        if name in found:
            raise UsageError(f"{option} is given {name} twice")
        found[name] = value
    return found


def parse_mounts(texts: Sequence[str]) -> tuple[Mount, ...]:
    """``SOURCE:TARGET`` texts as mounts; the last colon parts them, so that a source may be ``weka://bucket``.

    Raises:
        UsageError: a text without a source or an absolute target.
    """
    found = []
    for text in texts:
        source, _, target = text.rpartition(":")
        if not source or not target.startswith("/") or target.startswith("//"):
            raise UsageError(f"--mounts {text!r}: write it as SOURCE:/absolute/target")
        found.append(Mount(source, target))
    return tuple(found)
