"""Read what arms of a study have achieved: values by seed, and on resamples of the evaluated windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from torchmetrics import Metric

from rslp import upstream
from rslp.errors import RunError
from rslp.evaluate.predictions import TaskPredictions, read_predictions
from rslp.evaluate.resampling import MIN_UNITS, resamples, units
from rslp.evaluate.rows import Evaluation, MetricRow
from rslp.train.metrics import PRIMARY

Key = tuple[str, str]
# Enough for a variance, and for the many arms and seeds of a study; percentiles take more.
RESAMPLES = 400


@dataclass(frozen=True)
class Cost:
    """What an arm spent for one seed, summed over its runs; None where it is not known.

    Attributes:
        parameters: number of parameters of its models.
        samples: samples drawn in training.
        steps: optimiser steps.
        seconds: time of training, s.
    """

    parameters: int | None = None
    samples: int | None = None
    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, done: Mapping[str, Any]) -> Cost:
        """The cost in a run's marker of success; of a run without one the number of steps."""
        known = {"steps": done.get("step"), **(done.get("cost") or {})}
        return cls(**{name: known.get(name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class ArmResult:
    """The evaluations of one arm for one seed.

    Attributes:
        arm: the arm's name; ``pair:a+b`` and ``without:a`` are shown as transfer matrix and influence.
        seed: its seed.
        evaluations: files ``eval/<checkpoint>/<split>.json``, several for an arm of several runs, such as one for each
            dataset; the file ``<split>.parquet`` beside each, where it exists, has the predictions.
        cost: what it spent.
    """

    arm: str
    seed: int
    evaluations: tuple[Path, ...]
    cost: Cost = Cost()

    def __str__(self) -> str:
        """Name the result in messages."""
        return f"arm {self.arm!r}, seed {self.seed}"


@dataclass(frozen=True)
class SeedValue:
    """The primary metric of one task, of one arm and seed.

    Attributes:
        row: the row of metrics.
        file: the file of predictions.
        predictions: the predictions; None if there are none.
        fingerprint: hash of the identities of the dataset's samples; None where the rows have none.
        resampled: the metric on resamples of the windows, ``R``, NaN where it has no value; None without predictions.
        unit: what was resampled, ``window`` or ``block``.
        units: their number.
    """

    row: MetricRow
    file: Path
    predictions: TaskPredictions | None = None
    fingerprint: str | None = None
    resampled: npt.NDArray[np.float64] | None = None
    unit: str = "window"
    units: int = 0

    @property
    def value(self) -> float:
        """The value; NaN where the split has no label to compute it from."""
        return math.nan if self.row.value is None else self.row.value


@dataclass
class TaskValues:
    """All values of one task.

    Attributes:
        key: dataset and task.
        by_arm: the values by arm and seed.
    """

    key: Key
    by_arm: dict[str, dict[int, SeedValue]] = field(default_factory=dict)

    def add(self, result: ArmResult, value: SeedValue) -> None:
        """Add a value.

        Raises:
            RunError: it is of another metric or other samples than the values before.
        """
        mine = self.by_arm.setdefault(result.arm, {})
        name = "/".join(dict.fromkeys(self.key))
        if result.seed in mine:
            raise RunError(f"{result} has two evaluations of {name}")
        for arm, seeds in self.by_arm.items():
            for seed, other in list(seeds.items())[:1]:
                if other.row.metric != value.row.metric:
                    raise RunError(
                        f"{name}: {result} is measured by {value.row.metric}, arm {arm!r} by {other.row.metric}"
                    )
                if not _same_data(value, other):
                    raise RunError(
                        f"{name}: {result} was evaluated on other samples than arm {arm!r}, seed {seed}: "
                        f"{_count(value)} and {_count(other)} windows; evaluate both on the same data"
                    )
        mine[result.seed] = value


def _same_data(value: SeedValue, other: SeedValue) -> bool:
    if value.predictions is not None and other.predictions is not None:
        return value.predictions.samples == other.predictions.samples
    if value.fingerprint is not None and other.fingerprint is not None:
        return value.fingerprint == other.fingerprint
    return _count(value) == _count(other)


def _count(value: SeedValue) -> int:
    return value.row.n if value.row.n_windows is None else value.row.n_windows


def read_results(results: Sequence[ArmResult]) -> tuple[dict[Key, TaskValues], str]:
    """The values of all tasks by (dataset, task), and the name of the split.

    Raises:
        RunError: a file is damaged, or the evaluations are of different splits, metrics or data.
    """
    tasks: dict[Key, TaskValues] = {}
    splits: dict[str, ArmResult] = {}
    for result in results:
        for path in result.evaluations:
            evaluation = read_evaluation(path)
            splits.setdefault(evaluation.split, result)
            for key, value in _values(evaluation, path).items():
                tasks.setdefault(key, TaskValues(key)).add(result, value)
    if len(splits) > 1:
        raise RunError("evaluations of different splits: " + "; ".join(f"{r}: {name}" for name, r in splits.items()))
    for task in tasks.values():
        task.by_arm = {
            arm: {seed: _resampled(value) for seed, value in seeds.items()} for arm, seeds in task.by_arm.items()
        }
    return dict(sorted(tasks.items())), next(iter(splits), "")


def read_evaluation(path: Path) -> Evaluation:
    """Read a file of evaluation rows.

    Raises:
        RunError: it does not exist, or is damaged.
    """
    try:
        return Evaluation.parse(path.read_text())
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist: evaluate the run") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read: {error}") from error
    except RunError as error:
        raise RunError(f"{path}: {error}") from error


def _values(evaluation: Evaluation, path: Path) -> dict[Key, SeedValue]:
    """The primary metrics of an evaluation."""
    predictions: Mapping[Key, TaskPredictions] = {}
    if (file := path.with_suffix(".parquet")).is_file():
        predictions = read_predictions(file, checkpoint_sha256=evaluation.checkpoint_sha256)
    values = {}
    for row in evaluation.rows:
        if row.primary:
            key = row.dataset, row.task
            fingerprint = evaluation.data_fingerprints.get(row.dataset)
            values[key] = SeedValue(row, file, predictions.get(key), fingerprint)
    return values


def _resampled(value: SeedValue) -> SeedValue:
    """The value with its resamples, where there are predictions of enough windows.

    Raises:
        RunError: the predictions give another value than the row of metrics.
    """
    row, predictions = value.row, value.predictions
    if predictions is None or not predictions.samples or row.value is None:
        return value
    unit_of, unit = units([(s[0], s[1]) for s in predictions.samples], predictions.places)
    number = int(unit_of.max()) + 1
    metric = _metric(predictions, value.file)
    resample = upstream.StatesBySample.of(metric, predictions.states).resampler([metric])

    def of_resample(counts: npt.NDArray[np.int64]) -> float:
        resample(counts)
        return float(metric.compute())

    whole = of_resample(np.ones(len(unit_of), dtype=np.int64))
    if not math.isclose(whole, row.value, rel_tol=1e-5, abs_tol=1e-8):
        raise RunError(f"{value.file} gives {row.metric} {whole:.6g} of {row.dataset}, the rows beside it {row.value}")
    resampled = None
    if number >= MIN_UNITS:
        drawn = resamples(unit_of, seed_of=row.dataset, number=RESAMPLES)
        resampled = np.array([of_resample(counts) for counts in drawn])
    return replace(value, resampled=resampled, unit=unit, units=number)


def _metric(predictions: TaskPredictions, file: Path) -> Metric:
    if predictions.kind not in PRIMARY:
        raise RunError(f"{file}: this version has no metric for tasks of kind {predictions.kind!r}")
    return PRIMARY[predictions.kind][1](SimpleNamespace(**predictions.description))
