"""Reads that take long or never return: notices, time limits, refusals.

A read that is blocked in the kernel can't be interrupted. So a watching thread in each process reports slow reads, and
a read with a time limit runs in a thread of its own, which is abandoned when the time is over.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from fsspec.implementations.local import LocalFileSystem
from upath import UPath

from rslp.errors import DataError

# Seconds after which a slow read is reported, and after which it is reported again.
FIRST, AGAIN = 60.0, 300.0
Read = TypeVar("Read")


class SlowReadWatch:
    """Reports slow reads of this process on stderr."""

    def __init__(self) -> None:
        self._reads: dict[object, tuple[str, float]] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        # Threads do not survive a fork, and Python warns of forking with one: it ends before and starts again after.
        os.register_at_fork(before=self._end, after_in_parent=self._begin)

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Watch the read in this block; ``what`` names it in reports."""
        read = object()
        self._reads[read] = (what, time.monotonic())
        self._begin()
        try:
            yield
        finally:
            self._reads.pop(read, None)

    def _begin(self) -> None:
        if self._thread is None and self._reads:
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._watch, args=(self._ended,), daemon=True)
            self._thread.start()

    def _watch(self, ended: threading.Event) -> None:
        due: dict[object, float] = {}
        while not ended.wait(FIRST / 4):
            now = time.monotonic()
            for read, (what, began) in list(self._reads.items()):
                if now >= due.get(read, began + FIRST):
                    due[read] = now + AGAIN
                    sys.stderr.write(f"still reading after {now - began:.0f} s: {what}\n")
                    sys.stderr.flush()
            due = {read: moment for read, moment in due.items() if read in self._reads}

    def _end(self) -> None:
        if (thread := self._thread) is not None:
            self._ended.set()
            thread.join()
            self._thread = None


slow_read_watch = SlowReadWatch()


def read_with_notice(seconds: float | None, read: Callable[[], Read], *, what: str) -> Read:
    """Call ``read``, report it if it is slow, and give up after a time limit.

    Args:
        seconds: the time limit; None waits for ever.
        read: the function that reads; it may go on in the background after the time limit.
        what: dataset, window and layer, for messages.

    Raises:
        DataError: the time limit is exceeded.
    """
    with slow_read_watch.over(what):
        if seconds is None:
            return read()
        results: list[Read] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(read())
            except BaseException as error:  # noqa: BLE001 it is raised below, in the calling thread
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
        for error in errors:
            raise error
        for result in results:
            return result
    raise DataError(f"{what}: not read within {seconds:g} s (read_timeout)")


def refuse_pipes(path: UPath) -> None:
    """Refuse a pipe, a socket or a device in place of a file or of a file in a folder: a read of it may never return.

    Raises:
        ValueError: there is one; the message names it.
    """
    if isinstance(path.fs, LocalFileSystem):
        refuse_pipe(path.path)
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in sorted(os.listdir(path.path)):  # noqa: PTH208 path objects cost more than the calls
                refuse_pipe(f"{path.path}/{name}")


def refuse_pipe(file: str) -> None:
    """Refuse a path that exists and is neither a file nor a folder.

    Raises:
        ValueError: it is one; the message names it.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = os.stat(file).st_mode  # noqa: PTH116 likewise
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{file} is a pipe, a socket or a device, not a file")
