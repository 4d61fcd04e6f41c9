"""Text on its way to a terminal: names and messages come from files of others, and must not steer the terminal."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

# Control characters (C0 but tab and line feed, DEL, C1), signs that turn the direction of writing, line separators.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def without_controls(text: str) -> str:
    r"""The text with each control character spelt out, such as ``\x1b``; tabs and line breaks stay."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def printable(text: str) -> str:
    """The same for what belongs on one line, such as a name in a table: line breaks are spelt out, too."""
    return without_controls(text).replace("\n", "\\n").replace("\t", "\\t")


class Terminal(io.TextIOWrapper):
    """Standard output or error where it is a terminal: what is written to it steers nothing.

    Colours of a log are left out. A write may begin with a carriage return, as those of progress bars do.

    Attributes:
        rich_proxied_file: the stream itself, which ``rich`` takes: its bars and colours are control sequences.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.buffer, stream.encoding, "replace", write_through=True)
        self.rich_proxied_file = stream

    def write(self, text: str, /) -> int:
        """Write without control characters; returns the length of the text, as streams do."""
        start = "\r" if text.startswith("\r") else ""
        clean = _COLOURS.sub("", text[len(start) :]).replace("\r\n", "\n")
        super().write(start + without_controls(clean))
        super().flush()
        return len(text)

    def reconfigure(self, **settings: Any) -> None:
        """Of both streams."""
        self.rich_proxied_file.reconfigure(**settings)
        super().reconfigure(**settings)


def guard_terminals() -> None:
    """Let standard output and error, where they are terminals, take no control characters.

    What goes to a file or into a pipe passes as it is.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Terminal) and stream.isatty():
            setattr(sys, name, Terminal(stream))
