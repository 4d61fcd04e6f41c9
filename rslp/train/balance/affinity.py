"""Which datasets go together: how a step on one changes the losses of the others (TAG, Fifty et al. 2021)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from rslearn.train.model_context import ModelContext
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import bootstrap

from rslp.data.batches import Batch
from rslp.errors import ConfigError, Problem
from rslp.io import write_json
from rslp.models.joint import JointModel
from rslp.rundir import RunDir
from rslp.runtime.seeds import seed_torch, seeded, stable_seed
from rslp.train.balance.aggregation import shared_parameters

Array = NDArray[np.float64]
_KEY = "trainer.callbacks"
# The share of a run's passes through the model that measurements may take, as a fraction of the others.
_SHARE = 0.25
# Fewer measurements have no interval.
_FEWEST = 5
_RULE = (
    "groups are merged, those with the highest affinity first, while the mean affinity between two groups, over both "
    "directions, is above 0; an affinity whose interval includes 0 counts as 0"
)


class Affinity(Callback):
    """Measures, during a joint run, how a step on one dataset changes the losses of the others.

    A measurement has the last batch of each dataset. For datasets i and j, on the parameters that all datasets share,

        cosine[i][j] = g_i . g_j / (|g_i| |g_j|)
        affinity[i][j] = 1 - L_j(shared - h g_i / |g_i|) / L_j(shared)

    with losses L, their gradients g, and the length h of the run's own last step. So an affinity is the share of the
    loss of j that a step on i takes away; below 0, the step does harm. The run itself does not change. Means over the
    measurements, their 95 % intervals (bootstrap) and suggested groups are written to ``affinity.json``.

    Args:
        every_n_steps: optimiser steps between measurements; by default so many that measurements take at most a quarter
            of what the rest of the training takes, counted in passes through the model.

    Raises:
        ConfigError: ``every_n_steps`` is less than 1; at the start of a training: the run has one dataset, several
            processes, or scaled gradients.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(Problem(f"Affinity: every_n_steps is {every_n_steps}; 1 or more", key=_KEY))
        self._every = every_n_steps
        self._model: JointModel
        self._shared: list[torch.nn.Parameter]
        # The step from which on the next measurement is due; it waits for a batch of each dataset in the epoch.
        self._due = 0
        self._batches: dict[str, Batch] = {}
        self._before: list[torch.Tensor] = []
        # Of each measurement the affinities, then the cosines: datasets x datasets.
        self.measurements: list[list[list[list[float]]]] = []
        self.datasets: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far."""
        return {"measurements": list(self.measurements), "due": self._due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the measurements of a resumed run."""
        self.measurements, self._due = list(state_dict["measurements"]), state_dict["due"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the steps to measure at, see the class."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.datasets = sorted(data.data_modules)
        for fault, message in (
            (len(self.datasets) < 2, "compares datasets, and the run has one"),
            (trainer.world_size > 1, f"needs whole batches, so it runs in one process; there are {trainer.world_size}"),
            (str(trainer.precision).startswith("16"), "needs unscaled losses; set trainer.precision to bf16-mixed"),
        ):
            if fault:
                raise ConfigError(Problem(f"Affinity {message}", key=_KEY))
        if self._every is None:
            batches = data.mixture.datasets_per_step * data.mixture.accumulate
            self._every = interval(len(self.datasets), batches=batches)
        self._due = self._due or self._every
        self._model = pl_module.model  # type: ignore[assignment]
        self._shared = shared_parameters(self._model)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Drop the batches of the last epoch, in which other modules may have been frozen."""
        self._batches = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Remember the shared parameters before a step that may be measured."""
        if trainer.global_step + 1 >= self._due:
            self._before = [parameter.detach().clone() for parameter in self._shared]

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Measure, once there is a batch of each dataset."""
        self._batches |= {part.dataset: part for part in batch if part.inputs}
        before, self._before = self._before, []
        if not before or len(self._batches) < len(self.datasets):
            return
        pairs = zip(self._shared, before, strict=True)
        length = math.sqrt(sum(float((now.detach() - then).square().sum()) for now, then in pairs))
        trained = [parameter for parameter in self._shared if parameter.requires_grad]
        if trained and length > 0:
            # Random numbers, and the statistics of batch norms, are the run's again afterwards.
            buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
            with seeded(0), trainer.precision_plugin.forward_context():
                measured = self._measure(trained, length)
            if np.isfinite(measured).all():
                self.measurements.append(measured)
            self._due = trainer.global_step + (self._every or 1)
            for buffer, value in buffers:
                buffer.copy_(value)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Write ``affinity.json``, and print the suggested groups."""
        if not self.measurements:
            why = f"fewer than {self._every} steps (every_n_steps), or none trained parameters that datasets share"
            sys.stderr.write(f"warning: Affinity measured nothing: {why}\n")
            return
        path, summary = RunDir(Path(trainer.default_root_dir)).affinity, self.summary()
        write_json(path, summary)
        groups = ", ".join(" + ".join(group) for group in summary["groups"])
        sys.stderr.write(f"affinity: {groups}; after {len(self.measurements)} measurements, see {path}\n")

    def summary(self) -> dict[str, Any]:
        """The content of ``affinity.json``."""
        affinity, cosine = map(_with_interval, np.asarray(self.measurements, dtype=np.float64).transpose(1, 0, 2, 3))
        return {
            "schema": 1,
            "datasets": self.datasets,
            "measurements": len(self.measurements),
            "every_n_steps": self._every,
            "affinity": affinity,
            "cosine": cosine,
            "groups": groups_of(self.datasets, affinity),
            "rule": _RULE,
        }

    def _measure(self, shared: list[torch.nn.Parameter], length: float) -> list[list[list[float]]]:
        """Affinities and cosines: of the dataset that makes a step (row) with the one that is looked at (column)."""
        losses: list[float] = []
        gradients: list[list[torch.Tensor]] = []
        for dataset in self.datasets:
            loss = self._loss(dataset)
            parts = torch.autograd.grad(loss, shared, allow_unused=True)
            gradients.append([torch.zeros_like(p) if g is None else g for g, p in zip(parts, shared, strict=True)])
            losses.append(float(loss.detach()))
        vectors = torch.stack([torch.cat([part.reshape(-1).float() for part in parts]) for parts in gradients])
        norms = vectors.norm(dim=1).clamp(min=torch.finfo(vectors.dtype).tiny)
        cosines = ((vectors @ vectors.T) / norms / norms[:, None]).tolist()
        start, affinities = [parameter.detach().clone() for parameter in shared], []
        with torch.no_grad():
            for row, norm in zip(gradients, norms.tolist(), strict=True):
                for parameter, part in zip(shared, row, strict=True):
                    parameter.sub_(part, alpha=length / norm)
                after = [float(self._loss(dataset)) for dataset in self.datasets]
                affinities.append([1 - a / b if b else 0.0 for a, b in zip(after, losses, strict=True)])
                for parameter, value in zip(shared, start, strict=True):
                    parameter.copy_(value)
        return [affinities, cosines]

    def _loss(self, dataset: str) -> torch.Tensor:
        """The loss of a dataset's last batch, with the same dropout and sampled anchors each time."""
        batch = self._batches[dataset]
        seed_torch(stable_seed("affinity", len(self.measurements), dataset), self._shared[0].device)
        context = ModelContext(inputs=batch.inputs, metadatas=batch.metadatas)
        output = self._model(context, batch.targets, features=batch.features)
        return torch.stack([loss.reshape(()) for loss in output.loss_dict.values()]).sum()


def interval(datasets: int, *, batches: int) -> int:
    """The steps of m batches between measurements of k datasets that cost a quarter of the steps.

    A backward pass costs about two forward passes. So a step costs 3 m, and a measurement 3 k for losses and gradients
    and k^2 for the losses after each step.
    """
    return math.ceil((3 * datasets + datasets**2) / (3 * batches) / _SHARE)


def _with_interval(values: Array) -> dict[str, Any]:
    """Mean and 95 % interval over measurements; the interval is null where there are few."""
    found: dict[str, Any] = {"mean": values.mean(axis=0).tolist(), "low": None, "high": None}
    if len(values) >= _FEWEST:
        rng = np.random.default_rng(0)
        # In batches: all resamples at once take gigabytes.
        drawn = bootstrap((values,), np.mean, n_resamples=2000, batch=50, method="percentile", rng=rng)
        found |= {"low": drawn.confidence_interval.low.tolist(), "high": drawn.confidence_interval.high.tolist()}
    return found


def groups_of(datasets: Sequence[str], affinity: dict[str, Any]) -> list[list[str]]:
    """Suggested groups of datasets, by the rule in ``affinity.json``: average linkage, cut at an affinity of 0."""
    if affinity["low"] is None:
        return [[dataset] for dataset in datasets]
    mean, low, high = (np.asarray(affinity[key], dtype=np.float64) for key in ("mean", "low", "high"))
    certain = np.where((low > 0) | (high < 0), mean, 0.0)
    both = (certain + certain.T) / 2
    np.fill_diagonal(both, 0.0)
    # Distances are not negative; a cut just below the distance of affinity 0 leaves those that do not help apart.
    furthest = float(np.abs(both).max()) + 1.0
    distances = furthest - both
    np.fill_diagonal(distances, 0.0)
    numbers = fcluster(linkage(squareform(distances, checks=False), "average"), furthest - 1e-12, criterion="distance")
    members: dict[int, list[str]] = {}
    for dataset, number in zip(datasets, numbers.tolist(), strict=True):
        members.setdefault(number, []).append(dataset)
    return sorted(members.values())
