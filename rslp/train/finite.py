"""Steps whose loss or gradients are not finite: stop and say where it comes from, or leave the step out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rslearn.train.model_context import SampleMetadata
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from rslp.errors import ConfigError, Problem, TrainingError
from rslp.train import collectives
from rslp.train.batches import Batch

OnNonfinite = Literal["stop", "skip"]
_PLACE = "model.init_args"
_SHOWN = 5


@dataclass(frozen=True)
class FinitePolicy:
    """What is done about an optimiser step whose loss or gradients are not finite.

    Attributes:
        on_nonfinite: ``stop`` ends the run; ``skip`` leaves weights and optimiser as they are and goes on.
        max_nonfinite: so many steps may be skipped; one more ends the run.
    """

    on_nonfinite: OnNonfinite = "stop"
    max_nonfinite: int = 10

    def __post_init__(self) -> None:
        """Refuse what can't be.

        Raises:
            ConfigError: another word, or a negative limit.
        """
        if self.on_nonfinite not in ("stop", "skip"):
            raise ConfigError(Problem(f"got {self.on_nonfinite!r}; stop or skip", key=f"{_PLACE}.on_nonfinite"))
        if self.max_nonfinite < 0:
            raise ConfigError(Problem(f"got {self.max_nonfinite}; 0 or more", key=f"{_PLACE}.max_nonfinite"))


@dataclass(frozen=True)
class _Part:
    """What is kept of a batch until its step ends."""

    dataset: str
    metadatas: list[SampleMetadata]
    losses: dict[str, torch.Tensor]


class FiniteGuard:
    """Looks at each optimiser step before it is taken.

    The device is asked once a step: losses and gradients are put together there, and one number is fetched.

    Args:
        policy: what to do.
    """

    def __init__(self, policy: FinitePolicy) -> None:
        self.policy = policy
        self.skipped: list[str] = []
        self._parts: list[_Part] = []

    def begin(self) -> None:
        """Forget the step before."""
        self._parts = []

    def note(self, batch: Batch, losses: Mapping[str, torch.Tensor]) -> None:
        """Keep a batch's losses, by name, until the step ends."""
        kept = {name: loss.detach() for name, loss in losses.items()}
        self._parts.append(_Part(batch.dataset, batch.metadatas, kept))

    def check(self, module: torch.nn.Module, optimizer: Optimizer, *, step: int, gradients: bool = True) -> bool:
        """Judge the step whose gradients are there, summed over processes: all of them come to the same answer.

        Args:
            module: names the parameters.
            optimizer: its gradients are taken away if the step is skipped, which makes it do nothing.
            step: optimiser steps so far.
            gradients: whether to look at them; a scaler of half precision looks itself, and expects some to overflow.

        Returns:
            whether the step is taken.

        Raises:
            TrainingError: the policy is to stop, or more steps were skipped than it allows.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        parts, self._parts = self._parts, []
        if not _odd(parts, parameters if gradients else ()):
            return True
        message = f"step {step + 1}: {_described(parts, module, gradients=gradients)}"
        if self.policy.on_nonfinite == "stop":
            hint = (
                "lower the learning rate, set trainer.gradient_clip_val, or on_nonfinite: skip to leave such steps out"
            )
            raise TrainingError(f"{message}; {hint}")
        self.skipped.append(message)
        sys.stderr.write(f"skipped {message}\n")
        if len(self.skipped) > self.policy.max_nonfinite:
            listed = "\n  ".join(self.skipped)
            raise TrainingError(
                f"more than max_nonfinite = {self.policy.max_nonfinite} steps are not finite:\n  {listed}"
            )
        for parameter in parameters:
            parameter.grad = None
        return False

    def state_dict(self) -> dict[str, Any]:
        """The skipped steps, for a checkpoint."""
        return {"skipped": list(self.skipped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a run's record."""
        self.skipped = list(state["skipped"])


def _odd(parts: Iterable[_Part], parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether any process has a loss or a gradient that is not finite."""
    grads = [p.grad for p in parameters if p.grad is not None]
    terms = [loss.float().reshape(()) for part in parts for loss in part.losses.values()]
    # The largest value, not a sum of squares, which overflows where gradients are large, but finite.
    terms += [get_total_norm(grads, norm_type=float("inf")).float()] if grads else []
    odd = (~torch.isfinite(torch.stack(terms))).any().float() if terms else torch.zeros(())
    return bool(collectives.summed(odd).item())


def _described(parts: Iterable[_Part], module: torch.nn.Module, *, gradients: bool) -> str:
    """Datasets, samples, losses and parameters that are not finite, in one line."""
    said = []
    for part in parts:
        odd = {name: float(loss) for name, loss in part.losses.items() if not bool(torch.isfinite(loss))}
        if odd:
            shown = ", ".join(f"{name} = {value}" for name, value in odd.items())
            samples = ", ".join(f"{m.window_group}/{m.window_name}" for m in part.metadatas)
            said.append(f"the loss of dataset {part.dataset!r} is not finite ({shown}) with the samples {samples}")
    if not said:
        said.append(f"the losses of {', '.join(sorted({part.dataset for part in parts}))} are finite here")
    named = list(module.named_parameters())
    weights = [name for name, p in named if not bool(torch.isfinite(p).all())]
    said += [f"weights are not finite: {_some(weights, len(named))}"] if weights else []
    if gradients:
        of = [(name, p.grad) for name, p in named if p.grad is not None]
        odd_gradients = [name for name, grad in of if not bool(torch.isfinite(grad).all())]
        said += [f"gradients are not finite: {_some(odd_gradients, len(of))}"] if odd_gradients else []
    return "; ".join(said)


def _some(names: list[str], total: int) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more} ({len(names)} of {total} parameters)"
