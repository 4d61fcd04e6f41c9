"""Baselines: for each task the best constant prediction, fitted to its training labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rslearn.train.tasks.task import Task

from rslp.data.cache.columns import read_columns, write_columns
from rslp.data.samples import SampleSource
from rslp.errors import DataError
from rslp.models.denominators import accumulation_dtype
from rslp.upstream.task_kinds import OTHER, kind_of, tasks_by_name

# Dataset -> task -> the best constant: a class, or a label in the units of the loss.
Baselines = dict[str, dict[str, float]]

# Enough labels for a majority and a mean, and few enough to start quickly on a huge dataset.
MAX_SAMPLES = 2000
# Version of the baselines in sample caches; to be raised when this code computes others.
_FORMAT = 2

log = logging.getLogger(__name__)


def fit_baselines(sources: Mapping[str, SampleSource], *, skip: bool = False) -> Baselines:
    """The best constant of each task, from at most ``MAX_SAMPLES`` evenly spread training samples.

    Args:
        sources: the training split by dataset.
        skip: leave out samples whose labels can't be read.

    Raises:
        DataError: a label can't be read, and ``skip`` is False.
    """
    return {dataset: _fit_dataset(source, skip=skip) for dataset, source in sources.items()}


def _fit_dataset(source: SampleSource, *, skip: bool) -> dict[str, float]:
    """The baselines of one dataset, from its sample cache if they were fitted to the same labels before."""
    indices = range(0, len(source), max(1, len(source) // MAX_SAMPLES))
    note = source.note(f"floors {_FORMAT} {skip}", indices)
    if note is not None and (cached := _read_note(note, source.name)) is not None:
        return cached
    targets = list(_targets(source, indices, skip=skip))
    constants = {
        name: constant
        for name, task in tasks_by_name(source.task, source.name).items()
        if (constant := fit_baseline(task, [target[name] for target in targets])) is not None
    }
    if note is not None:
        # The cache's disk may be full or read-only.
        with suppress(OSError):
            write_columns(note, {}, meta=constants)
    return constants


def _read_note(note: Path, dataset: str) -> dict[str, float] | None:
    try:
        return dict(read_columns(note).meta)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("dataset %r: %s can't be read, so the baselines are computed anew: %s", dataset, note, error)
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
    """The baseline of one task; None for a kind of task without one, or without a valid label.

    Args:
        task: the task.
        targets: rslearn's targets of the task.
    """
    kind = kind_of(task)
    if kind is OTHER:
        return None
    if kind.unit == "object":
        return 0.0
    parts = [kind.labels(target)[kind.valid(target)] for target in targets]
    if not any(map(len, parts)):
        return None
    labels = torch.cat(parts)
    best = kind.best_constant or (_mean if kind.numeric else _majority)
    return float(best(labels))


def _mean(labels: torch.Tensor) -> torch.Tensor:
    return labels.double().mean()


def _majority(labels: torch.Tensor) -> torch.Tensor:
    return torch.bincount(labels).argmax()


def baseline_output(task: Task, constant: float, target: Mapping[str, Any]) -> Any:
    """A baseline in the form of the task's head output, so that it is measured as the model is.

    Args:
        task: the task.
        constant: the result of ``fit_baseline``.
        target: the sample's target, which gives the size of an image and the device.
    """
    kind = kind_of(task)
    if kind.unit == "object":
        boxes = target["boxes"]
        return {"boxes": boxes[:0], "labels": target["labels"][:0], "scores": boxes.new_zeros(0)}
    labels = kind.labels(target)
    if kind.class_names is None:
        return torch.full_like(labels, constant, dtype=accumulation_dtype(labels.device))
    scores = torch.zeros((len(kind.class_names(task)), *labels.shape), device=labels.device)
    scores[int(constant)] = 1
    return scores
