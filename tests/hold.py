"""A training that waits at a known point, so that a test can take its machine away there and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rslp.runtime import preemption


class Hold(Callback):
    """Waits before the second batch of the second epoch while a file exists and nobody asks the run to leave."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        while (
            (trainer.current_epoch, batch_idx) == (1, 1)
            and self._path.exists()
            and preemption.preemption_flag.received is None
        ):
            time.sleep(0.05)


def holding(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run config that holds while a file exists; the file is made."""
    path.touch()
    hold = {"class_path": "tests.hold.Hold", "init_args": {"path": str(path)}}
    trainer = {**config["trainer"], "callbacks": [*config["trainer"]["callbacks"], hold]}
    return {**config, "trainer": trainer}


def until(happened: Callable[[], object], *, lives: Callable[[], bool], what: str) -> None:
    """Wait for what a process brings about, however slow the machine is; a process that ends without it has failed."""
    while not happened():
        alive = lives()
        # In this order: the process may have done it and ended in between.
        assert alive or happened(), what
        time.sleep(0.05)
