"""What happens to a run in these tests: it is slow, it waits for the scheduler, or it fails for a while."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rslp.runtime import preemption


class WaitForWarning(Callback):
    """Goes no further than a step before the scheduler has warned the process; a job that was queued again runs on."""

    def __init__(self, step: int, patience: float = 240.0) -> None:
        self.step = step
        self.patience = patience

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        end = time.monotonic() + self.patience
        while trainer.global_step == self.step and not int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            if preemption.preemption_flag.received or time.monotonic() > end:
                break
            time.sleep(0.05)


class FailFirst(Callback):
    """Fails in the middle of a step, as often as it is told to; counts in a file."""

    def __init__(self, file: str, times: int) -> None:
        self.file = Path(file)
        self.times = times

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        failed = int(self.file.read_text()) if self.file.exists() else 0
        if trainer.global_step >= 2 and failed < self.times:
            self.file.write_text(str(failed + 1))
            raise ArithmeticError("a fault that comes and goes")
