"""Records of an evaluation by sample: place, prediction, label, and the states of the metrics after it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rslearn.train.model_context import SampleMetadata
from rslearn.train.tasks.task import Task
from rslearn.utils.geometry import PixelBounds
from torchmetrics import Metric, MetricCollection

from rslp import upstream
from rslp.upstream.places import place_of
from rslp.upstream.task_kinds import TaskKind, kind_of

# What a primary metric depends on (``PRIMARY``), from which a comparison makes it again without the run's config.
_ATTRIBUTES = ("classes", "class_names", "num_classes", "nodata_value", "f1_metric_kwargs")
# The valid predictions and labels of one sample, as primary metrics take them, to the columns of its record.
Columns = Callable[[Any, Any], dict[str, Any]]


@dataclass(frozen=True)
class SampleRecord:
    """One sample of a task, or for a detector one window: its crops are joined.

    Attributes:
        group: group of its window.
        window: name of its window.
        bounds: x0, y0, x1, y1 of the crop in pixels of the window's projection.
        place: longitude and latitude of the crop's centre.
        columns: prediction and label, see ``COLUMNS``; empty for a kind of task without an entry there.
    """

    group: str
    window: str
    bounds: PixelBounds
    place: tuple[float, float]
    columns: dict[str, Any]


def _classes(preds: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    return {"label": int(labels[0]), "probabilities": preds[0].float().tolist()}


def _numbers(preds: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    return {"target": float(labels[0]), "value": float(preds[0])}


def _class_pixels(preds: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Confusion counts: label, predicted class and number of pixels of each pair that occurs."""
    pairs = labels * preds.shape[1] + preds.argmax(dim=1)
    present, pixels = torch.unique(pairs, return_counts=True)
    label, predicted = (part.tolist() for part in (present // preds.shape[1], present % preds.shape[1]))
    return {"confusion_label": label, "confusion_predicted": predicted, "confusion_pixels": pixels.tolist()}


def _number_pixels(preds: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Sums over the pixels, from which squared and absolute errors and R2 of any samples follow."""
    errors, mean = preds - labels, labels.mean()
    return {
        "pixels": len(labels),
        "target_mean": float(mean),
        "target_squares": float(((labels - mean) ** 2).sum()),
        "error": float(errors.sum()),
        "absolute_error": float(errors.abs().sum()),
        "squared_error": float((errors**2).sum()),
    }


def _objects(preds: list[dict[str, Any]], targets: list[dict[str, Any]]) -> dict[str, Any]:
    """Detections by descending score, and objects; boxes x0 y0 x1 y1 in pixels from the crop's corner."""
    (detections,), (objects,) = preds, targets
    order = torch.argsort(detections["scores"], descending=True)
    order = order[torch.isfinite(detections["scores"][order])]
    return {
        "boxes": detections["boxes"][order].float().tolist(),
        "scores": detections["scores"][order].double().tolist(),
        "labels": detections["labels"][order].tolist(),
        "true_boxes": objects["boxes"].float().tolist(),
        "true_labels": objects["labels"].tolist(),
    }


# By what a label belongs to, and whether it is a number.
COLUMNS: dict[tuple[str, bool], Columns] = {
    ("window", False): _classes,
    ("window", True): _numbers,
    ("pixel", False): _class_pixels,
    ("pixel", True): _number_pixels,
    ("object", False): _objects,
}


RecordsState = tuple[list[SampleRecord], list[list[upstream.StatesBySample]]]


@dataclass
class TaskRecords:
    """The records of one task on one split.

    Attributes:
        kind: the kind of the task.
        description: what the primary metric depends on.
        metrics: copies of the task's metrics, to compute their values for resamples.
        metric: likewise its primary metric; None without one.
        states: the states of the metrics after each recorded sample.
        records: the samples with a valid label.
        device: where the metrics are.
    """

    kind: TaskKind
    description: dict[str, Any]
    metrics: MetricCollection
    metric: Metric | None
    states: upstream.SampleStates
    records: list[SampleRecord] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, task: Task, metrics: MetricCollection, metric: Metric | None) -> TaskRecords:
        """Records without a sample yet; the metrics are copied."""
        copies, metric = copy.deepcopy((dict(metrics.items(keep_base=True)), metric))
        named = {name: one for name, one in copies.items() if upstream.is_resampleable(one)}
        metrics = MetricCollection(dict(named))
        upstream.disable_metric_sync(metrics)
        states = upstream.SampleStates([*named.values(), *([metric] if metric is not None else [])])
        description = {name: getattr(task, name) for name in _ATTRIBUTES if hasattr(task, name)}
        return cls(kind_of(task), description, metrics, metric, states)

    def add(self, output: Any, target: Any, *, pairs: tuple[Any, Any], metadata: SampleMetadata, joined: bool) -> None:
        """Add a sample.

        Args:
            output: output of the task's head.
            target: its target.
            pairs: valid predictions and labels, as the primary metric takes them.
            metadata: the sample's metadata.
            joined: whether the sample is a whole window, joined from its crops.
        """
        columns = COLUMNS.get((self.kind.unit, self.kind.numeric))
        bounds = metadata.window_bounds if joined else metadata.crop_bounds
        found = columns(*pairs) if columns is not None and self.metric is not None else {}
        self.records.append(
            SampleRecord(
                metadata.window_group, metadata.window_name, bounds, place_of(metadata.projection, bounds), found
            )
        )

        def update(metric: Metric) -> None:
            if metric is self.metric:
                metric.update(*pairs)
            else:
                metric.update([output], [target])

        self.states.add(update)

    def to(self, device: torch.device) -> None:
        """Move the metrics to the device of the outputs, or to the CPU, where the states are, to be resampled."""
        if device != self.device:
            for metric in (self.metrics, self.metric):
                if metric is not None:
                    metric.to(device)
            self.device = device

    def state(self) -> RecordsState:
        """The samples of this process, to be sent to others."""
        return self.records, self.states.states

    def merge(self, processes: Sequence[RecordsState]) -> None:
        """Replace the samples of this process by those of all, in the order of their ranks."""
        self.records = [record for records, _ in processes for record in records]
        self.states.merge([states for _, states in processes])

    def columns(self) -> dict[str, Sequence[np.ndarray[Any, Any]]]:
        """The states of the primary metric by sample; none without one."""
        return {} if self.metric is None else self.states.of(self.metric).columns()
