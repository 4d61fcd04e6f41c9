"""Text on its way to a terminal: names and messages come from files of others, and must not steer the terminal."""

from __future__ import annotations

import io
import re
import sys

# Control characters (C0 but tab and line feed, DEL, C1), signs that turn the direction of writing, line separators.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def print_message(text: str) -> None:
    """Write a line to standard error, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def printable(text: str, *, lines: bool = False) -> str:
    r"""The text with control characters spelt out, such as ``\x1b``; with ``lines``, tabs and line breaks stay."""
    clean = _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)
    return clean if lines else clean.replace("\n", "\\n").replace("\t", "\\t")


class Terminal(io.TextIOWrapper):
    """Standard output or error where it is a terminal."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.buffer, stream.encoding, "replace", write_through=True)
        # What rich looks for, and writes to instead: its bars and colours are control sequences.
        self.rich_proxied_file = stream

    def write(self, text: str, /) -> int:
        """Write without control characters and a log's colours; a bar may begin with a carriage return."""
        start = "\r" if text.startswith("\r") else ""
        clean = _COLOURS.sub("", text[len(start) :]).replace("\r\n", "\n")
        super().write(start + printable(clean, lines=True))
        super().flush()
        return len(text)


def guard_terminals() -> None:
    """Let standard output and error take no control characters where they are terminals; files and pipes take all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Terminal) and stream.isatty():
            from rich import control

            # Of texts in rich's tables and bars: it leaves out some of them by itself.
            control._CONTROL_STRIP_TRANSLATE.update({n: None for n in range(0x2070) if _CONTROLS.match(chr(n))})
            setattr(sys, name, Terminal(stream))
