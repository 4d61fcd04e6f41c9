"""The floor under a task: the best constant prediction, learnt from the training labels alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.tasks.task import Task

from rslp.data.cache.columns import read_columns, write_columns
from rslp.data.samples import SampleSource
from rslp.errors import DataError
from rslp.models.denominators import accumulation_dtype

# Dataset -> task -> majority class, or mean label (in the units of the loss); plain numbers that a checkpoint can hold.
Baselines = dict[str, dict[str, float]]

# Reading the labels of a huge dataset would hold up the start; the majority and the mean of this many are close enough.
MAX_SAMPLES = 2000
# What is noted in stores was learnt by this code; another number when the code learns something else.
_FORMAT = 2

log = logging.getLogger(__name__)


def tasks_by_name(task: Task, dataset: str) -> dict[str, Task]:
    """The tasks of a dataset: those that a MultiTask unites, or the one, under the dataset's name."""
    return dict(task.tasks) if isinstance(task, MultiTask) else {dataset: task}


def fit_baselines(sources: Mapping[str, SampleSource], *, skip: bool = False) -> Baselines:
    """Majority class or mean label of each task, from at most ``MAX_SAMPLES`` evenly spread training samples.

    Args:
        sources: the training split by dataset.
        skip: leave out samples whose labels can't be read.

    Raises:
        DataError: a label can't be read, and is not to be skipped.
    """
    return {dataset: _learn(source, skip=skip) for dataset, source in sources.items()}


def _learn(source: SampleSource, *, skip: bool) -> dict[str, float]:
    """The constants of one dataset, from its store if they were learnt from these very labels before."""
    indices = range(0, len(source), max(1, len(source) // MAX_SAMPLES))
    note = source.note(f"floors {_FORMAT} {skip}", indices)
    if note is not None and (known := _noted(note, source.name)) is not None:
        return known
    targets = list(_targets(source, indices, skip=skip))
    constants = {
        name: constant
        for name, task in tasks_by_name(source.task, source.name).items()
        if (constant := fit_baseline(task, [target[name] for target in targets])) is not None
    }
    if note is not None:
        # The store's disk may be full, or not ours.
        with suppress(OSError):
            write_columns(note, {}, meta=constants)
    return constants


def _noted(note: Path, dataset: str) -> dict[str, float] | None:
    try:
        return dict(read_columns(note).meta)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("dataset %r: %s can't be read, so the floors are learnt anew: %s", dataset, note, error)
    return None


def _targets(source: SampleSource, indices: Iterable[int], *, skip: bool) -> Iterator[dict[str, Any]]:
    for index in indices:
        try:
            yield source.targets(index)
        except DataError:
            # A sample that is skipped is recorded when the mixture draws it.
            if not skip:
                raise


def fit_baseline(task: Task, targets: Iterable[Mapping[str, Any]]) -> float | None:
    """The constant for one task; None for a kind of task without one, or without a valid label.

    Args:
        task: which kind it is.
        targets: rslearn's targets of the task.
    """
    if isinstance(task, DetectionTask):
        return 0.0
    labels = [values for target in targets if len(values := _labels(task, target))]
    if not labels:
        return None
    joined = torch.cat(labels)
    if isinstance(task, (ClassificationTask, SegmentationTask)):
        return float(torch.bincount(joined).argmax())
    return float(joined.double().mean())


def _labels(task: Task, target: Mapping[str, Any]) -> torch.Tensor:
    """The valid labels of one sample, flat."""
    if isinstance(task, ClassificationTask):
        return target["class"].reshape(1)[target["valid"].reshape(1) > 0]  # type: ignore[no-any-return]
    if isinstance(task, SegmentationTask):
        return target["classes"].get_hw_tensor()[target["valid"].get_hw_tensor() > 0]  # type: ignore[no-any-return]
    if isinstance(task, RegressionTask):
        return target["value"].reshape(1)[target["valid"].reshape(1) > 0]  # type: ignore[no-any-return]
    if isinstance(task, PerPixelRegressionTask):
        return target["values"].get_hw_tensor()[target["valid"].get_hw_tensor() > 0]  # type: ignore[no-any-return]
    return torch.empty(0)


def baseline_output(task: Task, constant: float, target: Mapping[str, Any]) -> Any:
    """The constant prediction in the form of rslearn's head for the task: the floor is measured like the model.

    Args:
        task: which kind it is.
        constant: from ``fit_baseline``.
        target: the sample's target; says the size of an image and the device.
    """
    if isinstance(task, DetectionTask):
        boxes = target["boxes"]
        return {"boxes": boxes[:0], "labels": target["labels"][:0], "scores": boxes.new_zeros(0)}
    if isinstance(task, ClassificationTask):
        return _one_hot(int(constant), len(task.classes), target["class"].reshape(()))
    if isinstance(task, SegmentationTask):
        return _one_hot(int(constant), task.num_classes, target["classes"].get_hw_tensor())
    values = target["values"].get_hw_tensor() if isinstance(task, PerPixelRegressionTask) else target["value"]
    return torch.full_like(values, constant, dtype=accumulation_dtype(values.device))


def _one_hot(index: int, classes: int, like: torch.Tensor) -> torch.Tensor:
    scores = torch.zeros((classes, *like.shape), device=like.device)
    scores[index] = 1
    return scores
