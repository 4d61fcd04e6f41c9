"""Classes: values of rasters and tables become numbers, names, and masks of polygons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rasterio.features import rasterize

from rslp.datasets.config import DatasetSpec
from rslp.datasets.labels import Labelled
from rslp.datasets.sources import Problems

# The value of pixels without a class; classes are numbered from 0 on.
UNLABELLED = 255


def number_classes(
    windows: Sequence[Labelled], spec: DatasetSpec, problems: Problems
) -> tuple[list[Labelled], list[str]]:
    """Replace the values of classes: in rasters by the number of the class, in vector labels by its name.

    Returns:
        The windows, and the classes in order.
    """
    dense = spec.task == "segmentation" and spec.labels.files is not None
    values: dict[Any, Labelled] = {}
    for window in windows:
        if dense and window.raster is not None:
            of_window: Sequence[Any] = np.unique(window.raster[~np.isnan(window.raster)]).tolist()
        else:
            of_window = [mark.value for mark in window.marks]
        for value in of_window:
            values.setdefault(_key(value), window)
    names = _class_names(values, spec)
    for value, window in values.items():
        if value not in names:
            listed = ", ".join(map(str, list(names)[:20]))
            message = f"has the class {value}, which labels.classes lacks ({listed}); add it there or to labels.ignore"
            problems.add(window.where, message)
    classes = list(dict.fromkeys(names.values()))
    if spec.labels.background is not None:
        classes = list(dict.fromkeys([spec.labels.background, *classes]))
    if len(classes) > UNLABELLED:
        problems.add("labels", f"{len(classes)} classes; at most {UNLABELLED} are possible. Is the label a number?")
        return list(windows), []
    if len(classes) < 2 and spec.task != "detection" and windows:
        problems.add("labels.classes", f"a {spec.task} needs two classes; there is {', '.join(classes) or 'none'}")
    if problems.lines:
        return list(windows), classes
    return [_with_classes(window, names, classes, spec) for window in windows], classes


def _key(value: Any) -> str:
    """A value as it is written: 1 for 1.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _class_names(values: Mapping[str, Any], spec: DatasetSpec) -> dict[str, str]:
    """The name of the class of each value."""
    classes = spec.labels.classes
    if isinstance(classes, dict):
        return {str(value): name for value, name in classes.items()}
    if classes is not None:
        in_files = spec.labels.files is not None
        return {str(number) if in_files else name: name for number, name in enumerate(classes)}

    def order(value: str) -> tuple[float, str]:
        try:
            return float(value), ""
        except ValueError:
            return math.inf, value

    return {value: value for value in sorted(values, key=order)}


def _with_classes(window: Labelled, names: Mapping[str, str], classes: Sequence[str], spec: DatasetSpec) -> Labelled:
    numbers = {name: number for number, name in enumerate(classes)}
    if spec.task != "segmentation":
        marks = tuple(replace(mark, value=names[_key(mark.value)]) for mark in window.marks)
        return replace(window, marks=marks)
    if window.raster is not None:
        raster = np.full(window.raster.shape, UNLABELLED, dtype=np.uint8)
        for value in np.unique(window.raster[~np.isnan(window.raster)]).tolist():
            raster[window.raster == value] = numbers[names[_key(value)]]
        return replace(window, raster=raster)
    grid = window.chip.grid.part(*window.part)
    fill = UNLABELLED if spec.labels.background is None else numbers[spec.labels.background]
    shapes = [(mark.shape, numbers[names[_key(mark.value)]]) for mark in window.marks]
    shape = (grid.height, grid.width)
    raster = np.full(shape, fill, dtype=np.uint8)
    if shapes:
        raster = rasterize(shapes, out_shape=shape, fill=fill, transform=grid.transform, dtype="uint8")
    return replace(window, raster=raster, marks=())


def number_values(windows: Sequence[Labelled], problems: Problems) -> list[Labelled]:
    """The windows of a regression, with vector labels as numbers."""
    result = []
    for window in windows:
        marks = []
        for mark in window.marks:
            try:
                value = float(mark.value)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                problems.add(window.where, f"its label {mark.value!r} is no number")
            marks.append(replace(mark, value=value))
        result.append(replace(window, marks=tuple(marks)))
    return result
