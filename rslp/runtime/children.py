"""Child processes that end with their parent and leave signals to it.

systemd, SLURM and a terminal send a signal to every process of a group. Only the parent acts on it: children block the
signal, since a child that ended by itself would look like one that the kernel has killed. When the parent ends, even by
SIGKILL, the kernel kills its children: none goes on working or waiting for a dead parent.

``pool`` runs calls in such processes; ``FORKED`` and ``SPAWNED`` are the contexts to give to torch's loaders and to
executors. ``die_with_parent`` is for programs started by ``subprocess``, which do not block signals.
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

# The signals on which only the parent acts.
_PARENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# PR_SET_PDEATHSIG of Linux: the signal that the kernel sends to a process when its parent ends.
_SET_PARENT_DEATH_SIGNAL = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> Callable[[], None]:
    """A ``preexec_fn`` for ``subprocess``: the kernel kills the program when its parent ends.

    More exactly, when the *thread* that started it ends; that thread has to outlive the program.
    """
    parent = os.getpid()
    return lambda: _die_with(parent)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent, the process with this id, ends (on Linux)."""
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
    """A pool of child processes that end with this one and leave signals to it.

    At the end of the block, calls that were not begun are cancelled.

    Args:
        workers: number of processes.
        start: "fork", or "spawn" for new interpreters.
        what: the work of a process, for the message if one is killed, after "a process that": "lists windows".
        begin: called in each process when it starts, with ``argument``.
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
    """A process that blocks ``_PARENT_SIGNALS`` and is killed when its parent ends."""

    def start(self) -> None:
        """Start the child with the signals blocked, so that it never calls the handlers that torch and Python set."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENT_SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        # torch, executors and Python at exit would send SIGTERM, which is blocked, and wait for ever: kill instead.
        self._popen.terminate = self._end  # type: ignore[attr-defined]

    def run(self) -> None:
        """What the child does: first it ties its life to the parent's, then it runs its target."""
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        _die_with(parent.pid)
        super().run()

    def _end(self) -> None:
        """Kill the child, and wait for its end."""
        # Twice: torch's handler of SIGCHLD raises a RuntimeError when a worker is killed, perhaps before the wait.
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
