"""Read a file that is still being written to."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PAUSE = 0.5


def tail(path: Path, *, ended: Callable[[], bool]) -> Iterator[str]:
    """The text of a file in pieces, until its writer has ended.

    Args:
        path: the file; it may appear only later.
        ended: whether nobody writes any more.
    """
    position = 0
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        # Asked before reading: what is written until the end is read then.
        over = ended()
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(position)
                piece = stream.read()
            position += len(piece)
            if text := decoder.decode(piece, final=over):
                yield text
        if over:
            return
        time.sleep(_PAUSE)
