"""Where predictions go: into the run directory, or into a layer of the dataset."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rslearn.config import LayerType
from rslearn.dataset import Window
from rslearn.dataset.storage.file import FileWindowStorage
from rslearn.dataset.storage.storage import WindowStorage
from rslearn.dataset.window_data_storage.storage import WindowDataStorageFactory
from rslearn.train.prediction_writer import PendingCropOutput, RslearnWriter
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.task import Task
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import GeotiffRasterFormat, adjust_projection_and_bounds_for_array
from rslearn.utils.vector_format import GeojsonCoordinateMode, GeojsonVectorFormat
from upath import UPath

from rslp.errors import DataError, RunError
from rslp.evaluate.crops import Predicted, layer_for, merger_for

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

    def write(self, predicted: Predicted, *, name: str, task: Task, overlap: int) -> None:
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


def window_of(predicted: Predicted, storage: WindowStorage, data: WindowDataStorageFactory | None = None) -> Window:
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
class Folder:
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

    def write(self, predicted: Predicted, *, tasks: Mapping[str, Task], overlap: int) -> None:
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
        kind = "geojson" if isinstance(task, ClassificationTask | RegressionTask | DetectionTask) else "tif"
        return {"files": f"{self.path.parent.name}/{self.path.name}/*/*/{name}.{kind}"}


@dataclass(frozen=True)
class Target:
    """One dataset's predictions: of which tasks, and where each goes.

    Attributes:
        tasks: the dataset's tasks by name.
        layers: for the tasks that go into the dataset itself, the layer.
        folder: where the others go.
        overlap: pixels that neighbouring crops of a window share.
    """

    tasks: dict[str, Task]
    layers: Mapping[str, DatasetLayer]
    folder: Folder
    overlap: int

    @property
    def into_folder(self) -> dict[str, Task]:
        """The tasks that go into the run directory."""
        return {name: task for name, task in self.tasks.items() if name not in self.layers}

    def write(self, predicted: Predicted) -> None:
        """Write a window.

        Raises:
            RunError: a layer can't hold it.
            ConfigError: a raster of a size that does not fit the crops.
        """
        for name, layer in self.layers.items():
            layer.write(predicted, name=name, task=self.tasks[name], overlap=self.overlap)
        if self.into_folder:
            self.folder.write(predicted, tasks=self.into_folder, overlap=self.overlap)

    def has(self, identity: tuple[str, str]) -> bool:
        """Whether a window that was noted is still there."""
        return not self.into_folder or self.folder.has(identity)

    def described(self) -> dict[str, Any]:
        """For each task its kind, its classes where it has some, and where its predictions are found."""
        told: dict[str, Any] = {}
        for name, task in self.tasks.items():
            layer = self.layers.get(name)
            told[name] = {"kind": type(task).__name__}
            if isinstance(task, ClassificationTask | DetectionTask):
                told[name]["classes"] = list(task.classes)
            told[name] |= layer.described() if layer else self.folder.described(name, task)
        return told


def _write(merged: Any, folder: Path, *, name: str, window: Window) -> None:
    if isinstance(merged, np.ndarray):
        projection, bounds = adjust_projection_and_bounds_for_array(window.projection, window.bounds, merged)
        raster = RasterArray(chw_array=merged)
        GeotiffRasterFormat().encode_raster(UPath(folder), projection, bounds, raster, fname=f"{name}.tif")
    else:
        _GEOJSON.encode_to_file(UPath(folder / f"{name}.geojson"), merged)
