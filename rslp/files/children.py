"""Child processes end with this one, however it ends: nothing works on, or waits, for a killed parent.

The kernel sends the signal when the *thread* ends that started the child: it has to outlive the child.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal

_SET_PARENT_DEATH_SIGNAL = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> Callable[[], None]:
    """What a program that is started does first (``preexec_fn``)."""
    parent = os.getpid()
    return lambda: _die_with(parent)


def _die_with(parent: int) -> None:
    if hasattr(_libc, "prctl"):
        _libc.prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    # It may have ended before the kernel was asked.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def worker_dies_with_parent(worker: int = 0) -> None:  # noqa: ARG001
    """What a process of ``multiprocessing`` does first, such as a loader's (``worker_init_fn``)."""
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        _die_with(parent.pid)


def pool(
    workers: int, start: Literal["fork", "spawn"], begin: Callable[[Any], None] | None = None, argument: Any = None
) -> ProcessPoolExecutor:
    """A pool of processes that end with this one, and leave Ctrl-C to it; each calls ``begin`` first."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context(start), _begin, (begin, argument))


def _begin(begin: Callable[[Any], None] | None, argument: Any) -> None:
    worker_dies_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A training takes notes of it, which forked processes inherit; but a pool that broke ends its others so.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if begin is not None:
        begin(argument)
