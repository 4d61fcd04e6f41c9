"""Lock files: one process at a time; a waiting process reports the holder, and no child of the holder keeps the lock.

The kernel releases a lock when the last descriptor of its file is closed, so a lock ends with its holder, unless a
process that the holder forked has the descriptor, too. Forked processes therefore close it at once, and started
programs do not inherit it.
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
    """An ``opener`` for ``open`` that refuses links, folders, pipes and devices with a ``RunError``."""
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
    """A lock that this process holds until ``release`` or its end.

    Args:
        path: the lock file; it is made where it is missing.
        shared: several processes may hold the lock, as long as none holds it exclusively.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        # A shared lock waits: an exclusive holder only removes the locked files, which is quick.
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB
        acquired = False
        while not acquired:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = no_links(str(path), os.O_RDWR | os.O_CREAT)
            _open_locks.add(self)
            try:
                fcntl.flock(self._handle, kind)
                # The file may have been removed between the two calls.
                acquired = os.path.samestat(os.fstat(self._handle), path.lstat())
            except FileNotFoundError:
                pass
            finally:
                if not acquired:
                    self.close()
        # A file with a second name (hard link) may be another file's content: it is not overwritten.
        if not shared and os.fstat(self._handle).st_nlink == 1:
            holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%F %T} UTC\n"
            with suppress(OSError):
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, holder.encode(), 0)

    def release(self) -> None:
        """Release the lock, even if another process has a descriptor of the file."""
        if self._handle >= 0:
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        """Close the file; in a forked process, the parent keeps the lock."""
        _open_locks.discard(self)
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


_open_locks: set[Lock] = set()

os.register_at_fork(after_in_child=lambda: [*map(Lock.close, tuple(_open_locks))])


@contextmanager
def locked(path: Path, *, busy: Callable[[Path], None]) -> Iterator[None]:
    """Hold a lock in this block; while another process has it, ``busy`` is called, which raises or waits a moment."""
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


def waiting(activity: str, *, leave: Callable[[], None]) -> Callable[[Path], None]:
    """A ``busy`` for ``locked`` that waits, and logs the holder and its ``activity`` at once and every few minutes.

    ``leave`` raises when this process is to end.
    """
    started, due = time.monotonic(), 0.0

    def wait(path: Path) -> None:
        nonlocal due
        leave()
        if (passed := time.monotonic() - started) >= due:
            log.warning(
                "waiting for %s, which %s%s", holder(path), activity, f" ({passed / 60:.0f} min)" if due else ""
            )
            due = passed + _REMIND
        time.sleep(_PAUSE)

    return wait


def holder(path: Path) -> str:
    """The holder of a lock, in words, as far as this machine knows it: process, host, and since when."""
    try:
        with open(path, encoding="utf-8", errors="replace", opener=no_links) as file:
            record = _RECORD.fullmatch(file.read(200).strip())
    except OSError:
        record = None
    pids = _holding_pids(path)
    if not pids or (record and record[1] in pids):
        return printable(record[0]) if record else "another process"
    processes = f"process {', '.join(pids)} on {socket.gethostname()}"
    # Children of an earlier version inherited locks; or a user started a program with the descriptor.
    dead = record and record[2] == socket.gethostname() and not Path("/proc", record[1]).exists()
    left_behind = f" (left behind by process {record[1]}, which has ended: end it, too)" if record and dead else ""
    return processes + left_behind


def _holding_pids(path: Path) -> list[str]:
    """The ids of the processes that hold a lock, as far as this machine's kernel shows them to this user."""
    pids = []
    for info in sorted(Path("/proc").glob("[0-9]*/fdinfo/*")):
        with suppress(OSError):
            if (info.parents[1] / "fd" / info.name).samefile(path) and "FLOCK" in info.read_text():
                pids.append(info.parts[2])
    return pids
