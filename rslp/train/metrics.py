"""What a task is judged by: its primary metric, the floor under it, and the metrics that its config asks for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rslearn.train.metrics import NonScalarMetricOutput
from rslearn.train.tasks.classification import ClassificationMetric, ClassificationTask
from rslearn.train.tasks.detection import DetectionMetric, DetectionTask, F1Metric
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionMetricWrapper, PerPixelRegressionTask
from rslearn.train.tasks.regression import RegressionMetricWrapper, RegressionTask
from rslearn.train.tasks.segmentation import MeanIoUMetric, SegmentationMetric, SegmentationTask
from rslearn.train.tasks.task import Task
from torchmetrics import Metric

from rslp.train import adapters
from rslp.train.metric_types import R2, BalancedAccuracy


@dataclass(frozen=True)
class Primary:
    """The metric that a kind of task is selected by.

    Attributes:
        name: as logged.
        best: the value of a perfect model.
    """

    name: str
    best: float = 1.0


@dataclass(frozen=True)
class TaskResult:
    """What a split says of one task.

    Attributes:
        values: every scalar metric by name.
        primary: name of the primary metric, None for a kind of task that has none.
        floor: the primary metric of the constant prediction learnt from the training labels.
        score: the primary metric normalised to 0 (floor) … 1 (best); None without a primary metric.
        n: number of samples.
    """

    values: Mapping[str, float]
    primary: str | None
    floor: float | None
    score: float | None
    n: int


def normalised(value: float, *, floor: float, best: float) -> float:
    """Clip((value - floor) / (best - floor), 0, 1); 0 where the floor is already the best."""
    if best == floor:
        return 0.0
    return min(1.0, max(0.0, (value - floor) / (best - floor)))


def primary_metric(task: Task) -> tuple[Primary, Metric] | None:
    """The primary metric of a task, over lists of rslearn's outputs and targets.

    Classification: balanced accuracy (mean recall of the classes that occur). Segmentation: mean IoU over the pixels of
    a split, of the classes that occur. Detection: F1 at the task's ``score_threshold``, boxes matched as its
    ``f1_metric_kwargs`` say. Regression: R2.
    """
    if isinstance(task, ClassificationTask):
        return Primary("balanced_accuracy"), ClassificationMetric(BalancedAccuracy(len(task.classes)))
    if isinstance(task, SegmentationTask):
        iou = MeanIoUMetric(task.num_classes, nodata_value=task.nodata_value, ignore_missing_classes=True)
        return Primary("miou"), SegmentationMetric(iou, pass_probabilities=False)
    if isinstance(task, DetectionTask):
        # Over all classes together: a mean over classes would count the background, which is never detected, as 0.
        options = {"num_classes": len(task.classes), "flatten_classes": True, **task.f1_metric_kwargs}
        return Primary("f1_score"), DetectionMetric(F1Metric(score_thresholds=[task.score_threshold], **options))
    if isinstance(task, RegressionTask):
        return Primary("r2"), RegressionMetricWrapper(R2(), scale_factor=task.scale_factor)
    if isinstance(task, PerPixelRegressionTask):
        return Primary("r2"), PerPixelRegressionMetricWrapper(R2(), scale_factor=task.scale_factor)
    return None


class TaskMetrics(torch.nn.Module):
    """All metrics of one task of one dataset on one split.

    Args:
        task: the task, whose config says which further metrics it wants.
        constant: makes the constant prediction for a target, learnt from the training labels; None means unknown.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.metrics = task.get_metrics()
        chosen = primary_metric(task)
        self.primary = chosen[0] if chosen else None
        self.metric = chosen[1] if chosen else None
        self.floor_metric = copy.deepcopy(self.metric)
        self.n = 0
        adapters.keep_to_itself(self)

    def state(self) -> tuple[int, list[dict[str, Any]]]:
        """What this process has seen, on the CPU."""
        return self.n, adapters.metric_states(self)

    def merge(self, states: list[tuple[int, list[dict[str, Any]]]]) -> None:
        """Take up what all processes have seen.

        Args:
            states: what ``state`` gave in each of them, by rank.
        """
        self.n = sum(n for n, _ in states)
        adapters.merge_metric_states(self, [parts for _, parts in states])

    def update(self, outputs: list[Any], *, targets: list[dict[str, Any]], constants: list[Any] | None) -> None:
        """Add a batch.

        Args:
            outputs: predictions of rslearn's head, one per sample.
            targets: targets of the task, one per sample.
            constants: the constant prediction for each sample, None when no training labels are known.
        """
        self.n += len(outputs)
        self.metrics.update(outputs, targets)
        if self.metric is not None:
            self.metric.update(outputs, targets)
        if self.floor_metric is not None and constants is not None:
            self.floor_metric.update(constants, targets)

    def result(self) -> TaskResult:
        """Compute everything and reset."""
        values = self._values()
        self.metrics.reset()
        if self.primary is None or self.metric is None or self.floor_metric is None:
            result = TaskResult(values, None, None, None, self.n)
        else:
            value = values[self.primary.name] = float(self.metric.compute())
            known = self.floor_metric.update_called
            floor = float(self.floor_metric.compute()) if known else 0.0
            score = normalised(value, floor=floor, best=self.primary.best)
            result = TaskResult(values, self.primary.name, floor if known else None, score, self.n)
            self.metric.reset()
            self.floor_metric.reset()
        self.n = 0
        return result

    def _values(self) -> dict[str, float]:
        try:
            computed = self.metrics.compute()
        except ValueError:
            # torchmetrics refuses R2 of one sample, as a small validation split or a debugging limit leaves it.
            if self.n > 1:
                raise
            return {}
        return {name: float(value) for name, value in computed.items() if _is_scalar(value)}


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, NonScalarMetricOutput) and (not isinstance(value, torch.Tensor) or value.numel() == 1)
