"""What the runs of a study will take: optimiser steps, samples, disk and time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslp.io import Document
from rslp.study.budget import Epoch
from rslp.study.plan import StudyPlan

# Bytes of a weight in a best checkpoint, and in a checkpoint to resume from, with Adam's two numbers.
_BEST, _RESUMABLE = 4, 12
# Samples of each dataset that are timed.
_TIMED = 8


def estimates(plan: StudyPlan) -> dict[str, Estimate]:
    """Estimate each run that trains, by its name; this lists the windows of the datasets, and reads a few.

    Raises:
        ConfigError: all problems of the files.
        DataError: a dataset can't be read.
    """
    estimators: dict[str, Estimator] = {}
    made = {}
    for planned in plan.runs:
        if planned.baseline:
            continue
        arm = planned.arm
        key = arm.name if arm.overrides else ""
        if key not in estimators:
            estimators[key] = Estimator(plan.resolved(arm), plan.document(arm))
        made[planned.experiment] = estimators[key].estimate(
            plan.tree_of(planned), plan.epoch(arm), datasets=planned.datasets, keep=plan.file.config.keep
        )
    return made


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        steps: optimiser steps.
        samples: samples drawn.
        gigabytes: disk that its checkpoints take while it trains.
        gigabytes_after: and that its best checkpoint takes once it is evaluated.
        hours: guessed time on this machine.
    """

    steps: int
    samples: int
    gigabytes: float
    gigabytes_after: float
    hours: float


class Estimator:
    """Estimates runs from the joint run config: counts its parameters, and times some samples of each dataset.

    Args:
        tree: the joint run config, its paths resolved.
        document: its file, for messages.
    """

    def __init__(self, tree: Mapping[str, Any], document: Document) -> None:
        import torch

        from rslp.data.batches import collate
        from rslp.runtime.seeds import seeded
        from rslp.train.build import build_data, build_model

        data, model = build_data(tree, document), build_model(tree, document).model
        model.set_datasets(data.tasks())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device).train()
        self._model = model
        self._seconds = {}
        with seeded(0):
            for name, source in data.sources("train").items():
                began = time.perf_counter()
                count = min(data.batch_sizes[name], _TIMED)
                samples = [(source.sample(i % len(source)), ()) for i in range(count)]
                read = time.perf_counter() - began
                batch = collate(samples, dataset=name).to(device)
                # The first time takes longer than all others.
                _train_on(model, batch)
                began = time.perf_counter()
                _train_on(model, batch)
                # Workers read while the model trains.
                self._seconds[name] = max(time.perf_counter() - began, read / max(1, data.num_workers)) / count

    def estimate(self, tree: Mapping[str, Any], epoch: Epoch, *, datasets: Sequence[str], keep: str) -> Estimate:
        """Estimate a run.

        Args:
            tree: its run config.
            epoch: the joint epoch.
            datasets: its datasets.
            keep: ``best`` or ``none``.
        """
        arguments = tree["data"]["init_args"]
        batches = sum(epoch.batches[name] for name in datasets)
        step_size = (arguments.get("datasets_per_step") or 1) * epoch.rounds
        steps = arguments.get("steps_per_epoch") or math.ceil(batches / step_size)
        share = min(1.0, steps * step_size / batches)
        samples = {name: epoch.samples[name] * share * epoch.count for name in datasets}
        parameters = self._model.parameter_count(datasets)
        best = _BEST * parameters / 1e9
        return Estimate(
            steps=steps * epoch.count,
            samples=round(sum(samples.values())),
            gigabytes=2 * _RESUMABLE * parameters / 1e9 + best * (len(datasets) + 1),
            gigabytes_after=best if keep == "best" else 0.0,
            hours=sum(count * self._seconds[name] for name, count in samples.items()) / 3600,
        )


def _train_on(model: Any, batch: Any) -> None:
    """Run a batch through the model, forwards and backwards."""
    from rslearn.train.model_context import ModelContext

    output = model(ModelContext(inputs=batch.inputs, metadatas=batch.metadatas), batch.targets)
    sum(output.loss_dict.values()).backward()
    model.zero_grad()
