"""Gradient surgery between the batches of an optimiser step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from rslp.errors import ConfigError, Problem


class MiniPCGrad(Callback):
    """Takes out of each batch's gradient what works against the gradient of the step's batches before it.

    A form of PCGrad (Yu et al. 2020, arXiv 2001.06782) in the memory of one more gradient: parameter by parameter,
    where the gradient g of a batch and the sum s of those before it have g . s < 0, g becomes g - (g . s / s . s) s.
    It acts within a step, so it does nothing unless a step has several batches (``datasets_per_step``,
    ``accumulate_grad_batches``).

    Args:
        selectors: parameters whose name contains one of these are treated.
        deselectors: but not those whose name contains one of these.
        only_monitor: log the angles, and change nothing.

    Raises:
        ConfigError: several processes train, each of which has but a part of a batch's gradient.
    """

    def __init__(self, selectors: list[str], deselectors: list[str] | None = None, only_monitor: bool = False) -> None:
        self._selectors = selectors
        self._deselectors = deselectors or []
        self._only_monitor = only_monitor
        self._sums: dict[str, torch.Tensor] = {}
        self._cosines: list[torch.Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Refuse several processes."""
        if trainer.world_size > 1:
            what = f"MiniPCGrad needs whole gradients, so it runs in one process; there are {trainer.world_size}"
            raise ConfigError(Problem(what, key="trainer.callbacks"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Begin a step."""
        self._sums, self._cosines = {}, []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Compare a batch's gradient with those before it; ``grad`` holds the sum of all."""
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is None or not self._is_chosen(name):
                continue
            before = self._sums.get(name)
            if before is not None:
                self._project(parameter, before)
            self._sums[name] = parameter.grad.detach().clone()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Log the mean cosine between a batch's gradient and those before it."""
        if self._cosines:
            pl_module.log("train/gradient_cosine", torch.stack(self._cosines).mean(), on_step=True, on_epoch=False)
        self._sums = {}

    def _project(self, parameter: torch.nn.Parameter, before: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        own = parameter.grad.detach() - before
        product, square = (own * before).sum(), (before * before).sum()
        self._cosines.append(product / (square.sqrt() * own.norm()).clamp(min=torch.finfo(own.dtype).tiny))
        if not self._only_monitor and product < 0:
            parameter.grad = before + own - product / square * before

    def _is_chosen(self, name: str) -> bool:
        return any(part in name for part in self._selectors) and not any(part in name for part in self._deselectors)
