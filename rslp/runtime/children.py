"""Child processes that end with their parent and leave signals to it.

systemd, SLURM and a terminal send a signal to every process of a group. Only the parent acts on it: a child that ended
by itself would look like one that the kernel has killed. When the parent ends, even by SIGKILL, the kernel kills its
children: none goes on working or waiting for a dead parent.
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

_PARENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SET_PARENT_DEATH_SIGNAL = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> Callable[[], None]:
    """A ``preexec_fn`` for ``subprocess``: the kernel kills the program when its parent ends.

    More exactly, when the *thread* that started it ends; that thread has to outlive the program.
    """
    parent = os.getpid()
    return lambda: _die_with(parent)


def _die_with(parent: int) -> None:
    if hasattr(_libc, "prctl"):
        _libc.prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    # The parent may have ended before prctl was called.
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
    """A pool of such processes; at the end of the block, calls that were not begun are cancelled.

    Args:
        workers: number of processes.
        start: "fork", or "spawn" for new interpreters.
        what: the work of a process, for the message if one is killed: "lists windows".
        begin: called once in each process, with ``argument``.
        argument: the argument of ``begin``.

    Raises:
        MachineError: a process was killed.
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
        """Start the child with these signals blocked: the handlers that torch and Python set in it are never called."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENT_SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        # Otherwise torch, executors and Python at exit would send SIGTERM, which is blocked, and wait for ever.
        self._popen.terminate = self._end  # type: ignore[attr-defined]

    def run(self) -> None:
        """Run in the child, which dies with its parent."""
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        _die_with(parent.pid)
        super().run()

    def _end(self) -> None:
        # torch's handler of SIGCHLD raises when one of its workers is killed, perhaps between these two lines.
        for _ in range(2):
            with suppress(RuntimeError):
                self._popen.kill()  # type: ignore[attr-defined]
                self._popen.wait(5)  # type: ignore[attr-defined]


class _Forked(_Child, ForkProcess):
    pass


class _Spawned(_Child, SpawnProcess):
    def start(self) -> None:
        # Starting the tracker unblocks signals, so it has to happen before they are blocked.
        resource_tracker.ensure_running()
        super().start()


class _ForkContext(ForkContext):
    Process = _Forked


class _SpawnContext(SpawnContext):
    Process = _Spawned


FORKED, SPAWNED = _ForkContext(), _SpawnContext()
