"""Arguments of a dataset that no joint run can have: tasks without labels to train on, splits without pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import SplitConfig
from rslearn.train.tasks.embedding import EmbeddingTask
from rslearn.train.tasks.per_pixel_timestep import PerPixelTimestepTask

from rslp import upstream
from rslp.errors import ConfigError, Problem
from rslp.upstream.task_kinds import tasks_by_name

SKIPS_TARGETS = "is not supported: training and evaluation need the labels; in predict_config it is not needed"


def refuse_datasets(data_modules: Mapping[str, RslearnDataModule]) -> None:
    """Refuse what would end in a traceback, or do nothing.

    Args:
        data_modules: the datasets by key.

    Raises:
        ConfigError: all that is wrong, each with its key.
    """
    problems = []
    for name, module in data_modules.items():
        at = f"data_modules.{name}.init_args"
        tasks = tasks_by_name(module.task, name)
        for named in dict.fromkeys((name, *tasks)):
            if "/" in named or named in ("", ".", "..") or not named.isprintable():
                what = f"{named!r} can't be the name of a dataset or a task: files are called by it"
                problems.append(Problem(what, key="data_modules"))
        for task in tasks.values():
            if isinstance(task, EmbeddingTask | PerPixelTimestepTask):
                what = f"{type(task).__name__} is not supported: it has no label of a class or a value to train on"
                problems.append(Problem(what, key=f"{at}.task"))
        for split in ("train", "val", "test", "predict"):
            config = upstream.split_config(module, split)
            problems += [Problem(f"{key}: {what}", key=f"{at}.{split}_config") for key, what in _faults(config, split)]
    if problems:
        raise ConfigError(problems)


def _faults(config: SplitConfig, split: str) -> Iterator[tuple[str, str]]:
    # A test split may serve predictions alone.
    if split in ("train", "val") and config.get_skip_targets():
        yield "skip_targets", SKIPS_TARGETS
    size, overlap = config.get_crop_size(), config.get_overlap_pixels()
    if size is not None and min(size) < 1:
        yield "crop_size", f"must be at least 1 pixel; got {min(size)}"
    elif size is not None and overlap >= min(size):
        yield "overlap_pixels", f"must be less than crop_size; got {overlap} of {min(size)} pixels"
    elif size is None and config.get_load_all_crops():
        yield "load_all_crops", "needs crop_size"
