"""Optimiser and learning rates: AdamW with rates by depth, warm-up, plateau schedule, parts that are frozen for a time.

A group's rate at its k-th step (from 1) is min(1, k / w) times what its scheduler says, w being its ``warmup_steps``.
Steps are counted by group and only while it trains, so a group that is thawed late warms up then. The count is an entry
of the group, hence of the optimiser's state: a resumed run goes on with it. The rate itself is the scheduler's outside
of the step, so that warm-up goes with any scheduler.

A score stays at 0 until a model is better than its baseline; the learning rate must not fall meanwhile.

The optimiser has a group for each part from the start, with the part's own learning rate: parameters without gradients
are passed over, and at the thaw nothing has to be added. So every scheduler anneals the part like the rest. (Where a
group is added to a running optimiser, torch's schedulers either fail at their next step, having learnt the groups'
rates at the start, or do so later.)
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

STEPS = "warmup_steps"
DONE = "warmup_done"


def attach(optimizer: Optimizer) -> None:
    """Let an optimiser's groups warm up, if any of them asks for it in ``warmup_steps``."""
    if not any(group.get(STEPS) for group in optimizer.param_groups):
        return
    for group in optimizer.param_groups:
        group.setdefault(STEPS, 0)
        group.setdefault(DONE, 0)
    held: list[float] = []

    def lower(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        held[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if _warms(group):
                group["lr"] *= (group[DONE] + 1) / group[STEPS]

    def restore(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        for group, rate in zip(optimizer.param_groups, held, strict=True):
            group["lr"] = rate
            group[DONE] += _warms(group)

    optimizer.register_step_pre_hook(lower)
    optimizer.register_step_post_hook(restore)


def _warms(group: dict[str, Any]) -> bool:
    return group[DONE] < group[STEPS] and any(parameter.requires_grad for parameter in group["params"])


# An attribute of the scheduler, so that its state in a checkpoint holds it.
_LOSS = "loss_at_best"


def forgive_ties(scheduler: ReduceLROnPlateau, value: float, *, loss: float) -> None:
    """Before a step: make it no bad epoch if the value equals the best one so far and the loss is lower than with it.

    Args:
        scheduler: its ``threshold`` says by how much, relative to the loss.
        value: what it is about to be given, the lower the better.
        loss: the validation loss.
    """
    before = getattr(scheduler, _LOSS, math.inf)
    tie = value == scheduler.best and loss < before * (1 - scheduler.threshold)
    if tie:
        # The step adds one.
        scheduler.num_bad_epochs = -1
    if tie or value < scheduler.best:
        setattr(scheduler, _LOSS, loss)


ENCODER_PREFIX = "model.encoder."
_BLOCK = re.compile(r"\.(?:blocks|layers?)\.(\d+)\.")
# Parts of transformers that stand before the first block.
_BELOW = re.compile(r"embed|encoding|token|patch|pos_|month")
_OPTIMIZER_KEY = "model.init_args.optimizer.init_args"


@dataclass
class LayerwiseAdamW(OptimizerFactory):
    """AdamW (Loshchilov & Hutter 2019) with layer-wise decay of the learning rate (Clark et al. 2020; BEiT, MAE).

    A decoder's parameters train with ``lr``. An encoder's parameters at depth d of 0 … n + 1 (0 what embeds the input,
    1 … n the n blocks, n + 1 what comes after them) train with ``lr`` x ``encoder_lr_factor`` x
    ``layer_decay`` ^ (n + 1 - d).

    Attributes:
        lr: learning rate of the decoders.
        betas: decay rates of the moments.
        eps: term in the denominator.
        weight_decay: decay of the weights, times the learning rate.
        encoder_lr_factor: factor for the encoder.
        layer_decay: factor for each layer further down in the encoder; 1 treats them alike.
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
        """Refuse what can't be.

        Raises:
            ConfigError: a value out of its range.
        """
        for name, right, fits in (
            ("lr", "more than 0", self.lr > 0),
            ("encoder_lr_factor", "more than 0 (a callback rslp.train.Freeze freezes it)", self.encoder_lr_factor > 0),
            ("layer_decay", "more than 0, at most 1", 0 < self.layer_decay <= 1),
            ("warmup_steps", "0 or more", self.warmup_steps >= 0),
        ):
            if not fits:
                raise ConfigError(Problem(f"got {getattr(self, name)}; {right}", key=f"{_OPTIMIZER_KEY}.{name}"))

    def build(self, lm: LightningModule) -> torch.optim.Optimizer:
        """Make the optimiser, a group for each learning rate.

        Raises:
            ConfigError: ``layer_decay`` for an encoder without numbered blocks.
        """
        named = [(name, parameter) for name, parameter in lm.named_parameters() if parameter.requires_grad]
        depths, top = depths_of(name for name, _ in lm.named_parameters())
        if self.layer_decay < 1 and top == 0:
            what = "the encoder has no numbered blocks (blocks.N., layers.N.) to tell its layers by"
            raise ConfigError(Problem(what, key=f"{_OPTIMIZER_KEY}.layer_decay"))
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
    """Let an optimizer go through its parameters operation by operation instead of one by one, also on a CPU.

    The same bits in fewer calls; torch itself does so on a GPU alone.

    Args:
        optimizer: its groups are changed where nothing else was chosen.
    """
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


def depths_of(names: Iterable[str]) -> tuple[dict[str, int], int]:
    """The depth of each of the encoder's parameters, and the depth above its blocks.

    Returns:
        depths by name: 0 below the n blocks, 1 … n in them, n + 1 above them; and n + 1, or 0 without blocks.
    """
    inside = [name for name in names if name.startswith(ENCODER_PREFIX)]
    blocks = {name: int(found.group(1)) + 1 for name in inside if (found := _BLOCK.search(name))}
    top = max(blocks.values()) + 1 if blocks else 0
    below = {name for name in inside if _BELOW.search(name.removeprefix(ENCODER_PREFIX))}
    return {name: blocks.get(name, 0 if name in below else top) for name in inside}, top


_CALLBACKS_KEY = "trainer.callbacks"


class Freeze(Callback):
    """Freezes modules, and thaws them at an epoch.

    What is frozen follows from the epoch alone, so a run that goes on after a kill has nothing to restore. Parameters
    that the model itself holds constant stay so. A part that several of these name is frozen until the last of them
    thaws it, and takes that one's learning rate.

    Args:
        modules: dotted paths from the Lightning module, ``model.encoder`` or ``model.encoder.0.model.blocks.3``.
        thaw_at_epoch: the epoch, from 0, at whose begin they are thawed; never when None.
        lr_factor: the factor on their learning rate.
        warmup_steps: optimiser steps after the thaw over which their learning rate rises, see ``rslp.models.optim``.

    Raises:
        ConfigError: a value that can't be.
    """

    def __init__(
        self,
        modules: list[str] | str = "model.encoder",
        thaw_at_epoch: int | None = None,
        lr_factor: float = 1.0,
        warmup_steps: int = 0,
    ) -> None:
        for name, value, wrong, right in (
            ("thaw_at_epoch", thaw_at_epoch, thaw_at_epoch is not None and thaw_at_epoch < 1, "1 or more, or nothing"),
            ("lr_factor", lr_factor, lr_factor <= 0, "more than 0"),
            ("warmup_steps", warmup_steps, warmup_steps < 0, "0 or more"),
        ):
            if wrong:
                raise ConfigError(Problem(f"Freeze: {name} is {value}; {right}", key=_CALLBACKS_KEY))
        self.paths = [modules] if isinstance(modules, str) else list(modules)
        self.thaw_at_epoch = thaw_at_epoch
        self.lr_factor = lr_factor
        self.warmup_steps = warmup_steps
        self.parameters: list[nn.Parameter] = []

    @classmethod
    def settings_of(cls, unfreeze: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that mean what those of rslearn's FreezeUnfreeze do, which existing configs name."""
        return {
            "modules": ".".join(map(str, unfreeze.get("module_selector", ()))),
            "thaw_at_epoch": unfreeze.get("unfreeze_at_epoch"),
            "lr_factor": 1.0 / unfreeze.get("unfreeze_lr_factor", 1),
        }

    def frozen(self, epoch: int) -> bool:
        """Whether the modules are frozen in an epoch."""
        return self.thaw_at_epoch is None or epoch < self.thaw_at_epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the parameters, those of all such callbacks at once, before any of them is frozen."""
        if stage == "fit" and freeze_callbacks(trainer)[0] is self:
            for one in freeze_callbacks(trainer):
                one.parameters = [p for p in _parameters(pl_module, one.paths) if p.requires_grad]
            set_trainable(trainer, epoch=0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Freeze and thaw as the epoch wants, also where a run goes on inside it."""
        set_trainable(trainer, epoch=trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Freeze and thaw as the epoch wants."""
        set_trainable(trainer, epoch=trainer.current_epoch)


def _parameters(module: LightningModule, paths: Iterable[str]) -> list[nn.Parameter]:
    known = dict(module.named_modules())
    found: dict[nn.Parameter, None] = {}
    for path in paths:
        if path not in known:
            there = ", ".join(sorted(name for name in known if name.count(".") <= 1 and name))
            raise ConfigError(
                Problem(f"Freeze: the model has no module {path!r}; it has {there}, …", key=_CALLBACKS_KEY)
            )
        found |= dict.fromkeys(known[path].parameters())
    return list(found)


def freeze_callbacks(trainer: Trainer) -> list[Freeze]:
    """The trainer's callbacks of this kind; the one that thaws first comes first."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, Freeze)]
    return sorted(found, key=lambda stage: float("inf") if stage.thaw_at_epoch is None else stage.thaw_at_epoch)


def set_trainable(trainer: Trainer, *, epoch: int) -> None:
    """Let the gradients of an epoch be computed, and no others."""
    # In the order of the thaws: a parameter of several stages is left as the last of them wants it.
    for stage in freeze_callbacks(trainer):
        for parameter in stage.parameters:
            parameter.requires_grad = not stage.frozen(epoch)


def split_groups(optimizer: Optimizer, stages: Iterable[Freeze]) -> None:
    """Give the parameters of each stage groups of their own, with the stage's learning rate and warm-up."""
    owner = {parameter: stage for stage in stages for parameter in stage.parameters}
    for group in list(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        for stage in dict.fromkeys(owner.values()):
            theirs = [parameter for parameter in group["params"] if owner.get(parameter) is stage]
            if not theirs:
                continue
            group["params"] = [parameter for parameter in group["params"] if owner.get(parameter) is not stage]
            own = {"params": theirs, "lr": group["lr"] * stage.lr_factor}
            if stage.warmup_steps:
                own[STEPS] = stage.warmup_steps
            if "name" in options:
                # LearningRateMonitor refuses two groups of one name.
                own["name"] = f"{options['name']} ({', '.join(stage.paths)})"
            optimizer.add_param_group({**options, **own})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


class FrozenInEvalMode:
    """Keeps the frozen parts of a module in evaluation mode: no dropout, no dropped paths, no batch statistics.

    A part is frozen if it has parameters and none of them trains; those of batch norms do not count, since rslearn's
    and Lightning's freezing lets them train.
    """

    def __init__(self) -> None:
        self._resting: list[nn.Module] = []

    def follow(self, module: nn.Module) -> None:
        """Put what is frozen now into evaluation mode, and what was thawed back into training mode."""
        for part in self._resting:
            part.train()
        self._resting = list(_frozen_parts(module))
        for part in self._resting:
            part.eval()


def _frozen_parts(module: nn.Module) -> Iterable[nn.Module]:
    own = [p for part in module.modules() if not isinstance(part, _BatchNorm) for p in part.parameters(recurse=False)]
    if own and not any(parameter.requires_grad for parameter in own):
        yield module
    else:
        for child in module.children():
            yield from _frozen_parts(child)
