"""Output of a run: progress bars, without warnings of libraries and messages that other ranks repeat."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from rslp.runtime.world import World
from rslp.train.module import JointModule


class RunProgress(RichProgressBar):
    """Progress bars, and after each validation a line with the scores of the run and of its datasets."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the scores."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        if self.progress is None or not isinstance(pl_module, JointModule):
            return
        names = [None, *pl_module.datasets()]
        scores = [(name or "score", pl_module.score("val", name)) for name in names]
        shown = "  ".join(f"{name} {value:.3f}" for name, value in scores if value is not None)
        self.progress.console.print(f"{_position(trainer)}  {shown}", highlight=False, soft_wrap=True)


def _position(trainer: Trainer) -> str:
    """The epoch and, where optimiser steps are limited, the step that a training has reached, each with its limit."""
    epochs = trainer.max_epochs
    epoch = f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs is not None and epochs > 0 else "")
    return epoch if trainer.max_steps < 0 else f"{epoch}, step {trainer.global_step}/{trainer.max_steps}"


_LIBRARIES = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
# Warnings of libraries about their own future, or about what this code does on purpose.
_HINTS = (
    ".*does not have many workers",
    ".*is smaller than the logging interval",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "Found .* module\\(s\\) in eval mode",
    # The logged values are equal in all ranks already.
    "It is recommended to use `self.log\\(.*sync_dist=True",
    "The `srun` command is available on your system but is not used",
    # StepSampler yields every sample once.
    "You are using a custom batch sampler `StepSampler` for prediction",
)


def quiet_libraries(world: World) -> None:
    """Silence libraries' hints and progress notes, and warnings of rslp in all but one rank of each machine.

    Args:
        world: the ranks of the job.
    """
    _quiet_parser()
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _HINTS:
        warnings.filterwarnings("ignore", message=message)
    if world.local_rank:
        logging.getLogger("rslp").setLevel(logging.ERROR)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence all warnings of libraries inside the block."""
    _quiet_parser()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _quiet_parser() -> None:
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
