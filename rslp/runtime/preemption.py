"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: somebody wants the machine, so save and leave, to be started again.

The handlers of a scheduler's signals only take a note, and are installed before the training stack is imported: a
signal during those seconds would otherwise kill the process. Child processes leave signals to this one
(``rslp.runtime.children``). Lightning's own handler is left out (``upstream.keep_signal_handlers``): it would end the
process with exit code 0, as if it were done, and among several processes it talks to the others and hangs.

Ctrl-C is noted while a training is at work, and ends the process at once before, or when it comes a second time. One of
several processes never ends at once: its starter passes on what the terminal or systemd has sent to all of them, and
kills them when a person insists.
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
    """Ends a training that was asked to leave; what can be kept is saved by then."""


@dataclass
class PreemptionFlag:
    """Whether the process was asked to leave.

    Attributes:
        received: the signal that came, None before.
        training: whether steps are being trained, so that there is something to save.
    """

    received: signal.Signals | None = None
    training: bool = False

    def note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Take a note of a signal; everything else happens between two batches."""
        self.received = signal.Signals(number)

    def install(self) -> None:
        """Take notes of the signals from now on; under ``nohup``, SIGHUP stays ignored."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.note)

    @contextmanager
    def noting_interrupts(self, *, alone: bool = True) -> Iterator[None]:
        """Take a note of Ctrl-C in this block, too; processes that were started to ignore it go on doing so.

        Args:
            alone: whether this is the only process of the job.
        """
        former = signal.getsignal(signal.SIGINT)

        def interrupted(number: int, frame: FrameType | None) -> None:
            if not self.training or (alone and self.received is not None):
                signal.default_int_handler(number, frame)
            if self.received is None:
                self.received = signal.SIGINT
                # A terminal that is gone takes no notice.
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
    """Raise ``Preempted`` if this process was asked to leave, while it does what needs no saving, such as packing."""
    if preemption_flag.received is not None:
        raise Preempted(preemption_flag.received.name)
