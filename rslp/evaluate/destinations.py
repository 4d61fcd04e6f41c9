"""Write predictions: into the run directory, or into a layer of the dataset that nothing reads from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rslearn.config import LayerConfig, LayerType
from rslearn.dataset import Window
from rslearn.dataset.storage.file import FileWindowStorage
from rslearn.dataset.storage.storage import WindowStorage
from rslearn.dataset.window_data_storage.storage import WindowDataStorageFactory
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.prediction_writer import PendingCropOutput, RslearnWriter
from rslearn.train.tasks.task import Task
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import GeotiffRasterFormat, adjust_projection_and_bounds_for_array
from rslearn.utils.vector_format import GeojsonCoordinateMode, GeojsonVectorFormat
from upath import UPath

from rslp import upstream
from rslp.data.samples import open_dataset
from rslp.errors import ConfigError, DataError, Problem, RunError
from rslp.evaluate.crops import PredictedWindow, layer_for, merger_for
from rslp.upstream.task_kinds import kind_of, tasks_by_name

# Longitude and latitude, as the GeoJSON standard wants.
_GEOJSON = GeojsonVectorFormat(coordinate_mode=GeojsonCoordinateMode.WGS84)
# Layer of predictions in rslearn's own examples; with several tasks in a dataset each has one, ``output_<task>``.
OUTPUT = "output"
_CALLBACKS_KEY = "trainer.callbacks"


@dataclass(frozen=True)
class DatasetLayer:
    """A layer of the dataset itself, written by rslearn's own writer.

    Attributes:
        writer: rslearn's writer, set up for the dataset.
        path: the dataset's path, for messages.
        merges: whether the writer's config sets how crops are merged.
    """

    writer: RslearnWriter
    path: str
    merges: bool

    def __str__(self) -> str:
        """Name the layer in messages."""
        return f"layer {self.writer.output_layer} of {self.path}"

    def write(self, predicted: PredictedWindow, *, name: str, task: Task, overlap: int) -> None:
        """Write a task's predictions of a window.

        Raises:
            RunError: the layer's type, bands or number format do not fit the predictions.
        """
        outputs = predicted.of(name)
        self._refuse_wrong_layer(outputs, name=name)
        if not self.merges:
            self.writer.merger = merger_for(task, outputs, overlap=overlap, name=name)
        window = window_of(predicted, self.writer.dataset_storage, self.writer.window_data_storage_factory)
        for number, output in enumerate(outputs):
            self.writer.process_output(window, number, len(outputs), output.bounds, output.output)

    def _refuse_wrong_layer(self, outputs: list[PendingCropOutput], *, name: str) -> None:
        config, first = self.writer.layer_config, outputs[0].output
        assert config is not None
        is_raster = isinstance(first, np.ndarray)
        if is_raster != (config.type == LayerType.RASTER):
            kind = "raster" if is_raster else "vector"
            raise RunError(f"{self}: it is of type {config.type.value}, and the task {name} gives {kind} data")
        if not is_raster:
            return
        bands, dtype = config.band_sets[0].bands, np.dtype(config.band_sets[0].dtype.get_numpy_dtype())
        if len(bands) != first.shape[0]:
            raise RunError(f"{self}: it has {len(bands)} bands, and the task {name} gives {first.shape[0]}")
        limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else None
        if limits and any(o.output.min() < limits.min or o.output.max() > limits.max for o in outputs):
            raise RunError(f"{self}: its type {dtype.name} can't hold the values that the task {name} gives")

    def described(self) -> dict[str, str]:
        """Dataset and layer, for the summary of a prediction."""
        return {"dataset": self.path, "layer": self.writer.output_layer}


def window_of(
    predicted: PredictedWindow, storage: WindowStorage, data: WindowDataStorageFactory | None = None
) -> Window:
    """Make rslearn's object for a predicted window, for rslearn's writers and mergers."""
    metadata = predicted.metadata
    return Window(
        storage=storage,
        group=metadata.window_group,
        name=metadata.window_name,
        projection=metadata.projection,
        bounds=metadata.window_bounds,
        time_range=metadata.time_range,
        data_factory=data,
    )


@dataclass(frozen=True)
class RunFolder:
    """A dataset's folder in the run directory; it has a folder for each window, which is complete or missing.

    Attributes:
        path: ``predictions/<dataset>``.
        begun: a hidden folder beside it, for files of a window that are not complete yet.
    """

    path: Path
    begun: Path

    def has(self, identity: tuple[str, str]) -> bool:
        """Whether the folder of a window (group and name) is there."""
        return self.path.joinpath(*identity).is_dir()

    def write(self, predicted: PredictedWindow, *, tasks: Mapping[str, Task], overlap: int) -> None:
        """Write the predictions of some tasks: ``<task>.tif`` in the window's projection, or ``<task>.geojson``."""
        with self._complete_folder(predicted.identity) as folder:
            for name, task in tasks.items():
                outputs = predicted.of(name)
                layer = layer_for(task, outputs)
                window = window_of(predicted, FileWindowStorage(UPath(self.path)))
                merged = merger_for(task, outputs, overlap=overlap, name=name).merge(window, outputs, layer)
                _write(merged, folder, name=name, window=window)

    @contextmanager
    def _complete_folder(self, identity: tuple[str, str]) -> Iterator[Path]:
        """Yield a folder to write into, which is renamed to the window's folder at the end.

        Raises:
            DataError: the window's group or name can't name a folder.
        """
        shutil.rmtree(self.begun, ignore_errors=True)
        self.begun.mkdir(parents=True)
        try:
            yield self.begun
            target = self.path.joinpath(*identity)
            if any("/" in part or part in ("", ".", "..") for part in identity):
                raise DataError(f"window {'/'.join(identity)!r}: its group or name can't name a folder")
            # It may be there if an earlier process was killed before it could record this window.
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.begun.rename(target)
        finally:
            shutil.rmtree(self.begun, ignore_errors=True)

    def described(self, name: str, task: Task) -> dict[str, str]:
        """Pattern of the files of a task, relative to the run directory, for the summary of a prediction."""
        suffix = "geojson" if kind_of(task).unit in ("window", "object") else "tif"
        return {"files": f"{self.path.parent.name}/{self.path.name}/*/*/{name}.{suffix}"}


@dataclass(frozen=True)
class PredictionDestination:
    """Where the predictions of one dataset are written.

    Attributes:
        tasks: the dataset's tasks by name.
        layers: the layer of each task that is written into the dataset itself.
        folder: the folder for the other tasks.
        overlap: width of the strip that neighbouring crops of a window share, px.
    """

    tasks: dict[str, Task]
    layers: Mapping[str, DatasetLayer]
    folder: RunFolder
    overlap: int

    @property
    def run_folder_tasks(self) -> dict[str, Task]:
        """The tasks that are written into the run directory."""
        return {name: task for name, task in self.tasks.items() if name not in self.layers}

    def write(self, predicted: PredictedWindow) -> None:
        """Write the predictions of a window.

        Raises:
            RunError: a layer can't hold them.
            ConfigError: the size of a raster does not fit its crop.
        """
        for name, layer in self.layers.items():
            layer.write(predicted, name=name, task=self.tasks[name], overlap=self.overlap)
        if self.run_folder_tasks:
            self.folder.write(predicted, tasks=self.run_folder_tasks, overlap=self.overlap)

    def has(self, identity: tuple[str, str]) -> bool:
        """Whether the files of a written window are still there; layers of the dataset are not checked."""
        return not self.run_folder_tasks or self.folder.has(identity)

    def described(self) -> dict[str, Any]:
        """For each task its kind, its classes if it has any, and where its predictions are."""
        told: dict[str, Any] = {}
        for name, task in self.tasks.items():
            layer = self.layers.get(name)
            told[name] = {"kind": type(task).__name__}
            kind = kind_of(task)
            if kind.class_names and not kind.dense:
                told[name]["classes"] = kind.class_names(task)
            told[name] |= layer.described() if layer else self.folder.described(name, task)
        return told


def _write(merged: Any, folder: Path, *, name: str, window: Window) -> None:
    if isinstance(merged, np.ndarray):
        projection, bounds = adjust_projection_and_bounds_for_array(window.projection, window.bounds, merged)
        raster = RasterArray(chw_array=merged)
        GeotiffRasterFormat().encode_raster(UPath(folder), projection, bounds, raster, fname=f"{name}.tif")
    else:
        _GEOJSON.encode_to_file(UPath(folder / f"{name}.geojson"), merged)


def find_layers(
    modules: Mapping[str, RslearnDataModule], listed: Sequence[RslearnWriter]
) -> dict[str, dict[str, DatasetLayer]]:
    """Find the layers that predictions go into, by dataset and task; other tasks go into the run directory.

    For each task the first of: a ``RslearnWriter`` among the run config's callbacks; the layer whose windows the
    prediction is to skip (``output_layer_name_skip_inference_if_exists``); a layer ``output``, or ``output_<task>`` in
    a dataset of several tasks, if the dataset has one.

    Args:
        modules: the datasets.
        listed: the writers of the run config.

    Raises:
        ConfigError: a writer fits no task or several, or two writers fit the same task.
        RunError: samples are read from the layer, or the dataset does not have it.
    """
    layers: dict[str, dict[str, DatasetLayer]] = {name: {} for name in modules}
    for writer in listed:
        dataset, task = _task_of(writer, modules)
        if task in layers[dataset]:
            raise ConfigError(Problem(f"two RslearnWriter for the task {task!r}", key=_CALLBACKS_KEY))
        layers[dataset][task] = _open_layer(writer, dataset, modules[dataset], merges=writer.merger is not None)
    for dataset, module in modules.items():
        existing = open_dataset(dataset, module).layers
        tasks = list(tasks_by_name(module.task, dataset))
        for task in tasks:
            layer = _default_layer(module, existing, task=task, alone=len(tasks) == 1)
            if layer is not None and task not in layers[dataset]:
                writer = RslearnWriter(output_layer=layer)
                layers[dataset][task] = _open_layer(writer, dataset, module, merges=False)
    return layers


def _default_layer(
    module: RslearnDataModule, existing: Mapping[str, LayerConfig], *, task: str, alone: bool
) -> str | None:
    """The layer of a task without a writer in the config; None if it has none."""
    skipped: str | None = skipped_layer(module) if alone else None
    name = OUTPUT if alone else f"{OUTPUT}_{task}"
    return skipped or (name if name in existing else None)


def skipped_layer(module: RslearnDataModule) -> str | None:
    """The layer that marks windows which are not to be predicted again."""
    name: str | None = upstream.split_config(module, "predict").get_output_layer_name_skip_inference_if_exists()
    return name


def _task_of(writer: RslearnWriter, modules: Mapping[str, RslearnDataModule]) -> tuple[str, str]:
    """The dataset and the task of a writer, from its path and the last key of its selector.

    Raises:
        ConfigError: no task fits, or several do.
    """
    path = upstream.dataset_of(writer)
    wanted = writer.selector[-1] if writer.selector else None
    fitting = [
        (dataset, task)
        for dataset, module in modules.items()
        for task in tasks_by_name(module.task, dataset)
        if (path is None or _same_path(path, module.path)) and wanted in (None, task)
    ]
    if len(fitting) != 1:
        count = f"{len(fitting)} tasks fit" if fitting else "no task fits"
        message = f"the RslearnWriter for layer {writer.output_layer!r}: {count}; its path names the dataset, and the "
        message += "last word of its selector the task"
        raise ConfigError(Problem(message, key=_CALLBACKS_KEY))
    return fitting[0]


def _same_path(path: str, other: UPath) -> bool:
    return path == str(other) or ("://" not in path and Path(path).resolve() == Path(str(other)).resolve())


def _open_layer(writer: RslearnWriter, dataset: str, module: RslearnDataModule, *, merges: bool) -> DatasetLayer:
    """Set a writer up for a dataset.

    Raises:
        RunError: samples are read from the writer's layer, or the dataset does not have it.
    """
    name, layers = writer.output_layer, open_dataset(dataset, module).layers
    layer = DatasetLayer(writer, str(module.path), merges)
    if any(name in data_input.layers for data_input in module.inputs.values()):
        raise RunError(f"{layer}: the dataset {dataset!r} reads from it, so no prediction is written there")
    if name in layers and layers[name].data_source is not None:
        raise RunError(f"{layer}: it holds images of a data source, so no prediction is written there")
    if name not in layers and writer.layer_config is None:
        raise RunError(f"{layer}: there is no such layer; its config.json has {', '.join(sorted(layers))}")
    upstream.open_writer(writer, module.path)
    return layer
