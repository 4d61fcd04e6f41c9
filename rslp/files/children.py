"""Child processes end with this one, however it ends: nothing goes on working, or waiting, for a killed parent.

The kernel sends the signal when the *thread* ends that started the child, so whoever starts processes from a thread
lets that thread outlive them.
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
    """What a program that is started does first (``preexec_fn``): have the kernel kill it when this process ends."""
    parent = os.getpid()
    return lambda: _die_with(parent)


def _die_with(parent: int) -> None:
    if hasattr(_libc, "prctl"):
        _libc.prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    # It may have ended before the kernel was asked.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def worker_dies_with_parent(worker: int = 0) -> None:  # noqa: ARG001
    """The same for a process of ``multiprocessing``, such as a loader's (``worker_init_fn``), called in it."""
    if parent := multiprocessing.parent_process():
        _die_with(parent.pid or 0)


def pool(
    workers: int, start: Literal["fork", "spawn"], begin: Callable[..., None] | None = None, *arguments: Any
) -> ProcessPoolExecutor:
    """A pool of processes that end with this one, and leave Ctrl-C to it.

    Args:
        workers: how many.
        start: how they are made.
        begin: what each of them does first, with the arguments.
        *arguments: of ``begin``.
    """
    context = multiprocessing.get_context(start)
    return ProcessPoolExecutor(workers, context, _begin, (begin, arguments))


def _begin(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    worker_dies_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A training takes notes of it, and a forked process would inherit that: a pool that broke ends the others so.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if begin is not None:
        begin(*arguments)
