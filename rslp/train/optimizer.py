"""AdamW with learning rates by depth: the encoder slower than the decoders, its first layers slower than its last."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning import LightningModule
from rslearn.train.optimizer import OptimizerFactory

from rslp.errors import ConfigError, Problem
from rslp.train.warmup import STEPS

ENCODER = "model.encoder."
_BLOCK = re.compile(r"\.(?:blocks|layers?)\.(\d+)\.")
# Parts of transformers that stand before the first block.
_BELOW = re.compile(r"embed|encoding|token|patch|pos_|month")
_PLACE = "model.init_args.optimizer.init_args"


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
        warmup_steps: optimiser steps over which the rates rise, see ``rslp.train.warmup``.
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
                raise ConfigError(Problem(f"got {getattr(self, name)}; {right}", key=f"{_PLACE}.{name}"))

    def build(self, lm: LightningModule) -> torch.optim.Optimizer:
        """Make the optimiser, a group for each learning rate.

        Raises:
            ConfigError: ``layer_decay`` for an encoder without numbered blocks.
        """
        named = [(name, parameter) for name, parameter in lm.named_parameters() if parameter.requires_grad]
        depths, top = depths_of(name for name, _ in lm.named_parameters())
        if self.layer_decay < 1 and top == 0:
            what = "the encoder has no numbered blocks (blocks.N., layers.N.) to tell its layers by"
            raise ConfigError(Problem(what, key=f"{_PLACE}.layer_decay"))
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


def together(optimizer: torch.optim.Optimizer) -> None:
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
    inside = [name for name in names if name.startswith(ENCODER)]
    blocks = {name: int(found.group(1)) + 1 for name in inside if (found := _BLOCK.search(name))}
    top = max(blocks.values()) + 1 if blocks else 0
    below = {name for name in inside if _BELOW.search(name.removeprefix(ENCODER))}
    return {name: blocks.get(name, 0 if name in below else top) for name in inside}, top
