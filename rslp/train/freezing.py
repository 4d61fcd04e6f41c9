"""Parts of the model that do not train until an epoch, or ever.

The optimiser has a group for each part from the start, with the part's own learning rate: parameters without gradients
are passed over, and at the thaw nothing has to be added. So every scheduler anneals the part like the rest. (Where a
group is added to a running optimiser, torch's schedulers either fail at their next step, having learnt the groups'
rates at the start, or do so later.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from rslp.errors import ConfigError, Problem
from rslp.train.warmup import STEPS

_PLACE = "trainer.callbacks"


class Freeze(Callback):
    """Freezes modules, and thaws them at an epoch.

    What is frozen follows from the epoch alone, so a run that goes on after a kill has nothing to restore. Parameters
    that the model itself holds constant stay so. A part that several of these name is frozen until the last of them
    thaws it, and takes that one's learning rate.

    Args:
        modules: dotted paths from the Lightning module, ``model.encoder`` or ``model.encoder.0.model.blocks.3``.
        thaw_at_epoch: the epoch, from 0, at whose begin they are thawed; never when None.
        lr_factor: the factor on their learning rate.
        warmup_steps: optimiser steps after the thaw over which their learning rate rises, see ``rslp.train.warmup``.

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
                raise ConfigError(Problem(f"Freeze: {name} is {value}; {right}", key=_PLACE))
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
        if stage == "fit" and stages_of(trainer)[0] is self:
            for one in stages_of(trainer):
                one.parameters = [p for p in _parameters(pl_module, one.paths) if p.requires_grad]
            apply(trainer, epoch=0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Freeze and thaw as the epoch wants, also where a run goes on inside it."""
        apply(trainer, epoch=trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Freeze and thaw as the epoch wants."""
        apply(trainer, epoch=trainer.current_epoch)


def _parameters(module: LightningModule, paths: Iterable[str]) -> list[nn.Parameter]:
    known = dict(module.named_modules())
    found: dict[nn.Parameter, None] = {}
    for path in paths:
        if path not in known:
            there = ", ".join(sorted(name for name in known if name.count(".") <= 1 and name))
            raise ConfigError(Problem(f"Freeze: the model has no module {path!r}; it has {there}, …", key=_PLACE))
        found |= dict.fromkeys(known[path].parameters())
    return list(found)


def stages_of(trainer: Trainer) -> list[Freeze]:
    """The trainer's callbacks of this kind; the one that thaws first comes first."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, Freeze)]
    return sorted(found, key=lambda stage: float("inf") if stage.thaw_at_epoch is None else stage.thaw_at_epoch)


def apply(trainer: Trainer, *, epoch: int) -> None:
    """Let the gradients of an epoch be computed, and no others."""
    # In the order of the thaws: a parameter of several stages is left as the last of them wants it.
    for stage in stages_of(trainer):
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


class Resting:
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
