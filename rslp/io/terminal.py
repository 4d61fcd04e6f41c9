"""Safe text for terminals: names and messages from files of others must not send control characters."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import suppress

# Control characters (C0 but tab and line feed, DEL, C1), marks of text direction, line separators.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


# The variable of a job in the foreground with the file that gets a copy of its messages.
LOG_VARIABLE = "RSLP_LOG"


def print_message(text: str) -> None:
    """Write a line to standard error, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
    copy_message(text)


def copy_message(text: str) -> None:
    """Append a line to the log of a job in the foreground, whose output is on a terminal; nothing in other processes.

    That it can't be written does not matter: the message was shown.
    """
    if path := os.environ.get(LOG_VARIABLE):
        with suppress(OSError), open(path, "a", encoding="utf-8", opener=_no_links) as log:
            log.write(f"{text}\n")


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 dataset``, ``2 datasets``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str, *, lines: bool = False) -> str:
    r"""Spell control characters out, such as ``\x1b``; with ``lines``, tabs and line breaks stay."""
    clean = _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)
    return clean if lines else clean.replace("\n", "\\n").replace("\t", "\\t")


class Terminal(io.TextIOWrapper):
    """A terminal as standard output or error, without control characters."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.buffer, stream.encoding, "replace", write_through=True)
        # rich writes its bars and colours, which are control sequences, to the stream of this attribute.
        self.rich_proxied_file = stream

    def write(self, text: str, /) -> int:
        """Write without control characters and colours; a progress bar may begin with a carriage return."""
        start = "\r" if text.startswith("\r") else ""
        clean = _COLOURS.sub("", text[len(start) :]).replace("\r\n", "\n")
        super().write(start + printable(clean, lines=True))
        super().flush()
        return len(text)


def is_control(character: str) -> bool:
    """Whether a character is none that a terminal should get from files of others."""
    return _CONTROLS.match(character) is not None


def guard_terminals() -> bool:
    """Keep control characters off standard output and error where they are terminals; files and pipes get them.

    Returns:
        whether one of them is a terminal: rich writes to it itself, and has to be kept from it in another way.
    """
    found = False
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Terminal) and stream.isatty():
            found = True
            setattr(sys, name, Terminal(stream))
    return found


def quieten_rslearn() -> None:
    """Let rslearn log warnings only; to be called before rslearn is imported, when its loggers read their level."""
    os.environ.setdefault("RSLEARN_LOGLEVEL", "WARNING")
