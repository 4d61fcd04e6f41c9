"""From a dataset's settings to how its training samples are drawn: rslearn's samplers, and balanced classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import RandomSamplerFactory, WeightedRandomSamplerFactory
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


def balanced_datasets(setting: bool | Mapping[str, bool], modules: Mapping[str, RslearnDataModule]) -> set[str]:
    """The datasets whose classes are balanced, by a setting for all or by dataset.

    Raises:
        ConfigError: such a dataset has no classes, or also a sampler; or a sampler can't be repeated.
    """
    chosen = {name for name in modules if (setting if isinstance(setting, bool) else setting.get(name, False))}
    problems = []
    for name, module in modules.items():
        sampler = upstream.split_config(module, "train").sampler
        count = getattr(sampler, "num_samples", None)
        key = f"data_modules.{name}.init_args.train_config"
        if sampler is not None and type(sampler) not in _SAMPLERS:
            message = "is not supported: a resumed run could not repeat its draws; use "
            message += " or ".join(kind.__name__ for kind in _SAMPLERS)
            problems.append(Problem(f"sampler: {type(sampler).__name__} {message}", key=key))
        elif count is not None and count < 1:
            problems.append(Problem(f"sampler: num_samples must be at least 1; got {count}", key=key))
        if name in chosen and sampler is not None:
            problems.append(Problem(f"{name} has a sampler, too; leave one of the two out", key=_KEY))
        tasks = tasks_by_name(module.task, name)
        if name in chosen and not any(map(_class_names, tasks.values())):
            kinds = ", ".join(kind_of(task).name for task in tasks.values())
            instead = "name those to balance, `DATASET: true`" if setting is True else "leave it out"
            problems.append(Problem(f"{name} has no classes to balance ({kinds}); {instead}", key=_KEY))
    if problems:
        raise ConfigError(problems)
    return chosen


def _class_names(task: Task) -> list[str]:
    """The names of a task's classes, none for labels that are numbers; detections may also have no object at all."""
    kind = kind_of(task)
    names = kind.class_names(task) if kind.class_names else []
    return [*names, _NOTHING] if kind.unit == "object" else names


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
    sampler = source.sampler
    if balanced:
        return _balanced(source, skip=skip, say=say)
    if isinstance(sampler, WeightedRandomSamplerFactory):
        return _weighted(source, sampler)
    if not isinstance(sampler, RandomSamplerFactory):
        return None
    size = sampler.num_samples or len(source)
    return Weighted(np.ones(len(source)), size, True) if sampler.replacement else InTurn(len(source), size)


def _weighted(source: SampleSource, sampler: WeightedRandomSamplerFactory) -> Weighted:
    """A sampling by the weights that options of the windows hold."""
    place = f"dataset {source.name!r}: the option {sampler.option_key!r} that its sampler names"
    values = [source.window_options(index).get(sampler.option_key) for index in range(len(source))]
    for index, value in enumerate(values):
        if not isinstance(value, int | float) or not 0 <= value < np.inf:
            raise DataError(f"{place} must be a number of at least 0; {source.identity(index)} has {value!r}")
    weights = np.array(values, np.float64)
    drawable = int((weights > 0).sum())
    if not drawable or (not sampler.replacement and sampler.num_samples > drawable):
        raise DataError(f"{place} is above 0 in {drawable} of {len(source)} samples, too few for its num_samples")
    return Weighted(weights, sampler.num_samples, sampler.replacement)


def _balanced(source: SampleSource, *, skip: bool, say: Callable[[str], None]) -> ClassBalanced:
    """A sampling with equally many draws of each class that occurs."""
    tasks = {name: task for name, task in tasks_by_name(source.task, source.name).items() if _class_names(task)}
    table = _class_table(source, tasks, skip=skip)
    names = [name for task in tasks.values() for name in _class_names(task)]
    members = [np.flatnonzero(column) for column in table.T]
    if absent := [name for name, own in zip(names, members, strict=True) if not len(own) and name != _NOTHING]:
        say(f"class_balanced: no training sample of {source.name} has the class {', '.join(absent)}")
    if without := int((~table.any(axis=1)).sum()):
        say(f"class_balanced: {without} training samples of {source.name} have no valid label, and are not drawn")
    members = [own for own in members if len(own)]
    if len(members) < 2:
        raise DataError(f"class_balanced: the training samples of {source.name} have fewer than two classes")
    return ClassBalanced(tuple(members), size=len(source) - without)


def _class_table(source: SampleSource, tasks: Mapping[str, Task], *, skip: bool) -> npt.NDArray[np.bool_]:
    """Which samples have which classes of the tasks, N K; read from the labels once, and then from the sample cache."""
    note = source.note(f"classes {_FORMAT} {skip}", range(len(source)))
    with suppress(OSError, ValueError):
        if note is not None:
            return read_columns(note).arrays["classes"].astype(bool)
    table = np.zeros((len(source), sum(len(_class_names(task)) for task in tasks.values())), bool)
    for index in range(len(source)):
        try:
            targets = source.targets(index)
        except DataError:
            if not skip:
                raise
            continue
        first = 0
        for name, task in tasks.items():
            table[index, [first + label for label in _labels(task, targets[name])]] = True
            first += len(_class_names(task))
    # The cache's disk may be full or read-only.
    with suppress(OSError):
        if note is not None:
            write_columns(note, {"classes": table.astype(np.uint8)}, meta={})
    return table


def _labels(task: Task, target: Mapping[str, Any]) -> list[int]:
    """The classes that occur in the valid labels of a sample; of an image without objects, the last one."""
    kind = kind_of(task)
    labels = target["labels"] if kind.unit == "object" else kind.labels(target)[kind.valid(target)]
    # A loss leaves labels of -100 out.
    present: list[int] = labels[labels >= 0].unique().tolist()
    return present or ([len(_class_names(task)) - 1] if kind.unit == "object" else [])
