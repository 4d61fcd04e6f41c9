"""SIGTERM and SIGUSR1: a scheduler is about to take the machine, so save and leave, to be started again.

The handlers only take a note, and are installed before the training stack is imported: a signal during those seconds
would otherwise kill the process. Reading workers inherit them, and so outlive a signal that a scheduler sends to every
process of a job. Lightning's own handler is left out (``adapters.keep_signal_handlers``): it would end the process with
exit code 0, as if it were done, and among several processes it talks to the others and hangs.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType

EXIT_CODE = 143
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """Ends a training that was asked to leave; what can be kept is saved by then."""


@dataclass
class Notice:
    """Whether the process was asked to leave.

    Attributes:
        received: the signal that came, None before.
    """

    received: signal.Signals | None = None

    def note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Take a note of a signal; everything else happens between two batches."""
        self.received = signal.Signals(number)

    def install(self) -> None:
        """Take notes of the signals from now on."""
        for number in SIGNALS:
            signal.signal(number, self.note)


notice = Notice()
