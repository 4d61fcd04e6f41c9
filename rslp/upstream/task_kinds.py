"""The table of task kinds: what rslearn's tasks of one kind have in common, one row for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.tasks.task import Task


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Attributes:
        name: the key of its entries in the tables of other rooms: ``train.metrics.PRIMARY``, ``check.labels.CHECKS``.
        task: the class of its tasks; a class derived from it is of the same kind, unless it has a row of its own.
        unit: what one label belongs to.
        target_key: where a target has the labels.
        class_names: gives the names of a task's classes; None for labels that are numbers.
        best_constant: gives the baseline's constant for all valid labels ``N``: by default their mean, or the majority
            class.
    """

    name: str
    task: type[Task]
    unit: Literal["window", "pixel", "object", "unknown"]
    target_key: str
    class_names: Callable[[Any], list[str]] | None = None
    best_constant: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def dense(self) -> bool:
        """Whether each pixel has a label."""
        return self.unit == "pixel"

    @property
    def numeric(self) -> bool:
        """Whether labels are numbers rather than classes."""
        return self.class_names is None and self is not OTHER

    def labels(self, target: Mapping[str, Any]) -> torch.Tensor:
        """The labels of one sample: ``H W`` of a dense kind, a scalar of one with a label for each window."""
        return self._tensor(target[self.target_key])

    def valid(self, target: Mapping[str, Any]) -> torch.Tensor:
        """Which of ``labels`` are valid, in the same shape."""
        return self._tensor(target["valid"]) > 0

    def _tensor(self, value: Any) -> torch.Tensor:
        tensor: torch.Tensor = value.get_hw_tensor() if self.dense else value.reshape(())
        return tensor


KINDS = (
    TaskKind("classification", ClassificationTask, "window", "class", lambda task: list(task.classes)),
    TaskKind(
        "segmentation",
        SegmentationTask,
        "pixel",
        "classes",
        lambda task: list(task.class_names or map(str, range(task.num_classes))),
    ),
    TaskKind("detection", DetectionTask, "object", "labels", lambda task: list(task.classes)),
    TaskKind("regression", RegressionTask, "window", "value"),
    TaskKind("per-pixel regression", PerPixelRegressionTask, "pixel", "values"),
)
# A task that someone wrote: it is trained, with its own metrics, and has no primary metric, baseline or label check.
OTHER = TaskKind("other", Task, "unknown", "")


def kind_of(task: Task) -> TaskKind:
    """The kind of a task, that of the nearest base class in the table; ``OTHER`` where the table has none for it."""
    kinds = {kind.task: kind for kind in KINDS}
    return next((kinds[base] for base in type(task).__mro__ if base in kinds), OTHER)


def tasks_by_name(task: Task, dataset: str) -> dict[str, Task]:
    """The tasks of a dataset: those that a MultiTask unites, or the one, under the dataset's name."""
    return dict(task.tasks) if isinstance(task, MultiTask) else {dataset: task}
