"""Which predictions go into layers of the dataset itself, and that none of these is read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rslearn.config import LayerConfig
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.prediction_writer import RslearnWriter
from upath import UPath

from rslp.errors import ConfigError, Problem, RunError
from rslp.evaluate.places import DatasetLayer
from rslp.train import adapters
from rslp.train.floors import tasks_by_name
from rslp.train.samples import open_dataset

# rslearn's own examples call it so; with several tasks in a dataset each has one, ``output_<task>``.
OUTPUT = "output"
_PLACE = "trainer.callbacks"


def find_layers(
    modules: Mapping[str, RslearnDataModule], listed: Sequence[RslearnWriter]
) -> dict[str, dict[str, DatasetLayer]]:
    """The layers that predictions go into, by dataset and task; tasks that are not in it go into the run directory.

    For each task the first of: a ``RslearnWriter`` among the run config's callbacks; the layer whose windows the
    prediction is to skip (``output_layer_name_skip_inference_if_exists``); a layer ``output``, or ``output_<task>`` in
    a dataset of several tasks, if the dataset has one.

    Args:
        modules: the datasets.
        listed: the writers of the run config.

    Raises:
        ConfigError: a writer that belongs to no task, or two for one.
        RunError: a layer that is read from, or that the dataset does not have.
    """
    written: dict[str, dict[str, DatasetLayer]] = {name: {} for name in modules}
    for writer in listed:
        dataset, task = _belongs(writer, modules)
        if task in written[dataset]:
            raise ConfigError(Problem(f"two RslearnWriter for the task {task!r}", key=_PLACE))
        written[dataset][task] = _opened(writer, dataset, modules[dataset], merges=writer.merger is not None)
    for dataset, module in modules.items():
        layers = open_dataset(dataset, module).layers
        tasks = list(tasks_by_name(module.task, dataset))
        for task in tasks:
            layer = _usual(module, layers, task=task, alone=len(tasks) == 1)
            if layer is not None and task not in written[dataset]:
                writer = RslearnWriter(output_layer=layer)
                written[dataset][task] = _opened(writer, dataset, module, merges=False)
    return written


def _usual(module: RslearnDataModule, layers: Mapping[str, LayerConfig], *, task: str, alone: bool) -> str | None:
    """The layer of a task that no writer is listed for."""
    asked: str | None = skipped_layer(module) if alone else None
    name = f"{OUTPUT}_{task}" if not alone else OUTPUT
    return asked or (name if name in layers else None)


def skipped_layer(module: RslearnDataModule) -> str | None:
    """The layer that marks windows which are not to be predicted again."""
    name: str | None = adapters.split_config(module, "predict").get_output_layer_name_skip_inference_if_exists()
    return name


def _belongs(writer: RslearnWriter, modules: Mapping[str, RslearnDataModule]) -> tuple[str, str]:
    """The dataset and the task that a writer is for: by its path, and by the last key of its selector.

    Raises:
        ConfigError: none, or more than one.
    """
    path = adapters.dataset_of(writer)
    wanted = writer.selector[-1] if writer.selector else None
    fitting = [
        (dataset, task)
        for dataset, module in modules.items()
        for task in tasks_by_name(module.task, dataset)
        if (path is None or _same(path, module.path)) and wanted in (None, task)
    ]
    if len(fitting) != 1:
        which = f"{len(fitting)} tasks fit" if fitting else "no task fits"
        what = (
            f"the RslearnWriter for layer {writer.output_layer!r}: {which}; its path names the dataset, and the last "
            "word of its selector the task"
        )
        raise ConfigError(Problem(what, key=_PLACE))
    return fitting[0]


def _same(path: str, other: UPath) -> bool:
    return path == str(other) or ("://" not in path and Path(path).resolve() == Path(str(other)).resolve())


def _opened(writer: RslearnWriter, dataset: str, module: RslearnDataModule, *, merges: bool) -> DatasetLayer:
    """Set a writer up, unless its layer is one that samples are read from.

    Raises:
        RunError: it is, or the dataset does not have it.
    """
    name, layers = writer.output_layer, open_dataset(dataset, module).layers
    place = DatasetLayer(writer, str(module.path), merges)
    if any(name in data_input.layers for data_input in module.inputs.values()):
        raise RunError(f"{place}: the dataset {dataset!r} reads from it, so no prediction is written there")
    if name in layers and layers[name].data_source is not None:
        raise RunError(f"{place}: it holds images of a data source, so no prediction is written there")
    if name not in layers and writer.layer_config is None:
        raise RunError(f"{place}: there is no such layer; its config.json has {', '.join(sorted(layers))}")
    adapters.open_writer(writer, module.path)
    return place
