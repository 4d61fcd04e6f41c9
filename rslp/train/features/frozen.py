"""How long the encoder is frozen, and up to where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from rslearn.train.callbacks.freeze_unfreeze import FreezeUnfreeze

from rslp.train.freezing import Freeze, stages_of

_WHOLE = {"model.encoder", "model.encoder.0"}


def frozen_depth(encoder: Iterable[torch.nn.Module]) -> int:
    """How many of the encoder's modules, from the first, give the same features whenever they are asked.

    Nothing in them trains or is in training mode; a module without parameters ends the row.
    """
    depth = 0
    for module in encoder:
        parameters = list(module.parameters())
        if not parameters or any(parameter.requires_grad for parameter in parameters):
            break
        if any(part.training for part in module.modules()):
            break
        depth += 1
    return depth


def frozen_epochs(trainer: Trainer, modules: Iterable[torch.nn.Module]) -> float:
    """In how many epochs of the run nothing in these modules trains; infinite if the run has no last epoch."""
    last = trainer.max_epochs
    end = math.inf if last is None or last < 0 else float(last)
    parameters = {parameter for module in modules for parameter in module.parameters()}
    thaws: dict[torch.nn.Parameter, int | None] = {}
    for stage in stages_of(trainer):  # of several stages the last one counts
        thaws |= {p: stage.thaw_at_epoch for p in stage.parameters if p in parameters}
    return min([end, *(float(epoch) for epoch in thaws.values() if epoch is not None)])


def validations(trainer: Trainer, epochs: float) -> float:
    """How often a run validates in so many epochs, about."""
    inside = trainer.val_check_interval
    often = 1 / inside if isinstance(inside, float) and inside > 0 else 1
    return epochs * often / (trainer.check_val_every_n_epoch or 1)


def stays_frozen(config: Mapping[str, Any]) -> bool:
    """Whether a run config freezes the whole encoder and never thaws it: its features serve other heads too."""
    for callback in (config.get("trainer") or {}).get("callbacks") or []:
        name = str(callback.get("class_path", "")).rpartition(".")[2]
        given = callback.get("init_args") or {}
        if name == FreezeUnfreeze.__name__:
            given = Freeze.settings_of(given)
        elif name != Freeze.__name__:
            continue
        modules = given.get("modules", "model.encoder")
        paths = {modules} if isinstance(modules, str) else set(modules)
        if given.get("thaw_at_epoch") is None and paths & _WHOLE:
            return True
    return False
