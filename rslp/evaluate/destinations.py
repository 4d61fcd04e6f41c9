"""Where predictions go: into the run directory, or into a layer of the dataset that nothing reads from."""

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

# Longitude and latitude, as GeoJSON has it and every GIS reads it.
_GEOJSON = GeojsonVectorFormat(coordinate_mode=GeojsonCoordinateMode.WGS84)


@dataclass(frozen=True)
class DatasetLayer:
    """A layer of the dataset itself, written by rslearn's own writer.

    Attributes:
        writer: rslearn's writer, set up for the dataset.
        path: the dataset's path, for messages.
        merges: the writer's config says how crops are merged.
    """

    writer: RslearnWriter
    path: str
    merges: bool

    def __str__(self) -> str:
        """For people."""
        return f"layer {self.writer.output_layer} of {self.path}"

    def write(self, predicted: PredictedWindow, *, name: str, task: Task, overlap: int) -> None:
        """Write what a task says of a window.

        Raises:
            RunError: the layer can't hold it.
        """
        outputs = predicted.of(name)
        self._refuse_unfit(outputs, name=name)
        if not self.merges:
            self.writer.merger = merger_for(task, outputs, overlap=overlap, name=name)
        window = window_of(predicted, self.writer.dataset_storage, self.writer.window_data_storage_factory)
        for number, output in enumerate(outputs):
            self.writer.process_output(window, number, len(outputs), output.bounds, output.output)

    def _refuse_unfit(self, outputs: list[PendingCropOutput], *, name: str) -> None:
        config, first = self.writer.layer_config, outputs[0].output
        assert config is not None
        raster = isinstance(first, np.ndarray)
        if raster != (config.type == LayerType.RASTER):
            kind = "raster" if raster else "vector"
            raise RunError(f"{self}: it is of type {config.type.value}, and the task {name} gives {kind} data")
        if not raster:
            return
        bands, dtype = config.band_sets[0].bands, np.dtype(config.band_sets[0].dtype.get_numpy_dtype())
        if len(bands) != first.shape[0]:
            raise RunError(f"{self}: it has {len(bands)} bands, and the task {name} gives {first.shape[0]}")
        limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else None
        if limits and any(o.output.min() < limits.min or o.output.max() > limits.max for o in outputs):
            raise RunError(f"{self}: its type {dtype.name} can't hold what the task {name} gives")

    def described(self) -> dict[str, str]:
        """Where predictions are found, for the summary."""
        return {"dataset": self.path, "layer": self.writer.output_layer}


def window_of(
    predicted: PredictedWindow, storage: WindowStorage, data: WindowDataStorageFactory | None = None
) -> Window:
    """The window as rslearn's writers and mergers take it."""
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
    """A folder of the run directory: one folder a window, there as a whole or not at all.

    Attributes:
        path: ``predictions/<dataset>``.
        begun: a hidden folder beside it, for what is being written.
    """

    path: Path
    begun: Path

    def has(self, identity: tuple[str, str]) -> bool:
        """Whether a window is there."""
        return self.path.joinpath(*identity).is_dir()

    def write(self, predicted: PredictedWindow, *, tasks: Mapping[str, Task], overlap: int) -> None:
        """Write what some tasks say of a window: ``<task>.tif`` in its projection, or ``<task>.geojson``."""
        with self._whole(predicted.identity) as folder:
            for name, task in tasks.items():
                outputs = predicted.of(name)
                layer = layer_for(task, outputs)
                window = window_of(predicted, FileWindowStorage(UPath(self.path)))
                merged = merger_for(task, outputs, overlap=overlap, name=name).merge(window, outputs, layer)
                _write(merged, folder, name=name, window=window)

    @contextmanager
    def _whole(self, identity: tuple[str, str]) -> Iterator[Path]:
        shutil.rmtree(self.begun, ignore_errors=True)
        self.begun.mkdir(parents=True)
        try:
            yield self.begun
            target = self.path.joinpath(*identity)
            if any("/" in part or part in ("", ".", "..") for part in identity):
                raise DataError(f"window {'/'.join(identity)!r}: its group or name can't be that of a folder")
            # Of a start that was killed before it could note this window.
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.begun.rename(target)
        finally:
            shutil.rmtree(self.begun, ignore_errors=True)

    def described(self, name: str, task: Task) -> dict[str, str]:
        """Where predictions are found, for the summary: relative to the run directory."""
        suffix = "geojson" if kind_of(task).unit in ("window", "object") else "tif"
        return {"files": f"{self.path.parent.name}/{self.path.name}/*/*/{name}.{suffix}"}


@dataclass(frozen=True)
class PredictionDestination:
    """One dataset's predictions: of which tasks, and where each goes.

    Attributes:
        tasks: the dataset's tasks by name.
        layers: for the tasks that go into the dataset itself, the layer.
        folder: where the others go.
        overlap: pixels that neighbouring crops of a window share.
    """

    tasks: dict[str, Task]
    layers: Mapping[str, DatasetLayer]
    folder: RunFolder
    overlap: int

    @property
    def run_folder_tasks(self) -> dict[str, Task]:
        """The tasks that go into the run directory."""
        return {name: task for name, task in self.tasks.items() if name not in self.layers}

    def write(self, predicted: PredictedWindow) -> None:
        """Write a window.

        Raises:
            RunError: a layer can't hold it.
            ConfigError: a raster of a size that does not fit the crops.
        """
        for name, layer in self.layers.items():
            layer.write(predicted, name=name, task=self.tasks[name], overlap=self.overlap)
        if self.run_folder_tasks:
            self.folder.write(predicted, tasks=self.run_folder_tasks, overlap=self.overlap)

    def has(self, identity: tuple[str, str]) -> bool:
        """Whether a window that was noted is still there."""
        return not self.run_folder_tasks or self.folder.has(identity)

    def described(self) -> dict[str, Any]:
        """For each task its kind, its classes where it has some, and where its predictions are found."""
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


# rslearn's own examples call it so; with several tasks in a dataset each has one, ``output_<task>``.
OUTPUT = "output"
_CALLBACKS_KEY = "trainer.callbacks"


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
            raise ConfigError(Problem(f"two RslearnWriter for the task {task!r}", key=_CALLBACKS_KEY))
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
    name: str | None = upstream.split_config(module, "predict").get_output_layer_name_skip_inference_if_exists()
    return name


def _belongs(writer: RslearnWriter, modules: Mapping[str, RslearnDataModule]) -> tuple[str, str]:
    """The dataset and the task that a writer is for: by its path, and by the last key of its selector.

    Raises:
        ConfigError: none, or more than one.
    """
    path = upstream.dataset_of(writer)
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
        raise ConfigError(Problem(what, key=_CALLBACKS_KEY))
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
    upstream.open_writer(writer, module.path)
    return place
