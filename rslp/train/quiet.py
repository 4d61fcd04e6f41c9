"""Output of a run: progress bars, without warnings of libraries and messages that other ranks repeat."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from rslp.io.terminal import copy_message
from rslp.runtime.world import World
from rslp.train.module import JointModule


class RunProgress(RichProgressBar):
    """Progress bars on a terminal, and after each validation a line: position, scores, time left of the training."""

    def __init__(self) -> None:
        super().__init__()
        self._began = (0.0, 0)
        if not sys.stdout.isatty():
            # Of a bar, a file would get its last state and no line break.
            self.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when and where the training began."""
        super().on_train_start(trainer, pl_module)
        self._began = (time.monotonic(), trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the epochs of the bar from 1, as everywhere else."""
        super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=_position(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, JointModule):
            return
        names = [None, *pl_module.datasets()]
        scores = [(name or "score", pl_module.score("val", name)) for name in names]
        parts = [_position(trainer), *(f"{name} {value:.3f}" for name, value in scores if value is not None)]
        line = "  ".join([*parts, *self._time_left(trainer)])
        if self.progress is not None:
            self.progress.console.print(line, highlight=False, soft_wrap=True)
        else:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        copy_message(line)

    def _time_left(self, trainer: Trainer) -> list[str]:
        """The time that the rest of the training takes at its present pace; nothing where it has no limit."""
        (began, first), step = self._began, trainer.global_step
        limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limits.append(step + (trainer.max_epochs - trainer.current_epoch - 1) * int(trainer.num_training_batches))
        if not limits or step <= first or (rest := min(limits) - step) <= 0:
            return []
        seconds = round((time.monotonic() - began) / (step - first) * rest)
        return [f"{timedelta(seconds=seconds)} left"]


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
    _show_warnings_once()
    if world.local_rank:
        logging.getLogger("rslp").setLevel(logging.ERROR)


def _show_warnings_once() -> None:
    """Show each warning once: Python shows it anew whenever a library has changed the filters meanwhile."""
    show = warnings.showwarning
    if getattr(show, "shown", None) is not None:
        return
    shown: set[tuple[type[Warning], str]] = set()

    def show_once(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if (category, str(message)) not in shown:
            shown.add((category, str(message)))
            show(message, category, *place, **more)

    show_once.shown = shown  # type: ignore[attr-defined]
    warnings.showwarning = show_once


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
