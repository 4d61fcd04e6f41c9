"""Nodata pixels of rasters: invalid in labels, NaN in images.

A pixel is nodata if it lies outside of its file, or has the value that the file or the task declares as nodata. rslearn
fills pixels outside of the file with 0, which may be a class, and treats nodata values like others. Here they are
recognised in the file's own dtype: conversion to INT32 or FLOAT32 may change a nodata value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import yaml
from rasterio import warp
from rasterio.enums import Resampling
from rslearn.config import DType
from rslearn.train.dataset import DataInput
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.tasks.task import Task
from rslearn.utils.array import nodata_eq
from rslearn.utils.fsspec import open_rasterio_upath_reader
from rslearn.utils.geometry import PixelBounds, Projection
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import (
    GeotiffRasterFormat,
    NumpyRasterFormat,
    RasterFormat,
    SingleImageRasterFormat,
)
from upath import UPath

from rslp.runtime.slow_reads import refuse_pipes
from rslp.upstream.task_kinds import kind_of

Array = np.ndarray[Any, np.dtype[Any]]
# Marks of a label's nodata pixels: outside of the file, of the task's nodata value, of the nodata value that the file
# alone declares. INT32 and FLOAT32 represent the three exactly, and they are far from all labels.
OUTSIDE, NODATA, DECLARED = MARKS = -(2**31), -(2**31) + 2**20, -(2**31) + 2**21
# Tolerance for centres of pixels on the edge of the file, px.
_EDGE = 1e-6


class UnusableLabel(ValueError):
    """A label that the task can't learn from; the message says why."""


class LabelInput(DataInput):
    """The raster of labels that a dense task learns from.

    Args:
        spec: the input that is read.
        task: the dense task, with its ``nodata_value``.

    Attributes:
        nodata: the value in the file that is nodata by the task's ``nodata_value``; None for none.
        stated: whether the task has a ``nodata_value``.
        classes: the values in the file that are classes of the task; None for a regression.
    """

    nodata: float | None
    stated: bool
    classes: frozenset[int] | None

    def __init__(self, spec: DataInput, task: Any) -> None:
        # All arguments of rslearn's class.
        self.__dict__.update(vars(spec))
        self.nodata, self.stated, self.classes = task.nodata_value, task.nodata_value is not None, None
        if isinstance(task, SegmentationTask):
            mapping = task.class_id_mapping or {}
            known = {c for c in range(task.num_classes) if c not in mapping}
            known |= {value for value, to in mapping.items() if 0 <= to < task.num_classes and to != self.nodata}
            self.classes = frozenset(known - {self.nodata})
            if self.nodata in mapping:
                # The task compares after the mapping, so this value of the file is not nodata.
                self.nodata = None

    def key(self) -> list[Any]:
        """The attributes on which marks depend, for fingerprints."""
        return [str(self.nodata), self.stated, None if self.classes is None else sorted(self.classes)]

    def marked(self, array: Array, declared: float | None, covered: Array | None) -> Array:
        """Mark the nodata pixels of a raster; the result has a wider dtype if there are any.

        Args:
            array: the raster in the file's dtype, ``… H W``.
            declared: the nodata value of its file.
            covered: pixels ``H W`` that the file covers; None for all.

        Raises:
            UnusableLabel: the file's nodata value is a class of the task, and the task has no ``nodata_value``.
        """
        # In order of precedence: a pixel gets the first mark that applies.
        marks = [] if covered is None else [(OUTSIDE, np.broadcast_to(~covered, array.shape))]
        if self.nodata is not None:
            marks.append((NODATA, nodata_eq(array, self.nodata)))
        if self.classes is not None or self.dtype == DType.INT32:
            # NaN and infinity are neither a class nor a whole number.
            marks.append((DECLARED, ~np.isfinite(array)))
        if declared is not None and not same_nodata(declared, self.nodata):
            equal = nodata_eq(array, declared)
            if self.classes is None or declared not in self.classes:
                marks.append((DECLARED, equal))
            elif not self.stated and equal.any():
                raise UnusableLabel(ambiguous_nodata(declared))
        fits = self.dtype != DType.INT32 or np.can_cast(array.dtype, np.int32)
        if fits and not any(where.any() for _, where in marks):
            return array
        wide = array.astype(np.int64 if array.dtype.kind in "iu" and array.dtype != np.uint64 else np.float64)
        if self.dtype == DType.INT32:
            # A number beyond INT32 would overflow, perhaps to a class.
            wide = np.clip(wide, OUTSIDE + 1, -(OUTSIDE + 1))
        for mark, where in reversed(marks):
            wide[where] = mark
        return wide


def ambiguous_nodata(declared: float) -> str:
    """The message for files whose declared nodata value is a class of the task."""
    value = nodata_as_yaml(declared)
    return (
        f"the files declare nodata {value}, which is a class of the task; nodata_value: {value} of the task leaves it "
        "out, another nodata_value (e.g. 255) makes it a class"
    )


def nodata_as_yaml(nodata: float) -> str:
    """A nodata value as text in YAML."""
    return yaml.safe_dump(float(nodata)).split()[0] if not math.isfinite(nodata) else f"{nodata:.15g}"


def same_nodata(first: float | None, second: float | None) -> bool:
    """Whether two nodata values are the same; NaN equals NaN."""
    return first == second or (first is not None and second is not None and math.isnan(first) and math.isnan(second))


def with_labels(inputs: Mapping[str, DataInput], task: Task) -> dict[str, DataInput]:
    """The inputs, with a ``LabelInput`` for each raster that is the label of one dense task and of no other task."""
    marked = dict(inputs)
    for name, spec in inputs.items():
        tasks = [reader for _, reader, source in label_readers(inputs, task) if source == name]
        if spec.data_type != "raster" or len(tasks) != 1:
            continue
        if kind_of(tasks[0]).dense:
            marked[name] = LabelInput(spec, tasks[0])
    return marked


def label_readers(inputs: Mapping[str, Any], task: Task) -> Iterator[tuple[str | None, Task, str]]:
    """For each task with labels: its name (None outside of a ``MultiTask``), the task, and the input of its labels."""
    if not isinstance(task, MultiTask):
        if "targets" in inputs:
            yield None, task, "targets"
        return
    for name, part in task.tasks.items():
        for source, role in task.input_mapping.get(name, {}).items():
            if role == "targets" and source in inputs:
                yield name, part, source


def remove_marks(
    raw: Mapping[str, Any], inputs: Mapping[str, DataInput]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Replace the marks in label rasters by 0.

    Returns:
        The inputs without marks, and by input a mask ``C T H W`` of the pixels that had one.
    """
    unmarked, masks = dict(raw), {}
    for name, spec in inputs.items():
        if isinstance(spec, LabelInput) and name in raw:
            image = raw[name].image
            masks[name] = torch.isin(image, torch.tensor(MARKS, dtype=image.dtype))
            unmarked[name] = RasterImage(image.masked_fill(masks[name], 0), raw[name].timestamps)
    return unmarked, masks


def mask_unlabelled(task: Task, targets: dict[str, Any], masks: Mapping[str, torch.Tensor]) -> None:
    """Mark unlabelled pixels as invalid in a task's targets, and set all invalid pixels to 0, in place.

    Args:
        task: the task.
        targets: its output; by task for a ``MultiTask``.
        masks: the masks of ``remove_marks``.
    """
    for name, part, source in label_readers(masks, task):
        target = targets if name is None else targets[name]
        if source not in masks or "valid" not in target:
            continue
        valid = target["valid"].image
        valid.masked_fill_(masks[source], 0)
        values = target[kind_of(part).target_key].image
        # Heads multiply losses by the valid mask: NaN times 0 is NaN, and an unknown class can't be looked up.
        values.masked_fill_(valid == 0, 0)


class NodataFormat(RasterFormat):
    """Wraps a raster format and marks nodata pixels: by NaN in images, by ``MARKS`` in labels.

    Args:
        inner: the wrapped format.
        data_input: the input that is read; a ``LabelInput`` for labels.
    """

    def __init__(self, inner: RasterFormat, data_input: DataInput) -> None:
        self._inner = inner
        self._input = data_input

    def decode_raster(
        self,
        path: UPath,
        projection: Projection,
        bounds: PixelBounds,
        resampling: Resampling = Resampling.bilinear,
    ) -> RasterArray:
        """Decode a raster and mark its nodata pixels.

        Raises:
            ValueError: the dtype of the input can't represent nodata, the file's nodata value is a class
                (``UnusableLabel``), or a pipe lies in place of a file.
        """
        refuse_pipes(path)
        decoded = self._inner.decode_raster(path, projection, bounds, resampling)
        declared = decoded.metadata.nodata_value
        if isinstance(self._input, LabelInput):
            covered = _covered(path, getattr(self._inner, "inner", self._inner), projection, bounds)
            array = self._input.marked(decoded.array, declared, covered)
        else:
            array = _nodata_as_nan(decoded.array, declared, self._input)
        return RasterArray(array=array, timestamps=decoded.timestamps, metadata=decoded.metadata)


def _nodata_as_nan(array: Array, declared: float | None, data_input: DataInput) -> Array:
    # 0 stays: rslearn fills with it, and HeliosNormalize treats pixels of 0 in all bands as nodata.
    if declared is None or declared == 0 or not (nodata := nodata_eq(array, declared)).any():
        return array
    if data_input.dtype != DType.FLOAT32:
        if not data_input.passthrough:
            return array
        raise ValueError(
            f"the file declares nodata {nodata_as_yaml(declared)}, which {data_input.dtype.name} can't represent: "
            "set dtype: FLOAT32 of the input"
        )
    return np.where(nodata, np.float32(math.nan), array.astype(np.float32))


def _covered(path: UPath, inner: RasterFormat, projection: Projection, bounds: PixelBounds) -> Array | None:
    """Mask ``H W`` of the pixels whose centre the file covers; None if all are covered, or coverage is unknown."""
    columns, rows = np.meshgrid(
        np.arange(bounds[0], bounds[2]) + 0.5, np.arange(bounds[1], bounds[3]) + 0.5, indexing="xy"
    )
    if isinstance(inner, NumpyRasterFormat | SingleImageRasterFormat):
        x0, y0, x1, y1 = json.loads((path / "metadata.json").read_text())["bounds"]
        inside = (columns > x0) & (columns < x1) & (rows > y0) & (rows < y1)
    elif isinstance(inner, GeotiffRasterFormat):
        with open_rasterio_upath_reader(path / inner.fname) as source:
            crs, transform, width, height = source.crs, source.transform, source.width, source.height
            if source.gcps[0]:
                return None
        x, y = columns * projection.x_resolution, rows * projection.y_resolution
        # A file without a CRS is read in that of the window.
        if crs is not None and crs != projection.crs:
            warped = warp.transform(projection.crs, crs, x.ravel(), y.ravel())
            x, y = (np.asarray(values).reshape(x.shape) for values in warped)
        inverse = ~transform
        column, row = inverse.a * x + inverse.b * y + inverse.c, inverse.d * x + inverse.e * y + inverse.f
        inside = (column > -_EDGE) & (column < width + _EDGE) & (row > -_EDGE) & (row < height + _EDGE)
    else:
        return None
    return None if inside.all() else inside
