"""Lightning's trainer: signal handlers, loop counters, checkpoints, weight averages."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import get_swa_avg_fn

from rslp.errors import CheckpointError, chain


def backward(trainer: Trainer, loss: torch.Tensor) -> None:
    """Backpropagate one of a step's losses as Lightning does with the loss that ``training_step`` returns.

    Gradients are scaled for mixed precision, and callbacks see each backward pass, as with Lightning's accumulation.
    """
    trainer.strategy.backward(loss, None)


def keep_signal_handlers(trainer: Trainer) -> None:
    """Keep Lightning from replacing a process's signal handlers while it trains.

    Lightning's handler of SIGTERM broadcasts from rank 0 inside the handler: a signal to any rank hangs all of them.
    """
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]


def hand_checkpoint(trainer: Trainer, checkpoint: dict[str, Any], *, path: Path) -> None:
    """Make ``fit`` resume from a checkpoint in memory, where Lightning would read its file again.

    ``fit`` then raises a ``CheckpointError`` if the optimiser's state does not fit its groups of parameters.

    Args:
        trainer: the trainer, before ``fit``.
        checkpoint: the content of the file that ``fit`` is given as ``ckpt_path``; emptied once Lightning has it, to
            free its memory.
        path: the file, for messages.
    """
    restore = trainer.strategy.load_optimizer_state_dict

    def load(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ARG001
        content = dict(checkpoint)
        checkpoint.clear()
        return content

    def load_optimizer(checkpoint: Mapping[str, Any]) -> None:
        try:
            restore(checkpoint)
        except (ValueError, LookupError) as error:
            # From torch, which compares the groups of parameters.
            raise CheckpointError(
                f"{path} does not fit the optimiser of the config ({error}): with other groups of parameters, as "
                "after a change of optimizer or of what is frozen, a run can't go on; start another experiment"
            ) from error

    trainer.strategy.load_checkpoint = load  # type: ignore[method-assign]
    trainer.strategy.load_optimizer_state_dict = load_optimizer  # type: ignore[method-assign]


def _nothing() -> None:
    pass


def worker_death(error: Exception) -> str | None:
    """How a worker of torch's DataLoader died, in words, if that caused an error; torch has no type for it.

    Either the death itself is reported, or first the failure to fetch a tensor that the dead worker shared.
    """
    messages = " ".join(map(str, chain(error)))
    # The first is the cause of the second where it interrupts the wait for a batch, and alone names the signal.
    for end in (r"is killed by signal: \w+", "exited unexpectedly"):
        if match := re.search(rf"DataLoader worker \(pid.*?\) ({end})", messages):
            return match[1]
    frames = (Path(frame.filename).parts[-3:] for frame in traceback.extract_tb(error.__traceback__))
    fetching = ("torch", "multiprocessing", "reductions.py") in frames
    return "its samples can't be fetched any more" if fetching else None


def training_position(trainer: Trainer) -> tuple[int, int]:
    """The epoch in progress and the number of its optimiser steps done, where the next iterator has to begin."""
    loop = trainer.fit_loop
    epoch = completed_epochs(trainer)
    # An epoch counts as ready once it has begun, but not in a run that was restored inside it, which is `restarting`.
    inside = loop.restarting or loop.epoch_progress.current.ready > epoch
    batches: Any = loop.epoch_loop.batch_progress.current
    return epoch, batches.processed if inside else 0


def completed_epochs(trainer: Trainer) -> int:
    """Number of completed training epochs."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def let_schedulers_step(trainer: Trainer) -> None:
    """Let a plateau scheduler step at the end of this epoch, also if the run was resumed inside it.

    Lightning skips that step, since its checkpoints hold no metrics; ours are computed in this process.
    """
    trainer.fit_loop._restarting = False


def has_trained(trainer: Trainer) -> bool:
    """Whether a training epoch has begun; a validation is part of the training then."""
    progress: Any = trainer.fit_loop.epoch_progress.total
    return bool(progress.started)


def is_fitting(trainer: Trainer) -> bool:
    """Whether the trainer is inside ``fit``, including its validations."""
    return trainer.state.fn == TrainerFn.FITTING


def model_of(trainer: Trainer) -> torch.nn.Module | None:
    """The model of the trainer's module; None if it has none."""
    module = trainer.lightning_module
    model = getattr(module, "model", None)
    return model if isinstance(model, torch.nn.Module) else None


def scales_gradients(trainer: Trainer) -> bool:
    """Whether a gradient scaler is in use (half precision); it skips steps whose gradients overflow."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def dump_checkpoint(trainer: Trainer, *, weights_only: bool = False) -> dict[str, Any]:
    """Lightning's checkpoint as a mapping, not written to a file."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    return checkpoint


def dump_validated(trainer: Trainer) -> dict[str, Any]:
    """A checkpoint of the weights that were just validated: of their average, if a callback averages weights."""
    checkpoint = dump_checkpoint(trainer, weights_only=True)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, WeightAveraging):
            callback.on_save_checkpoint(trainer, trainer.lightning_module, checkpoint)
            for key in ("current_model_state", "averaging_state"):
                checkpoint.pop(key, None)
    return checkpoint


def average_numbers_alone(callbacks: Iterable[Callback]) -> None:
    """Make averages of weights copy integer buffers: rounding may turn 0.9 x 3 + 0.1 x 3 into 2."""
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and "multi_avg_fn" not in callback._kwargs:
            callback._kwargs["avg_fn"] = partial(_averaged, callback._kwargs.get("avg_fn") or get_swa_avg_fn())  # type: ignore[no-untyped-call]


def _averaged(average: Callable[..., torch.Tensor], *values: Any) -> torch.Tensor:
    return average(*values) if values[0].is_floating_point() else values[1]


def as_epoch_start(checkpoint: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Set a checkpoint's loop counters, in place, to "``epoch`` epochs are complete, the next has not begun".

    Lightning's own counters between two epochs are ambiguous: a restart skips or repeats the epoch, and misses the
    scheduler's step. With all four epoch counters equal and no batch in progress, a restart begins the next epoch.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    for span in ("total", "current"):
        counters = fit_loop["epoch_progress"][span]
        fit_loop["epoch_progress"][span] = dict.fromkeys(counters, epoch)
    batches = fit_loop["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    return {**checkpoint, "epoch": epoch}


def stopped_inside(trainer: Trainer) -> bool:
    """Whether the training has ended before the last batch of an epoch."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.processed < trainer.num_training_batches)


def as_inside_epoch(checkpoint: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Set a checkpoint's loop counters, in place, to "``epoch`` epochs are complete, the next is at this batch".

    Lightning counts an epoch that is stopped before its last batch as complete, and would never train on its rest.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    for span in ("total", "current"):
        begun = {name: epoch + (name in ("ready", "started")) for name in fit_loop["epoch_progress"][span]}
        fit_loop["epoch_progress"][span] = begun
        batches = fit_loop["epoch_loop.batch_progress"][span]
        # As in a checkpoint that is saved at the end of a batch.
        batches["completed"] = batches["processed"] - 1
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    return {**checkpoint, "epoch": epoch}
