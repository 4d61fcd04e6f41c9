"""From predictions of crops to whole windows: what a window still waits for, and which of two crops counts."""

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
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.tasks.task import Task
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import PixelBounds, STGeometry

from rslp.data.batches import Batch
from rslp.data.crops import own_area
from rslp.errors import ConfigError, Problem

Raster = npt.NDArray[Any]
# What a task says of one crop, or of one window: a raster C H W, or features in pixels of the window's projection.
TaskPrediction = Raster | list[Feature]
_BYTE = 256


@dataclass(frozen=True)
class PredictedWindow:
    """A window with what was predicted for all of its crops.

    Attributes:
        metadata: of its first crop; the window's place is the same in all.
        crops: for each crop its bounds, and by task what was said of it.
    """

    metadata: SampleMetadata
    crops: list[tuple[PixelBounds, dict[str, TaskPrediction]]]

    @property
    def identity(self) -> tuple[str, str]:
        """Group and name."""
        return self.metadata.window_group, self.metadata.window_name

    def of(self, task: str) -> list[PendingCropOutput]:
        """What one task says, crop by crop."""
        return [PendingCropOutput(bounds, said[task]) for bounds, said in self.crops]


@dataclass
class WindowAssembler:
    """The windows of one dataset that are not whole yet.

    A window with a crop that can't be used is left out: half a map would pass for a whole one.

    Attributes:
        tasks: the dataset's tasks by name.
    """

    tasks: dict[str, Task]
    _waiting: dict[str, PredictedWindow] = field(default_factory=dict)
    _broken: set[str] = field(default_factory=set)

    def take(self, batch: Batch, outputs: Sequence[dict[str, Any]]) -> Iterator[PredictedWindow]:
        """Add a batch's outputs by task; gives the windows that are whole by it."""
        for fault in batch.bad_samples:
            window = fault.sample.rpartition("/")[0]
            self._broken.add(window)
            self._waiting.pop(window, None)
        for metadata, output in zip(batch.metadatas, outputs, strict=True):
            window = f"{batch.dataset}/{metadata.window_group}/{metadata.window_name}"
            if window in self._broken:
                continue
            whole = self._waiting.setdefault(window, PredictedWindow(metadata, []))
            said = {name: task_prediction(task, output[name], metadata) for name, task in self.tasks.items()}
            whole.crops.append((metadata.crop_bounds, said))
            if len(whole.crops) == metadata.num_crops_in_window:
                yield self._waiting.pop(window)


def task_prediction(task: Task, output: Any, metadata: SampleMetadata) -> TaskPrediction:
    """A head's output for one crop as raster or features, as the task makes them.

    What a task says of a crop as a whole is a box around the crop: rslearn puts a point at its corner.
    """
    said = task.process_output(_plain(output), metadata)
    if isinstance(said, dict):
        raise TypeError(f"{type(task).__name__} says several things at once")
    if not isinstance(task, ClassificationTask | RegressionTask) or isinstance(said, np.ndarray):
        return said
    box = shapely.box(*metadata.crop_bounds).intersection(shapely.box(*metadata.window_bounds))
    return [Feature(STGeometry(metadata.projection, box, None), feature.properties) for feature in said]


def _plain(output: Any) -> Any:
    """On the CPU, and in a number format that numpy knows."""
    if isinstance(output, dict):
        return {name: _plain(value) for name, value in output.items()}
    return output.cpu().float() if torch.is_floating_point(output) else output.cpu()


class DetectionMerger(CropPredictionMerger):
    """Merges the detections of crops: where crops overlap, each object counts in one of them, see ``rslp.data.crops``.

    What lies outside the window is dropped.

    Args:
        overlap_pixels: what neighbouring crops share.
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
        found: list[Feature] = []
        for output in sorted(outputs, key=lambda output: (output.bounds[0], output.bounds[1])):
            x0, y0, x1, y1 = own_area(output.bounds, window.bounds, overlap=self._overlap)
            centres = [feature.geometry.shp.centroid for feature in output.output]
            inside = [x0 <= centre.x < x1 and y0 <= centre.y < y1 for centre in centres]
            found += [feature for feature, counts in zip(output.output, inside, strict=True) if counts]
        return found


def merger_for(task: Task, outputs: Sequence[PendingCropOutput], *, overlap: int, name: str) -> CropPredictionMerger:
    """How a task's outputs for the crops of a window become one.

    Args:
        task: the task.
        outputs: its outputs.
        overlap: pixels that neighbouring crops share.
        name: the task's name, for messages.

    Raises:
        ConfigError: rasters of a size that does not fit the crops.
    """
    if isinstance(outputs[0].output, np.ndarray):
        factor = _factor(outputs[0], name=name)
        return RasterMerger(overlap_pixels=overlap // factor, downsample_factor=factor)
    return DetectionMerger(overlap) if isinstance(task, DetectionTask) else VectorMerger()


def _factor(output: PendingCropOutput, *, name: str) -> int:
    """How many pixels of the window one of the output is wide; an output may be padded beyond its crop."""
    height, width = output.output.shape[-2:]
    x0, y0, x1, y1 = output.bounds
    if width >= x1 - x0 and height >= y1 - y0:
        return 1
    factor = (x1 - x0) // width
    if (width * factor, height * factor) != (x1 - x0, y1 - y0):
        what = f"predicts {width} x {height} px for crops of {x1 - x0} x {y1 - y0} px: no whole number of pixels each"
        raise ConfigError(Problem(what, key=f"model.init_args.model.init_args.decoders.{name}"))
    return int(factor)


def layer_for(task: Task, outputs: Sequence[PendingCropOutput]) -> LayerConfig:
    """A layer that can hold what a task says: classes as small integers, other rasters as 32-bit floats."""
    first = outputs[0].output
    if not isinstance(first, np.ndarray):
        return LayerConfig(type=LayerType.VECTOR)
    dtype = DType.FLOAT32
    if isinstance(task, SegmentationTask) and np.issubdtype(first.dtype, np.integer):
        dtype = DType.UINT8 if task.num_classes <= _BYTE else DType.UINT16
    return LayerConfig(type=LayerType.RASTER, band_sets=[BandSetConfig(dtype=dtype, num_bands=first.shape[0])])
