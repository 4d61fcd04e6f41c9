"""Standard streams that end no work: a terminal that is gone, a reader that has seen enough, a full disk."""

from __future__ import annotations

import io
import os
import sys
import time
from typing import Any


class _Stream(io.FileIO):
    """A file descriptor that swallows what it can't write any more.

    Attributes:
        lost: why something was lost; None as long as nothing was.
    """

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all: what is left of a short write tells at the next one why it was short."""
        rest = memoryview(data).cast("B")
        size = rest.nbytes
        while rest and self.lost is None:
            try:
                written = super().write(rest)
            except OSError as error:
                self.lost = error
                continue
            if written is None:
                # A stream that does not block, and whose reader is slow.
                time.sleep(0.01)
            else:
                rest = rest[written:]
        return size


def guard() -> None:
    """Make standard output and error streams that never raise; one that is closed leads nowhere.

    Without the latter, the next file that is opened would take its number, and what a library or a child process prints
    would go into that file. A terminal that is not UTF-8 shows question marks.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        former = getattr(sys, name)
        if former is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            former = io.TextIOWrapper(
                io.FileIO(number, "r" if name == "stdin" else "w", closefd=False), encoding="utf-8"
            )
        elif type(former) is not io.TextIOWrapper or former is not getattr(sys, f"__{name}__"):
            # Somebody else's, such as that of a program that calls this one.
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


def lost() -> OSError | None:
    """Why standard output has lost something of what was written to it so far."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if not isinstance(raw, _Stream):
        return None
    sys.stdout.flush()
    return raw.lost
