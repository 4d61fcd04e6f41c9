"""Do the labels on disk agree with the classes that the task is configured with?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks import Task
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.utils.feature import Feature
from shapely.geometry.base import BaseMultipartGeometry

from rslp.check.findings import Finding, listed, warning
from rslp.errors import KeyPath
from rslp.upstream.nodata import DECLARED, MARKS, OUTSIDE, nodata_as_yaml

Label = RasterImage | list[Feature]
# Reprojection may leave a few pixels at an edge.
_WHOLE = 0.99


@dataclass(frozen=True)
class LabelSummary:
    """The labels of one task in one split.

    Attributes:
        classes: how often each configured class was seen (windows, objects or pixels); empty for regression.
        low: the lowest value of a regression's labels, in the units of the file.
        high: the highest.
    """

    classes: Mapping[str, int]
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class TaskLabels:
    """The labels of one task as they were read.

    Attributes:
        dataset: the dataset's key.
        name: the task's name.
        task: the task.
        at: where its arguments stand.
        split: the split.
        found: per window its ``group/name`` and what stands in its label layer.
        declared: the nodata values of the files of rasters with nodata; None for files without one.
        outside: windows with features that lie elsewhere, and their number.
    """

    dataset: str
    name: str
    task: Task
    at: KeyPath
    split: str
    found: Sequence[tuple[str, Label]]
    declared: Sequence[float | None] = ()
    outside: Mapping[str, int] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """How messages call it."""
        return f"dataset {self.dataset!r}, split {self.split!r}, task {self.name!r}"


def check_labels(labels: TaskLabels) -> tuple[LabelSummary, list[Finding]]:
    """Compare labels with the task.

    Returns:
        What there is, and what is wrong; tasks of other kinds than rslearn's usual ones are not looked at.
    """
    task = labels.task
    if isinstance(task, ClassificationTask | DetectionTask):
        return _named(labels, task)
    if isinstance(task, SegmentationTask):
        return _painted(labels, task)
    if isinstance(task, RegressionTask):
        return _measured(labels, task)
    if isinstance(task, PerPixelRegressionTask):
        return _mapped(labels, task)
    return LabelSummary({}), []


def compare_splits(labels: TaskLabels, train: LabelSummary, held: LabelSummary) -> list[Finding]:
    """Classes that a held-out split has and training lacks can't be learnt."""
    unseen = [name for name, count in held.classes.items() if count and not train.classes.get(name)]
    what = f"{labels.who}: has {listed(unseen)}, which no training label that was looked at has"
    return [warning(what, labels.at, id="label-unseen")] if unseen else []


def _values(found: Iterable[tuple[str, Label]], property_name: str) -> list[tuple[str, list[Any]]]:
    return [
        (window, [f.properties[property_name] for f in label if f.properties and property_name in f.properties])
        for window, label in found
        if isinstance(label, list)
    ]


def _named(labels: TaskLabels, task: ClassificationTask | DetectionTask) -> tuple[LabelSummary, list[Finding]]:
    single = isinstance(task, ClassificationTask)
    counts, strange, empty = Counter[str](), Counter[str](), []
    for window, values in _values(labels.found, task.property_name):
        if not values:
            empty.append(window)
        # A window's class is that of its first feature.
        for value in values[:1] if single else values:
            name = _class_name(value, task)
            (counts if name is not None else strange)[name or ("null" if value is None else str(value))] += 1
    findings = [*_several(labels, task), *_elsewhere(labels)]
    if strange and not task.skip_unknown_categories:
        what = f"{labels.who}: {sum(strange.values())} labels are not among the classes: {listed(strange)}"
        findings.append(
            Finding(f"{what}; configured: {listed(task.classes, 20)}", (*labels.at, "classes"), id="label-unknown")
        )
    empty = [window for window in empty if window not in labels.outside]
    if isinstance(task, ClassificationTask) and empty and not task.allow_invalid:
        what = f"{labels.who}: {len(empty)} of {len(labels.found)} windows have no label with the property "
        findings.append(
            Finding(
                f"{what}{task.property_name!r}, e.g. {empty[0]}{_other(labels)}",
                (*labels.at, "property_name"),
                id="label-lacking",
            )
        )
    if not single and labels.found and len(empty) == len(labels.found) and not _all_elsewhere(labels):
        what = f"{labels.who}: no object with the property {task.property_name!r} in {len(empty)} windows"
        at = (*labels.at, "property_name")
        findings.append(Finding(what + _other(labels), at, error=labels.split == "train", id="label-lacking"))
    return LabelSummary({name: counts[name] for name in task.classes}), findings


def _several(labels: TaskLabels, task: ClassificationTask | DetectionTask | RegressionTask) -> list[Finding]:
    """Features that a task takes for one, and windows of whose labels it takes the first."""
    if isinstance(task, DetectionTask):
        parts = {
            window: len(shape.geoms)
            for window, label in labels.found
            if isinstance(label, list)
            for shape in (feature.geometry.shp for feature in label)
            if isinstance(shape, BaseMultipartGeometry) and len(shape.geoms) > 1
        }
        example = next(iter(parts), None)
        what = f"{labels.who}: features of {len(parts)} windows have several parts, e.g. {example} "
        what += f"({parts.get(str(example))} parts): each becomes one box; make each part a feature of its own"
        return [warning(what, labels.at, id="label-parts")] if parts else []
    values = {window: list(dict.fromkeys(values)) for window, values in _values(labels.found, task.property_name)}
    unlike = {window: own for window, own in values.items() if len(own) > 1}
    example = next(iter(unlike), None)
    what = f"{labels.who}: {len(unlike)} of {len(labels.found)} windows have labels of several values, e.g. {example}: "
    what += f"{listed(unlike.get(str(example), []))}; the first is taken"
    return [warning(what, (*labels.at, "property_name"), id="label-several")] if unlike else []


def _elsewhere(labels: TaskLabels) -> list[Finding]:
    """Features that do not touch their window: an error where none does."""
    count = sum(labels.outside.values())
    if not count:
        return []
    what = (
        f"{labels.who}: {count} features in {len(labels.outside)} of {len(labels.found)} windows lie outside of their "
    )
    what += f"window, e.g. of {next(iter(labels.outside))}: another CRS, or x and y exchanged? They are left out"
    return [Finding(what, labels.at, error=_all_elsewhere(labels), id="label-elsewhere")]


def _all_elsewhere(labels: TaskLabels) -> bool:
    return bool(labels.outside) and not any(label for _, label in labels.found if isinstance(label, list))


def _class_name(value: Any, task: ClassificationTask | DetectionTask) -> str | None:
    if not task.read_class_id:
        return value if value in task.classes else None
    try:
        index = int(value)
    except (TypeError, ValueError):
        return None
    return str(task.classes[index]) if 0 <= index < len(task.classes) else None


def _other(labels: TaskLabels) -> str:
    """The properties that the labels do have."""
    have = {key for _, label in labels.found if isinstance(label, list) for f in label for key in f.properties or {}}
    return f"; properties there: {listed(sorted(have))}" if have else ""


def _painted(labels: TaskLabels, task: SegmentationTask) -> tuple[LabelSummary, list[Finding]]:
    counts: Counter[int] = Counter()
    pixels, findings = _pixels(labels, task.nodata_value)
    for value, number in zip(*(part.tolist() for part in np.unique(pixels, return_counts=True)), strict=True):
        counts[int((task.class_id_mapping or {}).get(int(value), int(value)))] += number
    hidden = {task.nodata_value} if task.nodata_value is not None else set()
    strange = sorted(value for value in counts if not 0 <= value < task.num_classes and value not in hidden)
    if strange:
        what = f"{labels.who}: pixels hold the class {listed(strange)}, but num_classes is {task.num_classes}"
        tail = f" and nodata_value {task.nodata_value}" if hidden else "; is that a nodata_value?"
        findings.append(Finding(what + tail, (*labels.at, "num_classes"), id="label-range"))
    if set(counts) <= hidden and not any(finding.error for finding in findings):
        findings.append(
            Finding(
                f"{labels.who}: all pixels that were looked at are nodata",
                (*labels.at, "nodata_value"),
                id="label-nodata",
            )
        )
    names: Iterable[object] = task.class_names or range(task.num_classes)
    return LabelSummary({str(name): 0 if i in hidden else counts[i] for i, name in enumerate(names)}), findings


def _measured(labels: TaskLabels, task: RegressionTask) -> tuple[LabelSummary, list[Finding]]:
    numbers: list[float] = []
    strange: list[Any] = []
    empty: list[str] = []
    for window, values in _values(labels.found, task.property_name):
        if not values:
            empty.append(window)
            continue
        try:
            number = float(values[0])
        except (TypeError, ValueError):
            number = float("nan")
        if np.isfinite(number):
            numbers.append(number)
        else:
            strange.append("null" if values[0] is None else str(values[0]))
    at, findings = (*labels.at, "property_name"), [*_several(labels, task), *_elsewhere(labels)]
    if strange:
        what = f"{labels.who}: {len(strange)} labels are no finite number: {listed(dict.fromkeys(strange))}"
        findings.append(Finding(what, at, id="label-number"))
    empty = [window for window in empty if window not in labels.outside]
    if empty and not task.allow_invalid:
        what = f"{labels.who}: {len(empty)} of {len(labels.found)} windows have no label with the property "
        what += f"{task.property_name!r}, e.g. {empty[0]}{_other(labels)}"
        findings.append(Finding(what, at, id="label-lacking"))
    return _spread(labels, np.array(numbers), findings)


def _mapped(labels: TaskLabels, task: PerPixelRegressionTask) -> tuple[LabelSummary, list[Finding]]:
    valid, findings = _pixels(labels, task.nodata_value)
    if not np.isfinite(valid).all():
        what = f"{labels.who}: {int((~np.isfinite(valid)).sum())} label pixels are no finite number; set nodata_value"
        findings.append(Finding(what, (*labels.at, "nodata_value"), id="label-number"))
    return _spread(labels, valid[np.isfinite(valid)], findings)


def _pixels(labels: TaskLabels, nodata: float | None) -> tuple[Any, list[Finding]]:
    """The label pixels of all windows that are neither nodata nor outside of their file, and what to say of those."""
    images = [(window, label.image.numpy()) for window, label in labels.found if isinstance(label, RasterImage)]
    if not images:
        return np.empty(0), []
    values = np.concatenate([image.ravel() for _, image in images])
    covered = {window: float((image != OUTSIDE).mean()) for window, image in images}
    share, least = sum(covered.values()) / len(covered), min(covered, key=lambda window: covered[window])
    findings = []
    if share == 0:
        what = f"{labels.who}: the label files cover nothing of {len(images)} windows, e.g. {least}: they lie elsewhere"
        findings.append(Finding(what, labels.at, id="label-nowhere"))
    elif share < _WHOLE:
        what = f"{labels.who}: the label files cover {share:.0%} of the windows, mean over {len(images)} windows "
        what += f"({covered[least]:.0%} of {least}); pixels outside are left out"
        findings.append(warning(what, labels.at, id="label-part"))
    lost = float((values == DECLARED).mean())
    for declared in labels.declared:
        what = f"{labels.who}: {_declared(declared, nodata, lost)}"
        findings.append(warning(what, (*labels.at, "nodata_value"), id="label-declared"))
    return values[~np.isin(values, MARKS)], findings


def _declared(declared: float | None, nodata: float | None, share: float) -> str:
    if declared is None:
        return f"{share:.0%} of the label pixels are NaN or infinite, and are left out"
    own = "the task has none" if nodata is None else f"the task has {nodata_as_yaml(nodata)}"
    name = nodata_as_yaml(declared)
    return f"the files declare nodata {name}, {own}: {share:.0%} of the pixels are left out; set nodata_value: {name}"


def _spread(labels: TaskLabels, values: Any, findings: list[Finding]) -> tuple[LabelSummary, list[Finding]]:
    if values.size == 0:
        return LabelSummary({}), findings
    low, high = float(values.min()), float(values.max())
    if low == high and values.size > 1:
        what = f"{labels.who}: all {values.size} labels are {low:g}"
        findings.append(warning(what, labels.at, id="label-constant"))
    return LabelSummary({}, low, high), findings
