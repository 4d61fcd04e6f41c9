"""Pixels that hold no value: outside of a raster's file, or of the value that the file or the task calls nodata.

rslearn fills what a file does not cover with 0, which may be a class, and passes nodata on as if it were a value. Here
a label's pixels without a value are made invalid, and an image's are made NaN, in the native type of the file: once
read as INT32 or FLOAT32, a nodata value may have become another one.
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
# What a label's pixels without a value are read as: those outside of the file, those of the task's nodata value, and
# those that the file alone declares nodata. INT32 and FLOAT32 hold the three exactly, and no label comes near.
OUTSIDE, NODATA, DECLARED = MARKS = -(2**31), -(2**31) + 2**20, -(2**31) + 2**21
# A pixel's centre may lie on the edge of the file.
_EDGE = 1e-6


class UnusableLabel(ValueError):
    """A label that the task can't learn from; the message says so in plain words."""


class LabelInput(DataInput):
    """A raster of labels that a dense task learns from.

    Args:
        spec: the input that is read.
        task: the dense task, with its ``nodata_value``.

    Attributes:
        nodata: the value of the file that the task calls nodata.
        stated: whether the task says which value is nodata.
        classes: the values that are classes of the task; None for a regression.
    """

    nodata: float | None
    stated: bool
    classes: frozenset[int] | None

    def __init__(self, spec: DataInput, task: Any) -> None:
        # Every argument of rslearn's own class, as it was given.
        self.__dict__.update(vars(spec))
        self.nodata, self.stated, self.classes = task.nodata_value, task.nodata_value is not None, None
        if isinstance(task, SegmentationTask):
            mapping = task.class_id_mapping or {}
            known = {c for c in range(task.num_classes) if c not in mapping}
            known |= {value for value, to in mapping.items() if 0 <= to < task.num_classes and to != self.nodata}
            self.classes = frozenset(known - {self.nodata})
            if self.nodata in mapping:
                # The task compares after it has renamed the values.
                self.nodata = None

    def key(self) -> list[Any]:
        """What its pixels are read as depends on this, beside what every input has."""
        return [str(self.nodata), self.stated, None if self.classes is None else sorted(self.classes)]

    def marked(self, array: Array, declared: float | None, covered: Array | None) -> Array:
        """A raster in its own type, or in a wider one with marks.

        Args:
            array: the raster, as it was read.
            declared: the nodata value of its file.
            covered: which pixels the file covers; None for all.

        Raises:
            UnusableLabel: the file's nodata value is a class of the task, and the task does not say which of the two.
        """
        # Of several marks the first is set.
        marks = [] if covered is None else [(OUTSIDE, np.broadcast_to(~covered, array.shape))]
        if self.nodata is not None:
            marks.append((NODATA, nodata_eq(array, self.nodata)))
        if self.classes is not None or self.dtype == DType.INT32:
            # NaN and infinity are no class and no whole number, whatever they are meant to be.
            marks.append((DECLARED, ~np.isfinite(array)))
        if declared is not None and not same_nodata(declared, self.nodata):
            found = nodata_eq(array, declared)
            if self.classes is None or declared not in self.classes:
                marks.append((DECLARED, found))
            elif not self.stated and found.any():
                raise UnusableLabel(ambiguous(declared))
        fits = self.dtype != DType.INT32 or np.can_cast(array.dtype, np.int32)
        if fits and not any(where.any() for _, where in marks):
            return array
        wide = array.astype(np.int64 if array.dtype.kind in "iu" and array.dtype != np.uint64 else np.float64)
        if self.dtype == DType.INT32:
            # Beyond INT32 a number would become another one, perhaps a class.
            wide = np.clip(wide, OUTSIDE + 1, -(OUTSIDE + 1))
        for mark, where in reversed(marks):
            wide[where] = mark
        return wide


def ambiguous(declared: float) -> str:
    """What to say of a class that the files call nodata."""
    value = nodata_as_yaml(declared)
    return (
        f"the files declare nodata {value}, which is a class of the task; nodata_value: {value} of the task leaves it "
        "out, another nodata_value (e.g. 255) makes it a class"
    )


def nodata_as_yaml(nodata: float) -> str:
    """A nodata value as YAML has it."""
    return yaml.safe_dump(float(nodata)).split()[0] if not math.isfinite(nodata) else f"{nodata:.15g}"


def same_nodata(one: float | None, other: float | None) -> bool:
    """Whether two nodata values are the same; NaN equals NaN."""
    return one == other or (one is not None and other is not None and math.isnan(one) and math.isnan(other))


def with_labels(inputs: Mapping[str, DataInput], task: Task) -> dict[str, DataInput]:
    """The inputs; what a dense task, and nothing else, learns from is a ``LabelInput``."""
    found = dict(inputs)
    for name, spec in inputs.items():
        tasks = [one for _, one, source in label_readers(inputs, task) if source == name]
        if spec.data_type != "raster" or len(tasks) != 1:
            continue
        if kind_of(tasks[0]).dense:
            found[name] = LabelInput(spec, tasks[0])
    return found


def label_readers(inputs: Mapping[str, Any], task: Task) -> Iterator[tuple[str | None, Task, str]]:
    """Name (None where there is but one task) and task, and the input that its targets come from."""
    if not isinstance(task, MultiTask):
        if "targets" in inputs:
            yield None, task, "targets"
        return
    for name, one in task.tasks.items():
        for source, role in task.input_mapping.get(name, {}).items():
            if role == "targets" and source in inputs:
                yield name, one, source


def remove_marks(
    raw: Mapping[str, Any], inputs: Mapping[str, DataInput]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take the marks out of label rasters.

    Returns:
        the inputs as tasks expect them, with 0 where there is no label, and by input where that is (``C T H W``).
    """
    lifted, hidden = dict(raw), {}
    for name, spec in inputs.items():
        if isinstance(spec, LabelInput) and name in raw:
            image = raw[name].image
            hidden[name] = torch.isin(image, torch.tensor(MARKS, dtype=image.dtype))
            lifted[name] = RasterImage(image.masked_fill(hidden[name], 0), raw[name].timestamps)
    return lifted, hidden


def mask_unlabelled(task: Task, targets: dict[str, Any], hidden: Mapping[str, torch.Tensor]) -> None:
    """Make the pixels without a label invalid, in place, and what else is invalid a value that losses can take."""
    for name, one, source in label_readers(hidden, task):
        target = targets if name is None else targets[name]
        if source not in hidden or "valid" not in target:
            continue
        valid = target["valid"].image
        valid.masked_fill_(hidden[source], 0)
        values = target[kind_of(one).target_key].image
        # A head multiplies by the mask: NaN times 0 is NaN, and a class that there is not can't be looked up.
        values.masked_fill_(valid == 0, 0)


class NodataFormat(RasterFormat):
    """Decodes as the format it wraps, and marks the pixels without a value: NaN in images, see above in labels.

    Args:
        inner: the format.
        data_input: what is read.
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
        """Decode, see the class.

        Raises:
            ValueError: nodata that can't be told from a measurement or a class; or a pipe in place of a file.
        """
        refuse_pipes(path)
        decoded = self._inner.decode_raster(path, projection, bounds, resampling)
        declared = decoded.metadata.nodata_value
        if isinstance(self._input, LabelInput):
            covered = _covered(path, getattr(self._inner, "inner", self._inner), projection, bounds)
            array = self._input.marked(decoded.array, declared, covered)
        else:
            array = _with_gaps(decoded.array, declared, self._input)
        return RasterArray(array=array, timestamps=decoded.timestamps, metadata=decoded.metadata)


def _with_gaps(array: Array, declared: float | None, data_input: DataInput) -> Array:
    # 0 is what rslearn fills with, and what a normalisation takes for nodata where all bands are 0.
    if declared is None or declared == 0 or not (gaps := nodata_eq(array, declared)).any():
        return array
    if data_input.dtype != DType.FLOAT32:
        if not data_input.passthrough:
            return array
        raise ValueError(
            f"the file declares nodata {nodata_as_yaml(declared)}, for which {data_input.dtype.name} has no place: "
            "set dtype: FLOAT32 of the input"
        )
    return np.where(gaps, np.float32(math.nan), array.astype(np.float32))


def _covered(path: UPath, inner: RasterFormat, projection: Projection, bounds: PixelBounds) -> Array | None:
    """Which pixels ``H W`` have their centre in the file; None where all have, or where it can't be told."""
    columns, rows = np.meshgrid(
        np.arange(bounds[0], bounds[2]) + 0.5, np.arange(bounds[1], bounds[3]) + 0.5, indexing="xy"
    )
    if isinstance(inner, NumpyRasterFormat | SingleImageRasterFormat):
        x0, y0, x1, y1 = json.loads((path / "metadata.json").read_text())["bounds"]
        inside = (columns > x0) & (columns < x1) & (rows > y0) & (rows < y1)
    elif isinstance(inner, GeotiffRasterFormat):
        with open_rasterio_upath_reader(path / inner.fname) as source:
            crs, place, width, height = source.crs, source.transform, source.width, source.height
            if source.gcps[0]:
                return None
        x, y = columns * projection.x_resolution, rows * projection.y_resolution
        # Without a CRS, a file is read as one of the window's.
        if crs is not None and crs != projection.crs:
            flat = warp.transform(projection.crs, crs, x.ravel(), y.ravel())
            x, y = (np.asarray(values).reshape(x.shape) for values in flat)
        back = ~place
        column, row = back.a * x + back.b * y + back.c, back.d * x + back.e * y + back.f
        inside = (column > -_EDGE) & (column < width + _EDGE) & (row > -_EDGE) & (row < height + _EDGE)
    else:
        return None
    return None if inside.all() else inside
