"""Callbacks and loggers of a run: the CSV log, gradient surgery, and steps whose loss or gradients are not finite."""

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
    """Appends logged values to ``metrics.csv``.

    One value a row: new names need no new columns, so a resumed run only appends, after dropping the rows that lie
    beyond the checkpoint it goes on from.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)
        self._epoch = 0.0

    @property
    def name(self) -> str:
        """Of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """One file a run, so no versions."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append values.

        Args:
            metrics: values by name; Lightning adds ``epoch``.
            step: optimiser steps so far.
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
        """Drop the rows of steps that will be trained again; a damaged file is set aside, and its sound rows are kept.

        Args:
            step: optimiser steps of the checkpoint that the run goes on from.

        Returns:
            what was damaged, in a line; empty if nothing was.
        """
        run, notes = RunDir(self._path.parent), list[str]()
        rows, state = run.logged(notes), run.read_state()
        if not self._path.exists():
            return "".join(notes)
        if state:
            # After a kill right below, what it says of the log would be wrong.
            run.write_state(**state | {"log_bytes": None, "log_crc32": None})
        aside = self._path.with_name(f"{self._path.name}.damaged")
        if notes:
            self._path.replace(aside)
        text = io.StringIO(newline="")
        csv.writer(text).writerows([_HEADER, *(row for row in rows if int(row[0]) < step)])
        # At once: a kill in the middle of it would lose what the run has logged so far.
        write_atomic(self._path, text.getvalue())
        return f"{notes[0]}; they stay, and the file as it was is {aside.name}" if notes else ""


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


OnNonfinite = Literal["stop", "skip"]
_MODULE_KEY = "model.init_args"
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
            raise ConfigError(Problem(f"got {self.on_nonfinite!r}; stop or skip", key=f"{_MODULE_KEY}.on_nonfinite"))
        if self.max_nonfinite < 0:
            raise ConfigError(Problem(f"got {self.max_nonfinite}; 0 or more", key=f"{_MODULE_KEY}.max_nonfinite"))


@dataclass(frozen=True)
class _BatchLosses:
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
        self._parts: list[_BatchLosses] = []

    def begin(self) -> None:
        """Forget the step before."""
        self._parts = []

    def note(self, batch: Batch, losses: Mapping[str, torch.Tensor]) -> None:
        """Keep a batch's losses, by name, until the step ends."""
        kept = {name: loss.detach() for name, loss in losses.items()}
        self._parts.append(_BatchLosses(batch.dataset, batch.metadatas, kept))

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


def _odd(parts: Iterable[_BatchLosses], parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether any process has a loss or a gradient that is not finite."""
    grads = [p.grad for p in parameters if p.grad is not None]
    terms = [loss.float().reshape(()) for part in parts for loss in part.losses.values()]
    # The largest value, not a sum of squares, which overflows where gradients are large, but finite.
    terms += [get_total_norm(grads, norm_type=float("inf")).float()] if grads else []
    odd = (~torch.isfinite(torch.stack(terms))).any().float() if terms else torch.zeros(())
    return bool(collectives.all_reduce_sum(odd).item())


def _described(parts: Iterable[_BatchLosses], module: torch.nn.Module, *, gradients: bool) -> str:
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
