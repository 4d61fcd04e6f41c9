"""Assemble the predictions of crops to predictions of windows, and merge them where crops overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
import torch
from rslearn.config import BandSetConfig, DType, LayerConfig, LayerType
from rslearn.dataset import Window
from rslearn.train.model_context import SampleMetadata
from rslearn.train.prediction_writer import CropPredictionMerger, PendingCropOutput, RasterMerger, VectorMerger
from rslearn.train.tasks.task import Task
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import PixelBounds, STGeometry

from rslp.data.batches import Batch
from rslp.data.crops import own_area
from rslp.errors import ConfigError, Problem
from rslp.upstream.task_kinds import kind_of

Raster = npt.NDArray[Any]
# A task's prediction of a crop or window: a raster C H W, or features in pixels of the window's projection.
TaskPrediction = Raster | list[Feature]
# How many classes a uint8 can tell apart.
_UINT8_CLASSES = 256


@dataclass(frozen=True)
class PredictedWindow:
    """The predictions of a window's crops.

    Attributes:
        metadata: metadata of the first crop that was predicted; only its fields about the window are to be used.
        crops: for each crop its bounds and its predictions by task.
    """

    metadata: SampleMetadata
    crops: list[tuple[PixelBounds, dict[str, TaskPrediction]]]

    @property
    def identity(self) -> tuple[str, str]:
        """Group and name of the window."""
        return self.metadata.window_group, self.metadata.window_name

    def of(self, task: str) -> list[PendingCropOutput]:
        """The predictions of one task, one for each crop, as rslearn's mergers take them."""
        return [PendingCropOutput(bounds, predictions[task]) for bounds, predictions in self.crops]


@dataclass
class WindowAssembler:
    """Collects the predictions of crops of one dataset until all crops of a window are there.

    A window with a bad sample is left out, since a map with a gap would look like a complete one.

    Attributes:
        tasks: the dataset's tasks by name.
        _incomplete: windows (dataset/group/name) with the predictions of some of their crops.
        _broken: windows that have a bad sample.
    """

    tasks: dict[str, Task]
    _incomplete: dict[str, PredictedWindow] = field(default_factory=dict)
    _broken: set[str] = field(default_factory=set)

    def take(self, batch: Batch, outputs: Sequence[dict[str, Any]]) -> Iterator[PredictedWindow]:
        """Add the outputs of a batch, by task for each sample; yield the windows that are complete now."""
        for bad_sample in batch.bad_samples:
            # Of dataset/group/window/x0_y0_x1_y1, without the bounds.
            window = bad_sample.sample.rpartition("/")[0]
            self._broken.add(window)
            self._incomplete.pop(window, None)
        for metadata, output in zip(batch.metadatas, outputs, strict=True):
            window = f"{batch.dataset}/{metadata.window_group}/{metadata.window_name}"
            if window in self._broken:
                continue
            predicted = self._incomplete.setdefault(window, PredictedWindow(metadata, []))
            predictions = {name: task_prediction(task, output[name], metadata) for name, task in self.tasks.items()}
            predicted.crops.append((metadata.crop_bounds, predictions))
            if len(predicted.crops) == metadata.num_crops_in_window:
                yield self._incomplete.pop(window)


def task_prediction(task: Task, output: Any, metadata: SampleMetadata) -> TaskPrediction:
    """Turn a head's output for one crop into a raster or features, by the task's ``process_output``.

    A classification or regression gives one class or number for a crop. It becomes a feature whose geometry is the
    crop's rectangle, cut off at the window's edge; rslearn would make a point at the crop's corner.

    Raises:
        TypeError: the task predicts several things at once.
    """
    prediction = task.process_output(_plain(output), metadata)
    if isinstance(prediction, dict):
        raise TypeError(f"{type(task).__name__} predicts several things at once")
    if kind_of(task).unit != "window" or isinstance(prediction, np.ndarray):
        return prediction
    box = shapely.box(*metadata.crop_bounds).intersection(shapely.box(*metadata.window_bounds))
    return [Feature(STGeometry(metadata.projection, box, None), feature.properties) for feature in prediction]


def _plain(output: Any) -> Any:
    """Move tensors to the CPU, floating point ones as float32, since numpy has no bfloat16."""
    if isinstance(output, dict):
        return {name: _plain(value) for name, value in output.items()}
    return output.cpu().float() if torch.is_floating_point(output) else output.cpu()


class DetectionMerger(CropPredictionMerger):
    """Merges the detections of crops; where crops overlap, each object is taken from one of them.

    That is the crop in whose own area (``rslp.data.crops.own_area``) the object's centre lies. Objects whose centre
    lies outside of the window are dropped.

    Args:
        overlap_pixels: width of the strip that neighbouring crops share, px.
    """

    def __init__(self, overlap_pixels: int = 0) -> None:
        self._overlap = overlap_pixels

    def merge(
        self,
        window: Window,
        outputs: Sequence[PendingCropOutput],
        layer_config: LayerConfig,  # noqa: ARG002
    ) -> list[Feature]:
        """The detections of the window."""
        detections: list[Feature] = []
        for output in sorted(outputs, key=lambda output: (output.bounds[0], output.bounds[1])):
            x0, y0, x1, y1 = own_area(output.bounds, window.bounds, overlap=self._overlap)
            centres = [feature.geometry.shp.centroid for feature in output.output]
            inside = [x0 <= centre.x < x1 and y0 <= centre.y < y1 for centre in centres]
            detections += [feature for feature, is_inside in zip(output.output, inside, strict=True) if is_inside]
        return detections


def merger_for(task: Task, outputs: Sequence[PendingCropOutput], *, overlap: int, name: str) -> CropPredictionMerger:
    """The merger of a task's predictions for the crops of a window: of rasters, of detections, or of other features.

    Args:
        task: the task.
        outputs: its predictions for the crops.
        overlap: width of the strip that neighbouring crops share, px.
        name: the task's name, for messages.

    Raises:
        ConfigError: the size of a raster does not fit its crop.
    """
    if isinstance(outputs[0].output, np.ndarray):
        factor = _factor(outputs[0], name=name)
        return RasterMerger(overlap_pixels=overlap // factor, downsample_factor=factor)
    return DetectionMerger(overlap) if kind_of(task).unit == "object" else VectorMerger()


def _factor(output: PendingCropOutput, *, name: str) -> int:
    """Width of an output pixel in pixels of the window; 1 for an output that is larger than its crop, by padding."""
    height, width = output.output.shape[-2:]
    x0, y0, x1, y1 = output.bounds
    if width >= x1 - x0 and height >= y1 - y0:
        return 1
    factor = (x1 - x0) // width
    if (width * factor, height * factor) != (x1 - x0, y1 - y0):
        message = f"predicts {width} x {height} px for crops of {x1 - x0} x {y1 - y0} px, which is not a whole fraction"
        raise ConfigError(Problem(message, key=f"model.init_args.model.init_args.decoders.{name}"))
    return int(factor)


def layer_for(task: Task, outputs: Sequence[PendingCropOutput]) -> LayerConfig:
    """The config of the layer that a task's predictions are written to.

    Rasters of classes are stored as uint8 (uint16 with more than 256 classes), other rasters as float32.
    """
    first = outputs[0].output
    if not isinstance(first, np.ndarray):
        return LayerConfig(type=LayerType.VECTOR)
    dtype, names = DType.FLOAT32, kind_of(task).class_names
    if names and np.issubdtype(first.dtype, np.integer):
        dtype = DType.UINT8 if len(names(task)) <= _UINT8_CLASSES else DType.UINT16
    return LayerConfig(type=LayerType.RASTER, band_sets=[BandSetConfig(dtype=dtype, num_bands=first.shape[0])])
