"""Child processes that end with this one, and leave signals to it.

systemd, SLURM and a terminal send a signal to every process of a group. The parent alone acts on it: a child that ended
of itself would look like one that the kernel has killed. And however the parent ends, also by SIGKILL, the kernel ends
its children: nothing works on, or waits, for a killed parent.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.context import ForkContext, ForkProcess, SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from rslp.errors import MachineError
from rslp.runtime import memory

_LEFT_TO_THE_PARENT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SET_PARENT_DEATH_SIGNAL = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> Callable[[], None]:
    """What a program that is started does first (``preexec_fn``).

    The kernel ends it when the *thread* ends that started it: that has to outlive the program.
    """
    parent = os.getpid()
    return lambda: _die_with(parent)


def _die_with(parent: int) -> None:
    if hasattr(_libc, "prctl"):
        _libc.prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    # It may have ended before the kernel was asked.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def pool(
    workers: int,
    start: Literal["fork", "spawn"],
    *,
    what: str,
    begin: Callable[[Any], None] | None = None,
    argument: Any = None,
) -> Iterator[ProcessPoolExecutor]:
    """A pool of such processes, for a block; what they have not begun by its end is left undone.

    Args:
        workers: how many.
        start: whether they are forked, or fresh interpreters.
        what: what each does, for the message if one is killed: "lists windows".
        begin: is called in each with the argument first.
        argument: for ``begin``.

    Raises:
        MachineError: one of them was killed.
    """
    context = FORKED if start == "fork" else SPAWNED
    executor = ProcessPoolExecutor(workers, context, partial(begin, argument) if begin else None)
    try:
        yield executor
    except BrokenProcessPool as error:
        raise MachineError(
            f"a process that {what} was killed, as happens when memory runs out (limit: {memory.limits()}); what is "
            "done stays, and the same command goes on from there"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


class _Child(BaseProcess):
    def start(self) -> None:
        """Start with the signals blocked: torch and Python set handlers in a child, which are then never called."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        # Whoever ends it (torch, an executor, Python at its own end) would send SIGTERM, and then wait for ever.
        self._popen.terminate = self._end  # type: ignore[attr-defined]

    def run(self) -> None:
        """Work, in the child."""
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        _die_with(parent.pid)
        super().run()

    def _end(self) -> None:
        # torch raises when one of its workers is killed, also in the middle of this.
        for _ in range(2):
            with suppress(RuntimeError):
                self._popen.kill()  # type: ignore[attr-defined]
                self._popen.wait(5)  # type: ignore[attr-defined]


class _Forked(_Child, ForkProcess):
    pass


class _Spawned(_Child, SpawnProcess):
    def start(self) -> None:
        # What it starts at first use unblocks signals.
        resource_tracker.ensure_running()
        super().start()


class _ForkContext(ForkContext):
    Process = _Forked


class _SpawnContext(SpawnContext):
    Process = _Spawned


FORKED, SPAWNED = _ForkContext(), _SpawnContext()
