"""Standard streams that never raise: output that can't be written is dropped."""

from __future__ import annotations

import io
import os
import sys
import time
from typing import Any


class _Stream(io.FileIO):
    """A file descriptor that drops all output after the first error.

    Attributes:
        error: the error after which output is dropped; None before.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write everything: after a short write, the next attempt raises the reason."""
        remaining = memoryview(data).cast("B")
        size = remaining.nbytes
        while remaining and self.error is None:
            try:
                written = super().write(remaining)
            except OSError as error:
                self.error = error
                continue
            if written is None:
                # The stream is non-blocking and its reader is slow.
                time.sleep(0.01)
            else:
                remaining = remaining[written:]
        return size


def guard() -> None:
    """Make standard output and error never raise, and connect closed standard streams to ``/dev/null``.

    The next opened file would take the number of a closed stream, and output of libraries or child processes would go
    into that file. A terminal that is not UTF-8 shows question marks for other characters.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        former = getattr(sys, name)
        if former is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            former = io.TextIOWrapper(
                io.FileIO(number, "r" if name == "stdin" else "w", closefd=False), encoding="utf-8"
            )
        elif type(former) is not io.TextIOWrapper or former is not getattr(sys, f"__{name}__"):
            # Replaced before, such as by a program that calls this one.
            if name != "stdin" and isinstance(former, io.TextIOWrapper):
                former.reconfigure(errors="replace")
            continue
        stream = former if name == "stdin" else _guarded(former, number)
        setattr(sys, name, stream)


def _guarded(former: io.TextIOWrapper, number: int) -> io.TextIOWrapper:
    former.flush()
    stream = _Stream(number, "w", closefd=False)
    return io.TextIOWrapper(
        stream if isinstance(former.buffer, io.FileIO) else io.BufferedWriter(stream),
        encoding=former.encoding,
        errors="replace",
        line_buffering=former.line_buffering,
        write_through=former.write_through,
    )


def output_error() -> OSError | None:
    """The error after which standard output was dropped; None if everything was written."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if not isinstance(raw, _Stream):
        return None
    sys.stdout.flush()
    return raw.error
