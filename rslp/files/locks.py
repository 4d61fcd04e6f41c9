"""Lock files: one process at a time, those that wait learn for whom, and no child of the holder keeps the lock.

The kernel drops a lock with the last descriptor of its file, so a holder that was killed holds nobody up, unless a
process that it forked has inherited the descriptor. Here forked processes close it first thing, and programs that are
started never get it.
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
from rslp.files.terminal import printable

_PAUSE = 0.2
_REMIND = 300.0
_RECORD = re.compile(r"process (\d+) on (\S+) since [\d :-]+ UTC")
_RECORD_BYTES = 200

log = logging.getLogger(__name__)


def no_links(path: str, flags: int) -> int:
    """Open a file as ``open(..., opener=no_links)`` does, but only a plain file, never what a link leads to.

    Raises:
        RunError: the path is a link, a pipe, a folder or a device.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise RunError(
            f"{path} is a link, a folder or a pipe, where a plain file is to be written: remove it"
        ) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RunError(f"{path} is no plain file, and is not written to: remove it")
    return handle


class Lock:
    """A lock that this process holds until ``release`` or its end; several may hold a shared one.

    Args:
        path: the lock file; it is made if it is not there, and stays.
        shared: let others hold it, too, if they share it.

    Raises:
        BlockingIOError: another process holds it.
        RunError: the path is no plain file.
        OSError: the file can't be opened.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        # Shared ones only wait while somebody removes what the lock is for.
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = no_links(str(path), os.O_RDWR | os.O_CREAT)
            _HELD.add(self)
            try:
                fcntl.flock(self._handle, kind)
            except OSError:
                self.close()
                raise
            if _is_at(self._handle, path):
                break
            # The file was removed, or another took its place, between the two calls.
            self.close()
        # Never into a file that has another name elsewhere.
        if not shared and os.fstat(self._handle).st_nlink == 1:
            with suppress(OSError):
                self._sign()

    def _sign(self) -> None:
        now = datetime.now(UTC)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()} since {now:%F %T} UTC\n".encode(), 0)

    def release(self) -> None:
        """Let others have it, also where a process of this one should have a descriptor of the file."""
        if self._handle >= 0:
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        """Close the file: what a forked process does, in which the lock stays its parent's."""
        _HELD.discard(self)
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


_HELD: set[Lock] = set()


def _close_all() -> None:
    for lock in tuple(_HELD):
        lock.close()


os.register_at_fork(after_in_child=_close_all)


@contextmanager
def locked(path: Path, *, busy: Callable[[Path], None]) -> Iterator[None]:
    """Hold a lock in this block.

    Args:
        path: the lock file.
        busy: called each time that another process holds it: raises, or waits a moment, after which it is tried again.
    """
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
    """What ``locked`` does while it waits: say for whom, at once and every few minutes, and leave when asked to.

    Args:
        what: what the holder does, such as ``is packing FOLDER``.
        leave: raises when this process has been asked to leave.
    """
    began, due = time.monotonic(), 0.0

    def wait(path: Path) -> None:
        nonlocal due
        leave()
        if (passed := time.monotonic() - began) >= due:
            so_far = f" (for {passed / 60:.0f} min so far)" if due else ""
            log.warning("waiting for %s, which %s%s", holder(path), what, so_far)
            due = passed + _REMIND
        time.sleep(_PAUSE)

    return wait


def holder(path: Path) -> str:
    """Who holds a lock, as far as it can be seen from this machine: process, host, and since when."""
    try:
        with open(path, "rb", opener=no_links) as handle:
            text = printable(handle.read(_RECORD_BYTES).decode(errors="replace").strip())
    except OSError:
        text = ""
    record, holding = _RECORD.fullmatch(text), _holding(path)
    if record and (not holding or int(record[1]) in holding):
        return text
    if not holding:
        return "another process"
    who = f"process {', '.join(map(str, holding))} on {socket.gethostname()}"
    # An older version's children, which inherited the lock; or one that has only just taken it.
    left = record and record[2] == socket.gethostname() and not Path("/proc", record[1]).exists()
    return f"{who} (left behind by {text}, which has ended: end it, too)" if left else who


def _holding(path: Path) -> list[int]:
    """The processes of this machine that hold a lock, as far as the kernel shows them to this user."""
    found = set()
    for info in Path("/proc").glob("[0-9]*/fdinfo/*"):
        process = info.parts[2]
        with suppress(OSError):
            if Path("/proc", process, "fd", info.name).samefile(path) and "FLOCK" in info.read_text():
                found.add(int(process))
    return sorted(found)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
