"""Compare labels on disk with the task: classes, numbers, nodata, and features or pixels outside of their window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from rslp.upstream.task_kinds import kind_of

Label = RasterImage | list[Feature]
# Reprojection may leave a few pixels at an edge: a larger share covers a window.
_COVERED = 0.99


@dataclass(frozen=True)
class LabelSummary:
    """The labels of one task in one split.

    Attributes:
        classes: for each configured class its number of windows, objects or pixels; empty for regression.
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
        at: key path of its arguments.
        split: the split.
        windows: for each window its ``group/name`` and its label.
        declared: the nodata values that the files of rasters with nodata declare; None for files that declare none.
        outside: for windows with features outside of them, the number of these.
    """

    dataset: str
    name: str
    task: Task
    at: KeyPath
    split: str
    windows: Sequence[tuple[str, Label]]
    declared: Sequence[float | None] = ()
    outside: Mapping[str, int] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """The beginning of messages about them."""
        return f"dataset {self.dataset!r}, split {self.split!r}, task {self.name!r}"


def check_labels(labels: TaskLabels) -> tuple[LabelSummary, list[Finding]]:
    """Compare labels with the task.

    Returns:
        A summary, and what is wrong; tasks of a kind of their own are not checked.
    """
    check = CHECKS.get(kind_of(labels.task).name)
    return check(labels, labels.task) if check else (LabelSummary({}), [])


def compare_splits(labels: TaskLabels, train: LabelSummary, held_out: LabelSummary) -> list[Finding]:
    """Find classes that a held-out split has and training lacks, which can't be learnt."""
    unseen = [name for name, count in held_out.classes.items() if count and not train.classes.get(name)]
    message = f"{labels.who}: has {listed(unseen)}, which no training label that was looked at has"
    return [warning(message, labels.at, id="label-unseen")] if unseen else []


def _values(windows: Iterable[tuple[str, Label]], property_name: str) -> list[tuple[str, list[Any]]]:
    """For each window with vector labels the values of a property; features without it are left out."""
    return [
        (window, [f.properties[property_name] for f in label if f.properties and property_name in f.properties])
        for window, label in windows
        if isinstance(label, list)
    ]


def _named(labels: TaskLabels, task: ClassificationTask | DetectionTask) -> tuple[LabelSummary, list[Finding]]:
    """Check features whose property names a class."""
    single = isinstance(task, ClassificationTask)
    counts, unknown, empty = Counter[str](), Counter[str](), []
    for window, values in _values(labels.windows, task.property_name):
        if not values:
            empty.append(window)
        # A window's class is that of its first feature.
        for value in values[:1] if single else values:
            name = _class_name(value, task)
            (counts if name is not None else unknown)[name or ("null" if value is None else str(value))] += 1
    findings = [*_first_values(labels, task), *_elsewhere(labels)]
    if unknown and not task.skip_unknown_categories:
        message = f"{labels.who}: {sum(unknown.values())} labels are not among the classes: {listed(unknown)}"
        message += f"; configured: {listed(task.classes, 20)}"
        findings.append(Finding(message, (*labels.at, "classes"), id="label-unknown"))
    if isinstance(task, ClassificationTask):
        findings += _unlabelled(labels, task, empty)
    empty = [window for window in empty if window not in labels.outside]
    if not single and labels.windows and len(empty) == len(labels.windows) and not _all_elsewhere(labels):
        message = f"{labels.who}: no object with the property {task.property_name!r} in {len(empty)} windows"
        key_path = (*labels.at, "property_name")
        error = labels.split == "train"
        findings.append(Finding(message + _properties(labels), key_path, error=error, id="label-lacking"))
    return LabelSummary({name: counts[name] for name in task.classes}), findings


def _unlabelled(labels: TaskLabels, task: ClassificationTask | RegressionTask, empty: Sequence[str]) -> list[Finding]:
    """Find windows without a label, unless the task allows them or their features lie elsewhere."""
    empty = [window for window in empty if window not in labels.outside]
    if not empty or task.allow_invalid:
        return []
    message = f"{labels.who}: {len(empty)} of {len(labels.windows)} windows have no label with the property "
    message += f"{task.property_name!r}, e.g. {empty[0]}{_properties(labels)}"
    return [Finding(message, (*labels.at, "property_name"), id="label-lacking")]


def _first_values(labels: TaskLabels, task: ClassificationTask | DetectionTask | RegressionTask) -> list[Finding]:
    """Warn of features of several parts, which become one box, and of windows where only the first label counts."""
    if isinstance(task, DetectionTask):
        parts = {
            window: len(shape.geoms)
            for window, label in labels.windows
            if isinstance(label, list)
            for shape in (feature.geometry.shp for feature in label)
            if isinstance(shape, BaseMultipartGeometry) and len(shape.geoms) > 1
        }
        example = next(iter(parts), None)
        message = f"{labels.who}: features of {len(parts)} windows have several parts, e.g. {example} "
        message += f"({parts.get(str(example))} parts): each becomes one box; make each part a feature of its own"
        return [warning(message, labels.at, id="label-parts")] if parts else []
    values = {window: list(dict.fromkeys(values)) for window, values in _values(labels.windows, task.property_name)}
    several = {window: distinct for window, distinct in values.items() if len(distinct) > 1}
    example = next(iter(several), None)
    message = f"{labels.who}: {len(several)} of {len(labels.windows)} windows have labels of several values, e.g. "
    message += f"{example}: {listed(several.get(str(example), []))}; the first is taken"
    return [warning(message, (*labels.at, "property_name"), id="label-several")] if several else []


def _elsewhere(labels: TaskLabels) -> list[Finding]:
    """Find features that do not touch their window: an error if none does."""
    count = sum(labels.outside.values())
    if not count:
        return []
    message = (
        f"{labels.who}: {count} features in {len(labels.outside)} of {len(labels.windows)} windows lie outside of "
    )
    message += (
        f"their window, e.g. of {next(iter(labels.outside))}: another CRS, or x and y exchanged? They are left out"
    )
    return [Finding(message, labels.at, error=_all_elsewhere(labels), id="label-elsewhere")]


def _all_elsewhere(labels: TaskLabels) -> bool:
    return bool(labels.outside) and not any(label for _, label in labels.windows if isinstance(label, list))


def _class_name(value: Any, task: ClassificationTask | DetectionTask) -> str | None:
    """The class that a property's value (a name, or an index with ``read_class_id``) means; None if it means none."""
    if not task.read_class_id:
        return value if value in task.classes else None
    try:
        index = int(value)
    except (TypeError, ValueError):
        return None
    return str(task.classes[index]) if 0 <= index < len(task.classes) else None


def _properties(labels: TaskLabels) -> str:
    """The end of a message that lists the properties of the features."""
    names = {key for _, label in labels.windows if isinstance(label, list) for f in label for key in f.properties or {}}
    return f"; properties there: {listed(sorted(names))}" if names else ""


def _painted(labels: TaskLabels, task: SegmentationTask) -> tuple[LabelSummary, list[Finding]]:
    """Check rasters whose pixels are class numbers."""
    counts: Counter[int] = Counter()
    pixels, findings = _pixels(labels, task.nodata_value)
    for value, number in zip(*(part.tolist() for part in np.unique(pixels, return_counts=True)), strict=True):
        counts[int((task.class_id_mapping or {}).get(int(value), int(value)))] += number
    nodata = {task.nodata_value} if task.nodata_value is not None else set()
    unknown = sorted(value for value in counts if not 0 <= value < task.num_classes and value not in nodata)
    if unknown:
        message = f"{labels.who}: pixels hold the class {listed(unknown)}, but num_classes is {task.num_classes}"
        message += f" and nodata_value {task.nodata_value}" if nodata else "; is that a nodata_value?"
        findings.append(Finding(message, (*labels.at, "num_classes"), id="label-range"))
    if set(counts) <= nodata and not any(finding.error for finding in findings):
        message = f"{labels.who}: all pixels that were looked at are nodata"
        findings.append(Finding(message, (*labels.at, "nodata_value"), id="label-nodata"))
    names: Iterable[object] = task.class_names or range(task.num_classes)
    return LabelSummary({str(name): 0 if i in nodata else counts[i] for i, name in enumerate(names)}), findings


def _measured(labels: TaskLabels, task: RegressionTask) -> tuple[LabelSummary, list[Finding]]:
    """Check features whose property is a number."""
    numbers: list[float] = []
    invalid: list[Any] = []
    empty: list[str] = []
    for window, values in _values(labels.windows, task.property_name):
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
            invalid.append("null" if values[0] is None else str(values[0]))
    findings = [*_first_values(labels, task), *_elsewhere(labels)]
    if invalid:
        message = f"{labels.who}: {len(invalid)} labels are no finite number: {listed(dict.fromkeys(invalid))}"
        findings.append(Finding(message, (*labels.at, "property_name"), id="label-number"))
    return _summary_of_values(labels, np.array(numbers), [*findings, *_unlabelled(labels, task, empty)])


def _mapped(labels: TaskLabels, task: PerPixelRegressionTask) -> tuple[LabelSummary, list[Finding]]:
    """Check rasters whose pixels are numbers."""
    pixels, findings = _pixels(labels, task.nodata_value)
    finite = np.isfinite(pixels)
    if not finite.all():
        message = f"{labels.who}: {int((~finite).sum())} label pixels are no finite number; set nodata_value"
        findings.append(Finding(message, (*labels.at, "nodata_value"), id="label-number"))
    return _summary_of_values(labels, pixels[finite], findings)


def _pixels(labels: TaskLabels, nodata: float | None) -> tuple[Any, list[Finding]]:
    """The label pixels of all windows that are neither nodata nor outside of their file; findings about the others."""
    images = [(window, label.image.numpy()) for window, label in labels.windows if isinstance(label, RasterImage)]
    if not images:
        return np.empty(0), []
    values = np.concatenate([image.ravel() for _, image in images])
    covered = {window: float((image != OUTSIDE).mean()) for window, image in images}
    share, least = sum(covered.values()) / len(covered), min(covered, key=lambda window: covered[window])
    findings = []
    if share == 0:
        message = (
            f"{labels.who}: the label files cover nothing of {len(images)} windows, e.g. {least}: they lie elsewhere"
        )
        findings.append(Finding(message, labels.at, id="label-nowhere"))
    elif share < _COVERED:
        message = f"{labels.who}: the label files cover {share:.0%} of the windows, mean over {len(images)} windows "
        message += f"({covered[least]:.0%} of {least}); pixels outside are left out"
        findings.append(warning(message, labels.at, id="label-part"))
    nodata_share = float((values == DECLARED).mean())
    for declared in labels.declared:
        message = f"{labels.who}: {_declared_text(declared, nodata, nodata_share)}"
        findings.append(warning(message, (*labels.at, "nodata_value"), id="label-declared"))
    return values[~np.isin(values, MARKS)], findings


def _declared_text(declared: float | None, nodata: float | None, share: float) -> str:
    if declared is None:
        return f"{share:.0%} of the label pixels are NaN or infinite, and are left out"
    of_task = "the task has none" if nodata is None else f"the task has {nodata_as_yaml(nodata)}"
    value = nodata_as_yaml(declared)
    left_out = f"{share:.0%} of the pixels are left out"
    return f"the files declare nodata {value}, {of_task}: {left_out}; set nodata_value: {value}"


def _summary_of_values(labels: TaskLabels, values: Any, findings: list[Finding]) -> tuple[LabelSummary, list[Finding]]:
    """The range of a regression's labels; a warning is added if all are the same."""
    if values.size == 0:
        return LabelSummary({}), findings
    low, high = float(values.min()), float(values.max())
    if low == high and values.size > 1:
        message = f"{labels.who}: all {values.size} labels are {low:g}"
        findings.append(warning(message, labels.at, id="label-constant"))
    return LabelSummary({}, low, high), findings


# For each kind of task how its labels are checked.
CHECKS: dict[str, Callable[[TaskLabels, Any], tuple[LabelSummary, list[Finding]]]] = {
    "classification": _named,
    "segmentation": _painted,
    "detection": _named,
    "regression": _measured,
    "per-pixel regression": _mapped,
}
