"""The CSV log of a run, gradient surgery (PCGrad), and the guard against losses and gradients that are not finite."""

from __future__ import annotations

import csv
import io
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from rslearn.train.model_context import SampleMetadata
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from rslp.data.batches import Batch
from rslp.errors import ConfigError, Problem, TrainingError
from rslp.io import append, write_atomic
from rslp.rundir import RunDir
from rslp.runtime import collectives

_HEADER = ("step", "epoch", "name", "value")


class MetricsLog(Logger):
    """Appends logged values to ``metrics.csv``, one value a row, so that a new name needs no new column.

    A resumed run first drops the rows of steps after its checkpoint.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)
        self._epoch = 0.0

    @property
    def name(self) -> str:
        """The logger's name."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: a run has one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append values.

        Args:
            metrics: values by name; Lightning adds ``epoch``.
            step: number of optimiser steps so far.
        """
        self._epoch = metrics.get("epoch", self._epoch)
        rows = [(step, int(self._epoch), name, value) for name, value in metrics.items() if name != "epoch"]
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        if not self._path.exists() or not self._path.stat().st_size:
            writer.writerow(_HEADER)
        writer.writerows(rows)
        append(self._path, text.getvalue().encode())

    @rank_zero_only
    def rewind(self, step: int) -> str:
        """Drop the rows of steps that will be trained again; of a damaged file, keep the readable rows and a copy.

        Args:
            step: number of optimiser steps at the checkpoint that the run resumes from.

        Returns:
            one line about the damage; empty if there is none.
        """
        run, notes = RunDir(self._path.parent), list[str]()
        rows, state = run.logged(notes), run.read_state()
        if not self._path.exists():
            return "".join(notes)
        if state:
            # Clear the log's size and checksum first: a kill below would leave wrong ones.
            run.write_state(**state | {"log_bytes": None, "log_crc32": None})
        aside = self._path.with_name(f"{self._path.name}.damaged")
        if notes:
            self._path.replace(aside)
        text = io.StringIO(newline="")
        csv.writer(text).writerows([_HEADER, *(row for row in rows if int(row[0]) < step)])
        # Atomic: a kill during the write must not lose the log.
        write_atomic(self._path, text.getvalue())
        return f"{notes[0]}; they stay, and the file as it was is {aside.name}" if notes else ""


class MiniPCGrad(Callback):
    """Projects conflicting gradients of a step's batches (PCGrad, Yu et al. 2020, arXiv 2001.06782).

    A form that needs the memory of one more gradient: for each parameter, where the gradient g of a batch and the sum s
    of the gradients of the batches before it have g . s < 0, g becomes g - (g . s / s . s) s. It has an effect only in
    steps of several batches (``datasets_per_step``, ``accumulate_grad_batches``).

    Args:
        selectors: parameters whose name contains one of these are projected.
        deselectors: except those whose name contains one of these.
        only_monitor: log the mean cosine between gradients, and change nothing.

    Raises:
        ConfigError: several ranks train, each of which has only a part of a batch's gradient.
    """

    def __init__(self, selectors: list[str], deselectors: list[str] | None = None, only_monitor: bool = False) -> None:
        self._selectors = selectors
        self._deselectors = deselectors or []
        self._only_monitor = only_monitor
        self._sums: dict[str, torch.Tensor] = {}
        self._cosines: list[torch.Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Refuse to train with several ranks."""
        if trainer.world_size > 1:
            message = f"MiniPCGrad needs whole gradients, so it runs in one process; there are {trainer.world_size}"
            raise ConfigError(Problem(message, key="trainer.callbacks"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Reset, at the start of a step."""
        self._sums, self._cosines = {}, []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Project a batch's gradient; ``grad`` is its sum with those of the batches before."""
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
        gradient = parameter.grad.detach() - before
        product, square = (gradient * before).sum(), (before * before).sum()
        self._cosines.append(product / (square.sqrt() * gradient.norm()).clamp(min=torch.finfo(gradient.dtype).tiny))
        if not self._only_monitor and product < 0:
            parameter.grad = before + gradient - product / square * before

    def _is_chosen(self, name: str) -> bool:
        return any(part in name for part in self._selectors) and not any(part in name for part in self._deselectors)


OnNonfinite = Literal["stop", "skip"]
_MODULE_KEY = "model.init_args"
_SHOWN = 5


@dataclass(frozen=True)
class FinitePolicy:
    """Whether optimiser steps whose loss or gradients are not finite end the run or are skipped.

    Attributes:
        on_nonfinite: ``stop`` ends the run; ``skip`` leaves weights and optimiser unchanged and continues.
        max_nonfinite: how many steps may be skipped; one more ends the run.
    """

    on_nonfinite: OnNonfinite = "stop"
    max_nonfinite: int = 10

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: ``on_nonfinite`` is neither stop nor skip, or ``max_nonfinite`` is negative.
        """
        if self.on_nonfinite not in ("stop", "skip"):
            raise ConfigError(Problem(f"got {self.on_nonfinite!r}; stop or skip", key=f"{_MODULE_KEY}.on_nonfinite"))
        if self.max_nonfinite < 0:
            raise ConfigError(Problem(f"got {self.max_nonfinite}; 0 or more", key=f"{_MODULE_KEY}.max_nonfinite"))


@dataclass(frozen=True)
class _BatchLosses:
    """The losses of one batch of the current step."""

    dataset: str
    metadatas: list[SampleMetadata]
    losses: dict[str, torch.Tensor]


class FiniteGuard:
    """Checks before each optimiser step that losses and gradients are finite.

    The check is one reduction on the device, and copies one number from it.

    Args:
        policy: whether steps that are not finite end the run.
    """

    def __init__(self, policy: FinitePolicy) -> None:
        self.policy = policy
        self.skipped: list[str] = []
        self._batches: list[_BatchLosses] = []

    def begin(self) -> None:
        """Start a step."""
        self._batches = []

    def note(self, batch: Batch, losses: Mapping[str, torch.Tensor]) -> None:
        """Add a batch's losses, by name."""
        detached = {name: loss.detach() for name, loss in losses.items()}
        self._batches.append(_BatchLosses(batch.dataset, batch.metadatas, detached))

    def check(self, module: torch.nn.Module, optimizer: Optimizer, *, step: int, gradients: bool = True) -> bool:
        """Decide on the current step, whose gradients are summed over ranks; all ranks decide alike.

        Args:
            module: has the names of the parameters.
            optimizer: to skip the step, the gradients of its parameters are set to None.
            step: number of optimiser steps so far.
            gradients: whether to check gradients; False with a gradient scaler, which expects some to overflow.

        Returns:
            whether the step is taken.

        Raises:
            TrainingError: the step is not finite and the policy is to stop, or too many steps were skipped.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        batches, self._batches = self._batches, []
        if not _any_nonfinite(batches, parameters if gradients else ()):
            return True
        message = f"step {step + 1}: {_description(batches, module, gradients=gradients)}"
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
        """Restore the skipped steps of a resumed run."""
        self.skipped = list(state["skipped"])


def _any_nonfinite(batches: Iterable[_BatchLosses], parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether any process has a loss or a gradient that is not finite."""
    grads = [p.grad for p in parameters if p.grad is not None]
    terms = [loss.float().reshape(()) for batch in batches for loss in batch.losses.values()]
    # The largest absolute value: a sum of squares may overflow where all gradients are finite.
    terms += [get_total_norm(grads, norm_type=float("inf")).float()] if grads else []
    nonfinite = (~torch.isfinite(torch.stack(terms))).any().float() if terms else torch.zeros(())
    return bool(collectives.all_reduce_sum(nonfinite).item())


def _description(batches: Iterable[_BatchLosses], module: torch.nn.Module, *, gradients: bool) -> str:
    """One line with the datasets, samples, losses and parameters that are not finite."""
    facts = []
    for batch in batches:
        losses = {name: float(loss) for name, loss in batch.losses.items() if not bool(torch.isfinite(loss))}
        if losses:
            shown = ", ".join(f"{name} = {value}" for name, value in losses.items())
            samples = ", ".join(f"{m.window_group}/{m.window_name}" for m in batch.metadatas)
            facts.append(f"the loss of dataset {batch.dataset!r} is not finite ({shown}) with the samples {samples}")
    if not facts:
        facts.append(f"the losses of {', '.join(sorted({batch.dataset for batch in batches}))} are finite here")
    named = list(module.named_parameters())
    weights = [name for name, p in named if not bool(torch.isfinite(p).all())]
    facts += [f"weights are not finite: {_some(weights, len(named))}"] if weights else []
    if gradients:
        grads = [(name, p.grad) for name, p in named if p.grad is not None]
        not_finite = [name for name, grad in grads if not bool(torch.isfinite(grad).all())]
        facts += [f"gradients are not finite: {_some(not_finite, len(grads))}"] if not_finite else []
    return "; ".join(facts)


def _some(names: list[str], total: int) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more} ({len(names)} of {total} parameters)"
