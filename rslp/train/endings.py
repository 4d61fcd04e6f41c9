"""Why a training ended: at the limits of its config, or before them because something stopped it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from rslp.files import read_yaml

# The arguments of the trainer that may stop a training before its limits.
_STOPPING = ("callbacks", "max_time")


def reached(trainer: Trainer, *, epoch: int, step: int) -> bool:
    """Whether so many epochs and optimiser steps are all that the config wants; -1 is no limit."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return (epochs is not None and 0 <= epochs <= epoch) or 0 <= steps <= step


def early(trainer: Trainer, config: Path) -> dict[str, str] | None:
    """What stopped a training before its limits; None if nothing did.

    Args:
        trainer: the trainer, after the training.
        config: the run's config.

    Returns:
        ``by``: in words what stopped it; ``of``: what it had before it; ``settings``: see ``stopping_settings``.
    """
    if not trainer.should_stop or reached(trainer, epoch=trainer.current_epoch, step=trainer.global_step):
        return None
    limited = trainer.max_epochs is not None and trainer.max_epochs >= 0
    limit = f"{trainer.max_epochs} epochs" if limited else f"{trainer.max_steps} steps"
    return {"by": _culprit(trainer), "of": limit, "settings": stopping_settings(config)}


def _culprit(trainer: Trainer) -> str:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            return f"EarlyStopping ({(callback.stopping_reason_message or callback.monitor).strip().rstrip('.')})"
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return "its time limit (max_time)"
    own = [
        type(one).__name__ for one in callbacks if type(one).__module__.partition(".")[0] not in ("rslp", "lightning")
    ]
    return f"a callback ({' or '.join(own)})" if own else "a callback"


def stopping_settings(config: Path) -> str:
    """A hash of what in a run config may stop a training before its limits: with another one it goes on."""
    trainer = read_yaml(config).data.get("trainer") or {}
    said = {key: trainer[key] for key in _STOPPING if trainer.get(key)}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def fit_to_callbacks(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Change the states of callbacks in a checkpoint to what the config says now.

    Early stopping would restore the patience that it had, whatever the config says since. What a callback left that the
    config has no more is dropped: Lightning would ask for the callback back, which was taken out to go on.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    states = checkpoint.get("callbacks") or {}
    checkpoint["callbacks"] = {one.state_key: states[one.state_key] for one in callbacks if one.state_key in states}
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
            state |= {"patience": callback.patience, "stopping_reason": EarlyStoppingReason.NOT_STOPPED.value}
