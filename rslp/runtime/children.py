"""Child processes that leave signals to their parent.

systemd, SLURM and a terminal send a signal to every process of a group. The parent alone acts on it: a child that ended
of itself would look like one that the kernel has killed.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.context import ForkContext, ForkProcess, SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess

_LEFT_TO_THE_PARENT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


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
