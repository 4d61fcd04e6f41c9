"""Checks of each dataset's arguments: names, tasks and crop sizes that a joint run can't have are refused."""

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
    """Refuse arguments that would have no effect, or end in a traceback.

    Args:
        data_modules: the datasets by key.

    Raises:
        ConfigError: all problems, each with its key.
    """
    problems = []
    for dataset, module in data_modules.items():
        key = f"data_modules.{dataset}.init_args"
        tasks = tasks_by_name(module.task, dataset)
        for name in dict.fromkeys((dataset, *tasks)):
            if "/" in name or name in ("", ".", "..") or not name.isprintable():
                message = f"{name!r} can't be the name of a dataset or a task: files are called by it"
                problems.append(Problem(message, key="data_modules"))
        for task in tasks.values():
            if isinstance(task, EmbeddingTask | PerPixelTimestepTask):
                message = f"{type(task).__name__} is not supported: it has no label of a class or a value to train on"
                problems.append(Problem(message, key=f"{key}.task"))
        for split in ("train", "val", "test", "predict"):
            config = upstream.split_config(module, split)
            problems += [Problem(f"{k}: {text}", key=f"{key}.{split}_config") for k, text in _problems(config, split)]
    if problems:
        raise ConfigError(problems)


def _problems(config: SplitConfig, split: str) -> Iterator[tuple[str, str]]:
    """Yield (key of the split's settings, problem)."""
    # A test split may be for predictions alone.
    if split in ("train", "val") and config.get_skip_targets():
        yield "skip_targets", SKIPS_TARGETS
    size, overlap = config.get_crop_size(), config.get_overlap_pixels()
    if size is not None and min(size) < 1:
        yield "crop_size", f"must be at least 1 pixel; got {min(size)}"
    elif size is not None and overlap >= min(size):
        yield "overlap_pixels", f"must be less than crop_size; got {overlap} of {min(size)} pixels"
    elif size is None and config.get_load_all_crops():
        yield "load_all_crops", "needs crop_size"
