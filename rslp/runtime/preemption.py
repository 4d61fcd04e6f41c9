"""Preemption: signals after which a run saves a checkpoint and ends, to be resumed.

The handlers of SIGTERM, SIGUSR1 and SIGHUP only set a flag. They are installed before the training stack is imported,
since a signal during those seconds would otherwise kill the process. Child processes leave signals to this one (see
``children``). Lightning's own handler is not used (``upstream.keep_signal_handlers``): it ends the process with exit
code 0, as if the run were complete, and hangs if there are several ranks.

Ctrl-C sets the flag during a training, and ends the process at once otherwise, or if it is pressed twice. A rank of
several never ends at once: its launcher forwards signals to all ranks, and kills them if Ctrl-C is pressed twice.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_NOTED = b"\ninterrupted: the run saves after this step and leaves; Ctrl-C again ends it at once\n"


class Preempted(BaseException):
    """Ends a preempted training, after its checkpoint was saved."""


@dataclass
class PreemptionFlag:
    """Whether the process was asked by a signal to save and end.

    Attributes:
        received: the signal that was received; None before.
        training: whether a training is running, which can save a checkpoint.
    """

    received: signal.Signals | None = None
    training: bool = False

    def note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Signal handler: set the flag, which is read between two batches."""
        self.received = signal.Signals(number)

    def install(self) -> None:
        """Install the handler for all signals; under ``nohup``, SIGHUP stays ignored."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.note)

    def uninstall(self) -> None:
        """Let the signals end the process again, for work that needs no checkpoint."""
        for number in SIGNALS:
            if signal.getsignal(number) == self.note:
                signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def noting_interrupts(self, *, alone: bool = True) -> Iterator[None]:
        """Handle Ctrl-C in this block, too, unless the process was started to ignore it.

        Args:
            alone: whether this is the only process of the job.
        """
        former = signal.getsignal(signal.SIGINT)

        def interrupted(number: int, frame: FrameType | None) -> None:
            if not self.training or (alone and self.received is not None):
                signal.default_int_handler(number, frame)
            if self.received is None:
                self.received = signal.SIGINT
                # The terminal may be gone.
                with suppress(OSError):
                    os.write(2, _NOTED)

        if former is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, interrupted)
        try:
            yield
        finally:
            self.training = False
            signal.signal(signal.SIGINT, former)


preemption_flag = PreemptionFlag()


def raise_if_preempted() -> None:
    """Raise ``Preempted`` if a signal was received; for work that needs no checkpoint, such as packing."""
    if preemption_flag.received is not None:
        raise Preempted(preemption_flag.received.name)
