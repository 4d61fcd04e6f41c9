"""A callback that writes down what the trainer does; runs name it by its class path."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

# What the callbacks of the run at work have seen.
SEEN: dict[str, Any] = {}


class Recorder(Callback):
    """Counts, and global settings of torch while a run is at work."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settings that hold from here on."""
        SEEN["deterministic"] = torch.are_deterministic_algorithms_enabled()
        SEEN["benchmark"] = torch.backends.cudnn.benchmark
        SEEN["device"] = str(pl_module.device)
        SEEN["loggers"] = [type(one).__name__ for one in trainer.loggers]
        SEEN["callbacks"] = sorted(type(one).__name__ for one in trainer.callbacks)  # type: ignore[attr-defined]
        SEEN["profiler"] = type(trainer.profiler).__name__  # type: ignore[attr-defined]
        SEEN["plugins"] = type(trainer.precision_plugin).__name__

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loaders that were made for training."""
        SEEN.setdefault("loaders", set()).add(id(trainer.train_dataloader))

    def on_train_batch_start(self, *_: Any) -> None:
        """Settings inside a step."""
        SEEN["anomaly"] = torch.is_anomaly_enabled()

    def on_sanity_check_start(self, *_: Any) -> None:
        """Whether validation batches were tried before training."""
        SEEN["sanity"] = True

    def on_validation_batch_start(self, *_: Any) -> None:
        """Batches of validation."""
        SEEN["validated"] = SEEN.get("validated", 0) + 1
