"""Optimiser and learning rates: layer-wise AdamW, warm-up, plateau schedule, freezing of modules.

Warm-up: at its k-th step (from 1) a parameter group's rate is min(1, k / w) times the scheduler's, where w is its
``warmup_steps``. A group counts steps only while it trains, so that one that thaws later warms up then. The count is an
entry of the group and so part of the optimiser's state, with which a run resumes.

Freezing: frozen parameters have groups in the optimiser from the start, since torch's schedulers do not support groups
that are added later. The optimiser skips parameters without gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rslearn.train.optimizer import OptimizerFactory
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rslp.errors import ConfigError, Problem
from rslp.upstream.adapters import ADAPTER

STEPS = "warmup_steps"
DONE = "warmup_done"


def attach_warmup(optimizer: Optimizer) -> None:
    """Add hooks to an optimiser that lower, during its steps alone, the rates of groups that still warm up."""
    if not any(group.get(STEPS) for group in optimizer.param_groups):
        return
    for group in optimizer.param_groups:
        group.setdefault(STEPS, 0)
        group.setdefault(DONE, 0)
    rates: list[float] = []

    def lower(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if _warms(group):
                group["lr"] *= (group[DONE] + 1) / group[STEPS]

    def restore(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            group[DONE] += _warms(group)

    optimizer.register_step_pre_hook(lower)
    optimizer.register_step_post_hook(restore)


def _warms(group: dict[str, Any]) -> bool:
    return group[DONE] < group[STEPS] and any(parameter.requires_grad for parameter in group["params"])


# Name of an attribute of the scheduler, which is saved with the scheduler's state.
_LOSS = "loss_at_best"


def forgive_ties(scheduler: ReduceLROnPlateau, value: float, *, loss: float) -> None:
    """Before a step of a plateau scheduler, let an improved loss count where the value equals the best so far.

    A score stays at 0, and so the value at 1, until a model is better than its baseline; meanwhile the learning rate
    must not fall.

    Args:
        scheduler: the scheduler; its ``threshold`` is the relative improvement of the loss that counts.
        value: the value of the coming step, the lower the better.
        loss: the validation loss.
    """
    best_loss = getattr(scheduler, _LOSS, math.inf)
    tie = value == scheduler.best and loss < best_loss * (1 - scheduler.threshold)
    if tie:
        # The step adds 1, which gives 0 bad epochs.
        scheduler.num_bad_epochs = -1
    if tie or value < scheduler.best:
        setattr(scheduler, _LOSS, loss)


ENCODER_PREFIX = "model.encoder."
_BLOCK = re.compile(r"\.(?:blocks|layers?)\.(\d+)\.")
# Parts of transformers before the first block.
_BELOW = re.compile(r"embed|encoding|token|patch|pos_|month")
_OPTIMIZER_KEY = "model.init_args.optimizer.init_args"


@dataclass
class LayerwiseAdamW(OptimizerFactory):
    """AdamW (Loshchilov & Hutter 2019) with layer-wise decay of the learning rate (Clark et al. 2020; BEiT, MAE).

    Decoders train with ``lr``. An encoder's parameters at depth d (0 the embedding of the input, 1 … n the n blocks,
    n + 1 the layers after them) train with ``lr`` x ``encoder_lr_factor`` x ``layer_decay`` ^ (n + 1 - d).

    Attributes:
        lr: learning rate of the decoders.
        betas: decay rates of the moments.
        eps: term in the denominator.
        weight_decay: decay of the weights, times the learning rate.
        encoder_lr_factor: factor on the encoder's learning rate.
        layer_decay: factor for each layer further from the output; 1 means the same rate in all layers.
        warmup_steps: optimiser steps over which the rates rise, see ``rslp.models.optim``.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    encoder_lr_factor: float = 1.0
    layer_decay: float = 1.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a value is out of its range.
        """
        for name, expected, valid in (
            ("lr", "more than 0", self.lr > 0),
            ("encoder_lr_factor", "more than 0 (a callback rslp.train.Freeze freezes it)", self.encoder_lr_factor > 0),
            ("layer_decay", "more than 0, at most 1", 0 < self.layer_decay <= 1),
            ("warmup_steps", "0 or more", self.warmup_steps >= 0),
        ):
            if not valid:
                raise ConfigError(Problem(f"got {getattr(self, name)}; {expected}", key=f"{_OPTIMIZER_KEY}.{name}"))

    def build(self, lm: LightningModule) -> torch.optim.Optimizer:
        """Make the optimiser, with a group for each learning rate.

        Raises:
            ConfigError: ``layer_decay`` for an encoder without numbered blocks.
        """
        named = [(name, parameter) for name, parameter in lm.named_parameters() if parameter.requires_grad]
        depths, top = depths_of(name for name, _ in lm.named_parameters())
        if self.layer_decay < 1 and top == 0:
            message = "the encoder has no numbered blocks (blocks.N., layers.N.) to tell its layers by"
            raise ConfigError(Problem(message, key=f"{_OPTIMIZER_KEY}.layer_decay"))
        groups: dict[str, dict[str, object]] = {}
        for name, parameter in named:
            label, rate = "decoders", self.lr
            if name in depths:
                label = f"encoder, layer {depths[name]}" if self.layer_decay < 1 else "encoder"
                rate *= self.encoder_lr_factor * self.layer_decay ** (top - depths[name])
            group = groups.setdefault(label, {"params": [], "lr": rate, "name": label, STEPS: self.warmup_steps})
            group["params"].append(parameter)  # type: ignore[attr-defined]
        return torch.optim.AdamW(
            list(groups.values()), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


def use_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer use torch's ``foreach`` implementation on a CPU too: fewer calls, the same bits.

    Groups for which ``foreach`` or ``fused`` was chosen stay as they are.
    """
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


def depths_of(names: Iterable[str]) -> tuple[dict[str, int], int]:
    """Compute the depth of each parameter of an encoder from its name.

    Returns:
        depths by name, 0 before the n blocks, 1 … n in them, n + 1 after them; and n + 1, or 0 without blocks.
    """
    encoder = [name for name in names if name.startswith(ENCODER_PREFIX)]
    blocks = {name: int(match.group(1)) + 1 for name in encoder if (match := _BLOCK.search(name))}
    top = max(blocks.values()) + 1 if blocks else 0
    below = {name for name in encoder if _BELOW.search(name.removeprefix(ENCODER_PREFIX))}
    return {name: blocks.get(name, 0 if name in below else top) for name in encoder}, top


_CALLBACKS_KEY = "trainer.callbacks"


class Freeze(Callback):
    """Freezes modules, and thaws them at the start of an epoch.

    It has no state, since the epoch alone decides what is frozen. Parameters that the model itself keeps constant stay
    constant. Parameters that several ``Freeze`` name thaw with the last of them, and take its learning rate.

    Args:
        modules: dotted paths from the Lightning module, ``model.encoder`` or ``model.encoder.0.model.blocks.3``.
        thaw_at_epoch: the epoch, from 0, at whose start they thaw; None means never.
        lr_factor: factor on their learning rate.
        warmup_steps: optimiser steps after the thaw over which their learning rate rises, see ``rslp.models.optim``.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        modules: list[str] | str = "model.encoder",
        thaw_at_epoch: int | None = None,
        lr_factor: float = 1.0,
        warmup_steps: int = 0,
    ) -> None:
        for name, value, invalid, expected in (
            ("thaw_at_epoch", thaw_at_epoch, thaw_at_epoch is not None and thaw_at_epoch < 1, "1 or more, or nothing"),
            ("lr_factor", lr_factor, lr_factor <= 0, "more than 0"),
            ("warmup_steps", warmup_steps, warmup_steps < 0, "0 or more"),
        ):
            if invalid:
                raise ConfigError(Problem(f"Freeze: {name} is {value}; {expected}", key=_CALLBACKS_KEY))
        self.paths = [modules] if isinstance(modules, str) else list(modules)
        self.thaw_at_epoch = thaw_at_epoch
        self.lr_factor = lr_factor
        self.warmup_steps = warmup_steps
        self.parameters: list[nn.Parameter] = []

    @classmethod
    def settings_of(cls, unfreeze: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that correspond to those of rslearn's FreezeUnfreeze in existing configs."""
        return {
            "modules": ".".join(map(str, unfreeze.get("module_selector", ()))),
            "thaw_at_epoch": unfreeze.get("unfreeze_at_epoch"),
            "lr_factor": 1.0 / unfreeze.get("unfreeze_lr_factor", 1),
        }

    def frozen(self, epoch: int) -> bool:
        """Whether the modules are frozen in an epoch."""
        return self.thaw_at_epoch is None or epoch < self.thaw_at_epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Collect the parameters of all ``Freeze`` callbacks at once, before any of them freezes some."""
        if stage == "fit" and freeze_callbacks(trainer)[0] is self:
            for callback in freeze_callbacks(trainer):
                callback.parameters = [p for p in _parameters(pl_module, callback.paths) if p.requires_grad]
                if callback.thaw_at_epoch is None and has_adapters(pl_module, callback.paths):
                    raise ConfigError(Problem(f"Freeze: {IDLE_ADAPTERS}", key=_CALLBACKS_KEY))
            set_trainable(trainer, epoch=0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Freeze and thaw for the epoch; here for a run that resumes inside one."""
        set_trainable(trainer, epoch=trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Freeze and thaw for the epoch."""
        set_trainable(trainer, epoch=trainer.current_epoch)


IDLE_ADAPTERS = "adapters would never train: `adapter` freezes the encoder itself; leave the callback out, or thaw"


def has_adapters(module: nn.Module, paths: Iterable[str]) -> bool:
    """Whether the modules with these paths have adapters, which have to train at some time."""
    inside = tuple(f"{path}." for path in paths)
    return any(name.startswith(inside) and ADAPTER in name for name, _ in module.named_parameters())


def _parameters(module: LightningModule, paths: Iterable[str]) -> list[nn.Parameter]:
    modules = dict(module.named_modules())
    parameters: dict[nn.Parameter, None] = {}
    for path in paths:
        if path not in modules:
            known = ", ".join(sorted(name for name in modules if name.count(".") <= 1 and name))
            message = f"Freeze: the model has no module {path!r}; it has {known}, …"
            raise ConfigError(Problem(message, key=_CALLBACKS_KEY))
        parameters |= dict.fromkeys(modules[path].parameters())
    return list(parameters)


def freeze_callbacks(trainer: Trainer) -> list[Freeze]:
    """The ``Freeze`` callbacks of a trainer, in the order in which they thaw."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    stages = [callback for callback in callbacks if isinstance(callback, Freeze)]
    return sorted(stages, key=lambda stage: float("inf") if stage.thaw_at_epoch is None else stage.thaw_at_epoch)


def set_trainable(trainer: Trainer, *, epoch: int) -> None:
    """Set ``requires_grad`` of all parameters of ``Freeze`` callbacks for an epoch."""
    # In the order of the thaws: for a parameter of several callbacks the last one decides.
    for stage in freeze_callbacks(trainer):
        for parameter in stage.parameters:
            parameter.requires_grad = not stage.frozen(epoch)


def split_groups(optimizer: Optimizer, stages: Iterable[Freeze]) -> None:
    """Move the parameters of each ``Freeze`` into groups with its learning rate and warm-up."""
    owner = {parameter: stage for stage in stages for parameter in stage.parameters}
    for group in list(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        for stage in dict.fromkeys(owner.values()):
            moved = [parameter for parameter in group["params"] if owner.get(parameter) is stage]
            if not moved:
                continue
            group["params"] = [parameter for parameter in group["params"] if owner.get(parameter) is not stage]
            changed = {"params": moved, "lr": group["lr"] * stage.lr_factor}
            if stage.warmup_steps:
                changed[STEPS] = stage.warmup_steps
            if "name" in options:
                # LearningRateMonitor refuses two groups of one name.
                changed["name"] = f"{options['name']} ({', '.join(stage.paths)})"
            optimizer.add_param_group({**options, **changed})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


class FrozenInEvalMode:
    """Keeps frozen submodules in evaluation mode: no dropout, no drop path, no batch statistics.

    A submodule is frozen if it has parameters and none of them trains. Parameters of batch norms are not considered,
    since rslearn's and Lightning's freezing lets them train.
    """

    def __init__(self) -> None:
        self._frozen: list[nn.Module] = []

    def update(self, module: nn.Module) -> None:
        """Put the frozen submodules of a module into evaluation mode, and thawed ones back into training mode."""
        for part in self._frozen:
            part.train()
        self._frozen = list(_frozen_parts(module))
        for part in self._frozen:
            part.eval()


def _frozen_parts(module: nn.Module) -> Iterable[nn.Module]:
    parts = [part for part in module.modules() if not isinstance(part, _BatchNorm)]
    parameters = [p for part in parts for p in part.parameters(recurse=False)]
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield module
    else:
        for child in module.children():
            yield from _frozen_parts(child)
