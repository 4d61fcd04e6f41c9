"""Part of the start benchmark: what ends a run after its first step."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
from epoch_parts import children, cpu_seconds


class FirstStep(L.Callback):
    """Notes time and CPU seconds of the process and its workers after the first optimiser step, and ends them all.

    Args:
        out: the file for the note.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ARG002
        """Write and leave."""
        own, workers = os.getpid(), children()
        cpu = sum(cpu_seconds(pid) for pid in (own, *workers))
        self.out.write_text(json.dumps({"time": time.time(), "cpu": cpu}))
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)
