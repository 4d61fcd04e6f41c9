"""From a dataset's settings to how its training samples are drawn: rslearn's samplers, and balanced classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import RandomSamplerFactory, SamplerFactory, WeightedRandomSamplerFactory
from rslearn.train.tasks import Task

from rslp import upstream
from rslp.data.cache.columns import read_columns, write_columns
from rslp.data.mixture.sampling import ClassBalanced, InTurn, Sampling, Weighted
from rslp.data.samples import SampleSource
from rslp.errors import ConfigError, DataError, Problem
from rslp.upstream.task_kinds import kind_of, tasks_by_name

_KEY = "class_balanced"
_NOTHING = "no object"
_SAMPLERS = (RandomSamplerFactory, WeightedRandomSamplerFactory)
# Version of the tables of classes in sample caches; to be raised when this code computes others.
_FORMAT = 1

log = logging.getLogger(__name__)


def balanced_datasets(setting: bool | Mapping[str, bool], modules: Mapping[str, RslearnDataModule]) -> set[str]:
    """The datasets whose classes are balanced.

    Args:
        setting: one value for all datasets, or by dataset.
        modules: the datasets by key.

    Raises:
        ConfigError: a task has no classes, or the dataset also has a sampler; or a sampler can't be repeated.
    """
    chosen = {name for name in modules if (setting if isinstance(setting, bool) else setting.get(name, False))}
    problems = []
    for name, module in modules.items():
        sampler = upstream.split_config(module, "train").sampler
        key = f"data_modules.{name}.init_args.train_config"
        if problem := _sampler_problem(sampler):
            problems.append(Problem(f"sampler: {problem}", key=key))
        if name in chosen and sampler is not None:
            problems.append(Problem(f"{name} has a sampler, too; leave one of the two out", key=_KEY))
        tasks = tasks_by_name(module.task, name)
        if name in chosen and not any(map(_class_names, tasks.values())):
            kinds = ", ".join(kind_of(task).name for task in tasks.values())
            example = f"name the datasets to balance, as in {{{name}: false}}" if setting is True else "leave it out"
            problems.append(Problem(f"{name} has no classes to balance ({kinds}); {example}", key=_KEY))
    if problems:
        raise ConfigError(problems)
    return chosen


def _sampler_problem(sampler: SamplerFactory | None) -> str | None:
    if sampler is None:
        return None
    if type(sampler) not in _SAMPLERS:
        known = " or ".join(kind.__name__ for kind in _SAMPLERS)
        return f"{type(sampler).__name__} is not supported: a resumed run could not repeat its draws; use {known}"
    count = getattr(sampler, "num_samples", None)
    return f"num_samples must be at least 1; got {count}" if count is not None and count < 1 else None


def _class_names(task: Task) -> list[str]:
    kind = kind_of(task)
    return kind.class_names(task) if kind.class_names else []


def sampling_of(source: SampleSource, *, balanced: bool, skip: bool, say: Callable[[str], None]) -> Sampling | None:
    """How the training samples of a dataset are drawn; None draws each once in a pass, in random order.

    Args:
        source: the samples.
        balanced: whether each class is drawn equally often.
        skip: leave out samples whose labels can't be read.
        say: prints a line for the user.

    Raises:
        DataError: a label or a weight can't be read, or there are too few samples or classes.
    """
    if balanced:
        return _balanced(source, skip=skip, say=say)
    sampler = source.sampler
    if isinstance(sampler, WeightedRandomSamplerFactory):
        return _weighted(source, sampler)
    if not isinstance(sampler, RandomSamplerFactory):
        return None
    size = sampler.num_samples or len(source)
    if sampler.replacement:
        return Weighted(np.ones(len(source)), size, replacement=True)
    return InTurn(len(source), size)


def _weighted(source: SampleSource, sampler: WeightedRandomSamplerFactory) -> Weighted:
    """A sampling by the weights that options of the windows hold."""
    place = f"dataset {source.name!r}: the option {sampler.option_key!r} that its sampler names"
    values = [source.window_options(index).get(sampler.option_key) for index in range(len(source))]
    for index, value in enumerate(values):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < np.inf:
            raise DataError(f"{place} must be a number of at least 0; {source.identity(index)} has {value!r}")
    weights = np.array(values, np.float64)
    drawable = int((weights > 0).sum())
    if not drawable or (not sampler.replacement and sampler.num_samples > drawable):
        raise DataError(f"{place} is above 0 in {drawable} of {len(source)} samples, too few for its num_samples")
    return Weighted(weights, sampler.num_samples, sampler.replacement)


def _balanced(source: SampleSource, *, skip: bool, say: Callable[[str], None]) -> ClassBalanced:
    """A sampling with equally many draws of each class that occurs."""
    names, table = _class_table(source, skip=skip)
    members = [np.flatnonzero(column) for column in table.T]
    if absent := [name for name, own in zip(names, members, strict=True) if not len(own) and name != _NOTHING]:
        say(f"class_balanced: no training sample of {source.name} has the class {', '.join(absent)}")
    if without := int((~table.any(axis=1)).sum()):
        say(f"class_balanced: {without} training samples of {source.name} have no valid label, and are not drawn")
    members = [own for own in members if len(own)]
    if len(members) < 2:
        raise DataError(f"class_balanced: the training samples of {source.name} have fewer than two classes")
    return ClassBalanced(tuple(members), size=len(source) - without)


def _class_table(source: SampleSource, *, skip: bool) -> tuple[list[str], npt.NDArray[np.bool_]]:
    """The classes of a dataset's tasks, and which samples have them (N K), read from the labels once."""
    tasks = {name: task for name, task in tasks_by_name(source.task, source.name).items() if _class_names(task)}
    columns = {(name, label): None for name, task in tasks.items() for label in range(len(_class_names(task)))}
    names = [_class_names(tasks[name])[label] for name, label in columns]
    for name in [name for name, task in tasks.items() if kind_of(task).unit == "object"]:
        columns[name, -1] = None
        names.append(_NOTHING)
    note = source.note(f"classes {_FORMAT} {skip}", range(len(source)))
    if note is not None:
        with suppress(OSError, ValueError):
            return names, read_columns(note).arrays["classes"].astype(bool)
    position = {column: number for number, column in enumerate(columns)}
    table = np.zeros((len(source), len(columns)), bool)
    for index in range(len(source)):
        try:
            targets = source.targets(index)
        except DataError:
            if not skip:
                raise
            continue
        for name, task in tasks.items():
            for label in _labels(task, targets[name]):
                table[index, position[name, label]] = True
    if note is not None:
        # The cache's disk may be full or read-only.
        with suppress(OSError):
            write_columns(note, {"classes": table.astype(np.uint8)}, meta={})
    return names, table


def _labels(task: Task, target: Mapping[str, Any]) -> Iterator[int]:
    """The classes that occur in the valid labels of a sample; -1 for an image without objects."""
    kind = kind_of(task)
    if kind.unit == "object":
        yield from torch.unique(target["labels"]).tolist() or [-1]
    else:
        yield from torch.unique(kind.labels(target)[kind.valid(target)]).tolist()
