"""Metrics of a task: its primary metric, that of its baseline, and those that its config asks for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks.regression import RegressionAccuracy
from rslearn.train.tasks.segmentation import MeanIoUMetric
from rslearn.train.tasks.task import Task
from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError, MeanSquaredError, Metric, MetricCollection
from torchmetrics import R2Score as StockR2

from rslp import upstream
from rslp.data.batches import tensors_to
from rslp.data.crops import PIXELS, CropPlace, joined, own_detections, own_objects
from rslp.train.metric_types import R2, BalancedAccuracy, ClassMetric, DetectionScores, MeanIoU, WithinFactor
from rslp.train.metrics.recording import RecordsState, TaskRecords
from rslp.upstream.task_kinds import TaskKind, kind_of

_SUMS = (MeanSquaredError, MeanAbsoluteError, MeanAbsolutePercentageError, StockR2, MeanIoUMetric)

Window = tuple[str, str]


@dataclass
class Tally:
    """Counts of windows and labels of one task on one split.

    Attributes:
        windows: group and name of all windows.
        labelled: the windows with a valid label.
        valid: number of valid labels; each pixel is a label of a dense task, each sample one of other tasks.
        total: number of labels.
    """

    windows: set[Window] = field(default_factory=set)
    labelled: set[Window] = field(default_factory=set)
    valid: int = 0
    total: int = 0

    @property
    def valid_share(self) -> float | None:
        """Share of the labels that are valid; None without labels."""
        return self.valid / self.total if self.total else None

    def new_windows(self, count: int) -> list[CropPlace]:
        """Places for samples each of which is a window of its own."""
        names = (("", str(len(self.windows) + i)) for i in range(count))
        return [CropPlace(name, (0, 0), None, alone=True) for name in names]

    def add(self, target: Mapping[str, Any], window: Window) -> None:
        """Add a sample's target."""
        mask = target["valid"]
        flags = (mask if isinstance(mask, torch.Tensor) else mask.image) > 0
        valid = int(flags.sum())
        self.windows.add(window)
        if valid:
            self.labelled.add(window)
        # Counts from before transforms, which may pad or scale labels.
        valid, total = target[PIXELS].tolist() if PIXELS in target else (valid, flags.numel())
        self.valid += valid
        self.total += total

    def join(self, other: Tally) -> None:
        """Add the counts of another rank."""
        self.windows |= other.windows
        self.labelled |= other.labelled
        self.valid += other.valid
        self.total += other.total


F1, F1_TUNED, THRESHOLD = "f1_score", "f1_tuned", "f1_threshold"
Target = Mapping[str, Any]
# Output of the model, target, and output of the baseline.
Sample = tuple[Any, Target, Any]


@dataclass(frozen=True)
class PrimaryMetric:
    """The metric by which tasks of one kind are judged.

    Attributes:
        name: its logged name.
        best: the value of a perfect model.
        higher_is_better: whether ``best`` is the highest value; otherwise the lowest.
        worst: the value of the worst model; None if there is no limit.
    """

    name: str
    best: float = 1.0
    higher_is_better: bool = True
    worst: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """The metrics of one task on one split.

    Attributes:
        values: every scalar metric by name; None where the split has no label to compute it from.
        primary: name of the primary metric, None for a kind of task that has none.
        floor: the primary metric of the baseline.
        score: the primary metric normalised to 0 (floor) … 1 (best); None where it has no value.
        n: number of windows with a valid label.
        n_windows: number of windows.
        valid_share: share of their labels (pixels of a dense task, otherwise samples) that are valid.
        classes: names of the classes that the primary metric is a mean over; None if it is not a mean over classes.
        threshold: a detector's score threshold for ``f1_tuned``.
        class_of: for values of one class the class's name, by the value's name.
        records: the samples, where they were recorded.
    """

    values: Mapping[str, float | None]
    primary: str | None
    floor: float | None
    score: float | None
    n: int
    n_windows: int
    valid_share: float | None
    classes: tuple[str, ...] | None = None
    threshold: float | None = None
    class_of: Mapping[str, str] = field(default_factory=dict)
    records: TaskRecords | None = field(default=None, compare=False, repr=False)


def normalised(value: float, *, floor: float, best: float) -> float:
    """Clip((value - floor) / (best - floor), 0, 1); 0 where floor equals best, or value is not finite."""
    if best == floor or not math.isfinite(value):
        return 0.0
    return min(1.0, max(0.0, (value - floor) / (best - floor)))


def _detection_scores(task: Any) -> Metric:
    """Scores that match boxes as the task's ``f1_metric_kwargs`` say, by default over all classes together."""
    rule = {k: v for k, v in task.f1_metric_kwargs.items() if k in ("cmp_mode", "cmp_threshold", "flatten_classes")}
    return DetectionScores(len(task.classes), **rule)


# For each kind of task its primary metric, and how that is made for a task.
PRIMARY: dict[str, tuple[PrimaryMetric, Callable[[Any], Metric]]] = {
    # Mean recall of the classes that occur.
    "classification": (PrimaryMetric("balanced_accuracy", worst=0.0), lambda task: BalancedAccuracy(len(task.classes))),
    # Over all pixels of a split, mean of the classes that occur.
    "segmentation": (
        PrimaryMetric("miou", worst=0.0),
        lambda task: MeanIoU(task.num_classes, without=task.nodata_value),
    ),
    "detection": (PrimaryMetric("average_precision", worst=0.0), _detection_scores),
    "regression": (PrimaryMetric("r2"), lambda _: R2()),
    "per-pixel regression": (PrimaryMetric("r2"), lambda _: R2()),
}


def primary_metric(task: Task) -> tuple[PrimaryMetric, Metric] | None:
    """The primary metric of a task, which takes what ``_pairs`` returns; None for a kind of task without one."""
    entry = PRIMARY.get(kind_of(task).name)
    return (entry[0], entry[1](task)) if entry else None


def _pairs(task: Task, outputs: Sequence[Any], targets: Sequence[Target]) -> tuple[Any, Any]:
    """Valid predictions and labels in the form that primary metrics take.

    Scores ``N C`` and classes ``N`` of samples or pixels; numbers ``N`` and ``N``, in the units of the data and in
    double precision; or for each image its detections and its objects.
    """
    kind = kind_of(task)
    if kind.unit == "object":
        valid = [i for i, target in enumerate(targets) if bool(target["valid"])]
        return [outputs[i] for i in valid], [targets[i] for i in valid]
    pairs = [_valid(kind, output, target) for output, target in zip(outputs, targets, strict=True)]
    preds, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if kind.numeric:
        scale = getattr(task, "scale_factor", 1)
        return preds.double() / scale, labels.double() / scale
    return preds, labels


def _valid(kind: TaskKind, output: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """The valid predictions and labels of one sample."""
    labels, valid = kind.labels(target), kind.valid(target)
    # Predicted numbers have the labels' shape, scores a dimension of classes before it.
    output = output.reshape(labels.shape) if kind.numeric else output.movedim(0, -1).reshape(*labels.shape, -1)
    return output[valid], labels[valid]


def _without_ignored(task: Task, target: Target) -> Target:
    """The target, in which pixels of the class that torch's losses ignore (-100) are made invalid."""
    kind = kind_of(task)
    if not kind.dense or kind.numeric:
        return target
    classes, valid = target[kind.target_key].image, target["valid"].image
    return {**target, kind.target_key: RasterImage(classes.clamp(min=0)), "valid": RasterImage(valid * (classes >= 0))}


# From how often a resample has each recorded sample, ``N``, to the values of a task's metrics.
Resampler = Callable[[npt.NDArray[np.int64]], dict[str, float | None]]
# A sample of an incomplete window, and where it lies.
Part = tuple[Sample, CropPlace]
# State of one rank: the tally, samples of incomplete windows, the states of the metrics, and the recorded samples.
MetricState = tuple[Tally, dict[Window, list[Part]], list[dict[str, Any]], RecordsState | None]


class TaskMetrics(torch.nn.Module):
    """All metrics of one task of one dataset on one split.

    Args:
        task: the task, which also lists the metrics that its config asks for.
        record: whether to record samples, and metrics by sample, too (``rslp.train.metrics.recording``).
    """

    def __init__(self, task: Task, *, record: bool = False) -> None:
        super().__init__()
        self.task = task
        self.metrics = precise_metrics(task.get_metrics())
        chosen = primary_metric(task)
        self.primary = chosen[0] if chosen else None
        self.metric = chosen[1] if chosen else None
        self.floor_metric = copy.deepcopy(self.metric)
        self._tally = Tally()
        self._parts: dict[Window, list[Part]] = {}
        upstream.disable_metric_sync(self)
        self._record = record
        self._records = self._new_records()

    def _new_records(self) -> TaskRecords | None:
        return TaskRecords.of(self.task, self.metrics, self.metric) if self._record else None

    def state(self) -> MetricState:
        """The state of this rank, on the CPU."""
        records = None if self._records is None else self._records.state()
        return self._tally, self._parts, upstream.metric_states(self), records

    def merge(self, states: Sequence[MetricState]) -> None:
        """Replace this rank's state by that of all ranks together.

        Args:
            states: the ``state()`` of each rank, in their order.
        """
        self._tally, self._parts = Tally(), {}
        for tally, parts, _, _ in states:
            self._tally.join(tally)
            for window, of_window in parts.items():
                self._parts.setdefault(window, []).extend(of_window)
        upstream.merge_metric_states(self, [metrics for _, _, metrics, _ in states])
        if self._records is not None:
            self._records.merge([records for *_, records in states if records is not None])

    def update(
        self,
        outputs: Sequence[Any],
        *,
        targets: Sequence[Target],
        constants: Sequence[Any] | None,
        places: Sequence[CropPlace] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            outputs: output of the task's head for each sample.
            targets: target of the task for each sample.
            constants: output of the baseline for each sample, None without a baseline.
            places: where each sample lies; without it, each is a window of its own.
        """
        places = places or self._tally.new_windows(len(outputs))
        targets = [_without_ignored(self.task, target) for target in targets]
        for target, place in zip(targets, places, strict=True):
            self._tally.add(target, place.window)
        samples: list[Sample] = list(zip(outputs, targets, constants or [None] * len(outputs), strict=True))
        parts = list(zip(samples, places, strict=True))
        self._add(self._complete(parts) if kind_of(self.task).unit == "object" else parts)

    def _complete(self, parts: Sequence[Part]) -> list[Part]:
        """Return the samples that are complete windows, and store the others until ``result``.

        A detection of one crop may match an object that is counted in a neighbouring crop.
        """
        complete = []
        for sample, place in parts:
            if place.own is not None:
                output, target, constant = sample
                floor = None if constant is None else own_detections(constant, place)
                sample = own_detections(output, place), own_objects(target, place), floor
            if place.alone:
                complete.append((sample, place))
            elif bool(sample[1]["valid"]):
                part = tensors_to(sample, torch.device("cpu")), place
                self._parts.setdefault(place.window, []).append(part)
        return complete

    def _add(self, parts: Sequence[Part]) -> None:
        if not parts:
            return
        outputs, targets, constants = (list(column) for column in zip(*(sample for sample, _ in parts), strict=True))
        self._add_records(parts)
        self.metrics.update(outputs, targets)
        if self.metric is None or self.floor_metric is None:
            return
        preds, labels = _pairs(self.task, outputs, targets)
        if len(labels):
            self.metric.update(preds, labels)
            if constants[0] is not None:
                self.floor_metric.update(*_pairs(self.task, constants, targets))

    def _add_records(self, parts: Sequence[Part]) -> None:
        """Record the samples that have a valid label."""
        if self._records is None:
            return
        self._records.to(self._device())
        joins = kind_of(self.task).unit == "object"
        for (output, target, _), place in parts:
            pairs = _pairs(self.task, [output], [target]) if self.metric is not None else ([], [])
            if place.metadata is not None and (len(pairs[1]) or self.metric is None):
                whole = joins and not place.alone
                self._records.add(output, target, pairs=pairs, metadata=place.metadata, joined=whole)

    def result(self, *, threshold: float | None = None, tune: bool = True) -> TaskResult:
        """Compute all metrics and reset them.

        Args:
            threshold: a detector's score threshold that was chosen on the validation split.
            tune: choose the threshold on this split instead.
        """
        for _, parts in sorted(self._parts.items()):
            outputs, targets, constants = zip(*(sample for sample, _ in parts), strict=True)
            window = (joined(outputs), joined(targets), None if constants[0] is None else joined(constants))
            self._add([(tensors_to(window, self._device()), parts[0][1])])
        result = self._computed(threshold, tune=tune)
        for metric in (self.metrics, self.metric, self.floor_metric):
            if metric is not None:
                metric.reset()
        self._tally, self._parts, self._records = Tally(), {}, self._new_records()
        return result

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.metric is None else self.metric.device

    def _computed(self, threshold: float | None, *, tune: bool) -> TaskResult:
        tally, primary = self._tally, self.primary
        values: dict[str, float | None] = dict.fromkeys(map(str, self.metrics.keys()))
        if tally.labelled:
            values = upstream.scalars(self.metrics)
        names = kind_of(self.task).class_names
        class_of = {} if names is None else upstream.classes_of(self.metrics, values, names(self.task))
        floor, score, classes = None, None, None
        if primary is not None:
            value, floor = _value(self.metric), _value(self.floor_metric)
            score = None if value is None else normalised(value, floor=floor or 0.0, best=primary.best)
            if isinstance(self.metric, DetectionScores) and score is not None and tune:
                threshold = self.metric.best_threshold()
            values |= _primary_values(self.task, primary, self.metric, threshold=threshold, tune=tune)
        if score is not None and names is not None and isinstance(self.metric, ClassMetric):
            classes = tuple(names(self.task)[index] for index in self.metric.classes())
        return TaskResult(
            values=values,
            primary=None if primary is None else primary.name,
            floor=floor,
            score=score,
            n=len(tally.labelled),
            n_windows=len(tally.windows),
            valid_share=tally.valid_share,
            classes=classes,
            threshold=threshold,
            class_of=class_of,
            records=self._records,
        )

    def resampler(self, result: TaskResult) -> Resampler:
        """The values of the metrics for resamples of the recorded samples.

        Args:
            result: the result with the records; a detector's threshold is that of the result.
        """
        records, primary = result.records, self.primary
        if records is None:
            raise ValueError("nothing was recorded")
        records.to(torch.device("cpu"))
        resample = records.states.resampler()

        def values(counts: npt.NDArray[np.int64]) -> dict[str, float | None]:
            resample(counts)
            of_task = upstream.scalars(records.metrics)
            if primary is None:
                return of_task
            return of_task | _primary_values(self.task, primary, records.metric, threshold=result.threshold, tune=False)

        return values


def _primary_values(
    task: Task, primary: PrimaryMetric, metric: Metric | None, *, threshold: float | None, tune: bool
) -> dict[str, float | None]:
    """The primary metric; of a detector also F1 at its own score threshold and at the one chosen in a validation."""
    value = _value(metric)
    values: dict[str, float | None] = {primary.name: value}
    if value is None or not isinstance(metric, DetectionScores):
        return values
    values[F1] = metric.f1(float(getattr(task, "score_threshold", 0.5)))
    if threshold is not None:
        return values | {F1_TUNED: metric.f1(threshold), THRESHOLD: threshold}
    return values | {F1_TUNED: 0.0} if tune else values


def _value(metric: Metric | None) -> float | None:
    """The value of a metric; None before its first label, or a detector's before its first object."""
    if metric is None or not metric.update_called or (isinstance(metric, DetectionScores) and not metric.classes()):
        return None
    return float(metric.compute())


def precise_metrics(metrics: MetricCollection) -> MetricCollection:
    """Change a task's metrics to sums and counts in double precision, which add up over ranks."""
    for metric in metrics.modules():
        inner = getattr(metric, "metric", None)
        if isinstance(inner, RegressionAccuracy):
            metric.metric = WithinFactor(inner.factor)
        elif isinstance(inner, _SUMS):
            inner.set_dtype(torch.float64)
    return metrics
