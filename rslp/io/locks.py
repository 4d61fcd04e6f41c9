"""Lock files: one process at a time, those that wait learn for whom, and no child of the holder keeps the lock.

The kernel drops a lock with the last descriptor of its file, so a killed holder holds nobody up, unless a process that
it forked has the descriptor, too. Here forked processes close it first thing; programs that are started never get it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from rslp.errors import RunError
from rslp.io.terminal import printable

_PAUSE, _REMIND = 0.2, 300.0
_RECORD = re.compile(r"process (\d+) on (\S+) since [\d :-]+ UTC")

log = logging.getLogger(__name__)


def no_links(path: str, flags: int) -> int:
    """An ``opener`` for ``open``: opens plain files alone; a link, a folder, a pipe or a device is a ``RunError``."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise RunError(f"{path} is a link, a folder or a pipe where a plain file belongs: remove it")


class Lock:
    """A lock that this process holds until ``release`` or its end; several may hold a ``shared`` one.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        # A shared one waits, but only while somebody removes what it is for.
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB
        there = False
        while not there:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = no_links(str(path), os.O_RDWR | os.O_CREAT)
            _open_locks.add(self)
            try:
                fcntl.flock(self._handle, kind)
                # The file may have been removed between the two calls.
                there = os.path.samestat(os.fstat(self._handle), path.lstat())
            except FileNotFoundError:
                pass
            finally:
                if not there:
                    self.close()
        # Never into a file that has a second name elsewhere.
        if not shared and os.fstat(self._handle).st_nlink == 1:
            holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%F %T} UTC\n"
            with suppress(OSError):
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, holder.encode(), 0)

    def release(self) -> None:
        """Let others have it, whoever else has a descriptor of the file."""
        if self._handle >= 0:
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        """Close the file; in a forked process the lock stays its parent's."""
        _open_locks.discard(self)
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


_open_locks: set[Lock] = set()

os.register_at_fork(after_in_child=lambda: [*map(Lock.close, tuple(_open_locks))])


@contextmanager
def locked(path: Path, *, busy: Callable[[Path], None]) -> Iterator[None]:
    """Hold a lock in this block; ``busy`` is called while another process has it: it raises, or waits a moment."""
    while True:
        try:
            lock = Lock(path)
            break
        except BlockingIOError:
            busy(path)
    try:
        yield
    finally:
        lock.release()


def waiting(what: str, *, leave: Callable[[], None]) -> Callable[[Path], None]:
    """For ``locked``: wait, and say at once and every few minutes for whom and ``what`` that does.

    ``leave`` raises when this process was asked to leave.
    """
    began, due = time.monotonic(), 0.0

    def wait(path: Path) -> None:
        nonlocal due
        leave()
        if (passed := time.monotonic() - began) >= due:
            log.warning("waiting for %s, which %s%s", holder(path), what, f" ({passed / 60:.0f} min)" if due else "")
            due = passed + _REMIND
        time.sleep(_PAUSE)

    return wait


def holder(path: Path) -> str:
    """Who holds a lock, as far as it can be seen from here: process, host, and since when."""
    try:
        with open(path, encoding="utf-8", errors="replace", opener=no_links) as file:
            record = _RECORD.fullmatch(file.read(200).strip())
    except OSError:
        record = None
    holding = _holding(path)
    if not holding or (record and record[1] in holding):
        return printable(record[0]) if record else "another process"
    who = f"process {', '.join(holding)} on {socket.gethostname()}"
    # Of a version whose children inherited locks; or of a program that a user started with the descriptor.
    dead = record and record[2] == socket.gethostname() and not Path("/proc", record[1]).exists()
    return f"{who} (left behind by process {record[1]}, which has ended: end it, too)" if record and dead else who


def _holding(path: Path) -> list[str]:
    """The processes that hold a lock, as far as this machine's kernel shows them to this user."""
    found = []
    for info in sorted(Path("/proc").glob("[0-9]*/fdinfo/*")):
        with suppress(OSError):
            if (info.parents[1] / "fd" / info.name).samefile(path) and "FLOCK" in info.read_text():
                found.append(info.parts[2])
    return found
