"""Primary metrics, floors and the normalised score."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.tasks.task import Task
from sklearn.metrics import balanced_accuracy_score, r2_score

from rslp.data.crops import CropPlace
from rslp.train.baselines import baseline_output, fit_baseline
from rslp.train.metric_types import R2, BalancedAccuracy
from rslp.train.metrics import TaskMetrics, normalised, primary_metric

CLASSES = ["a", "b", "c"]
pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


@given(pairs)
def test_balanced_accuracy_is_sklearns(found: list[tuple[int, int]]) -> None:
    labels, predictions = zip(*found, strict=True)
    metric = BalancedAccuracy(3)
    for label, prediction in found:
        metric.update(torch.eye(3)[[prediction]], torch.tensor([label]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn warns of predicted classes that do not occur
        assert float(metric.compute()) == pytest.approx(balanced_accuracy_score(labels, predictions))


values = st.floats(-1000, 1000).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(values, values), min_size=2, max_size=30))
def test_r2_is_sklearns_in_any_cut(found: list[tuple[float, float]]) -> None:
    labels, predictions = np.array(found).T
    metric = R2()
    for cut in np.array_split(np.arange(len(found)), 3):
        metric.update(torch.tensor(predictions[cut]), torch.tensor(labels[cut]))
    if np.ptp(labels) < 0.01:
        return
    assert float(metric.compute()) == pytest.approx(r2_score(labels, predictions), rel=1e-6, abs=1e-6)


def test_labels_that_do_not_vary_have_r2_zero() -> None:
    metric = R2()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0]))
    assert float(metric.compute()) == 0.0


@pytest.mark.parametrize(
    ("value", "floor", "score"), [(0.5, 0.5, 0.0), (1.0, 0.5, 1.0), (0.75, 0.5, 0.5), (0.2, 0.5, 0.0), (1.0, 1.0, 0.0)]
)
def test_the_score_is_zero_at_the_floor_and_one_at_the_best(value: float, floor: float, score: float) -> None:
    assert normalised(value, floor=floor, best=1.0) == pytest.approx(score)


def image(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> RasterImage:
    return RasterImage(torch.tensor([[rows]], dtype=dtype))


def classification(label: int, valid: int = 1) -> dict[str, Any]:
    return {"class": torch.tensor(label), "valid": torch.tensor(float(valid))}


def segmentation(rows: list[list[float]], valid: list[list[float]]) -> dict[str, Any]:
    return {"classes": image(rows, torch.int64), "valid": image(valid)}


def boxes(*centres: tuple[float, float]) -> dict[str, Any]:
    corners = [[x - 2, y - 2, x + 2, y + 2] for x, y in centres]
    return {
        "boxes": torch.tensor(corners).reshape(-1, 4),
        "labels": torch.ones(len(corners), dtype=torch.int64),
        "valid": torch.tensor(1),
    }


TASKS: dict[str, tuple[Task, list[dict[str, Any]], float | None]] = {
    "classification": (
        ClassificationTask(property_name="p", classes=CLASSES),
        [classification(2), classification(2), classification(0), classification(1, valid=0)],
        2.0,
    ),
    "segmentation": (
        SegmentationTask(num_classes=3),
        [segmentation([[1, 1], [0, 2]], [[1, 1], [1, 0]]), segmentation([[2, 2], [2, 2]], [[0, 0], [0, 0]])],
        1.0,
    ),
    "regression": (
        RegressionTask(property_name="p", scale_factor=0.1),
        [{"value": torch.tensor(v), "valid": torch.tensor(1.0)} for v in (1.0, 3.0)],
        2.0,
    ),
    "per-pixel regression": (
        PerPixelRegressionTask(metrics=["mse"]),
        [{"values": image([[1, 2], [3, 9]]), "valid": image([[1, 1], [1, 0]])}],
        2.0,
    ),
    "detection": (
        DetectionTask(property_name="p", classes=["bg", "thing"], enable_map_metric=False, enable_f1_metric=True),
        [boxes((5, 5)), boxes()],
        0.0,
    ),
}


@pytest.mark.parametrize("kind", TASKS)
def test_the_constant_is_learnt_from_valid_labels(kind: str) -> None:
    task, targets, constant = TASKS[kind]
    assert fit_baseline(task, targets) == constant


@pytest.mark.parametrize("kind", TASKS)
def test_the_constant_prediction_scores_the_floor_and_the_truth_the_best(kind: str) -> None:
    task, targets, constant = TASKS[kind]
    assert constant is not None
    constants = [baseline_output(task, constant, target) for target in targets]
    metrics = TaskMetrics(task)
    metrics.update(constants, targets=targets, constants=constants)
    worst = metrics.result()
    assert worst.score == 0.0
    assert worst.n_windows == len(targets)
    metrics.update([truth(task, target) for target in targets], targets=targets, constants=constants)
    best = metrics.result()
    assert best.primary is not None
    assert best.values[best.primary] == pytest.approx(1.0)
    assert best.score == pytest.approx(1.0)
    assert best.floor == worst.floor


def truth(task: Task, target: dict[str, Any]) -> Any:
    """The prediction of a model that knows."""
    if isinstance(task, ClassificationTask):
        return torch.eye(3)[target["class"]]
    if isinstance(task, SegmentationTask):
        return torch.eye(3)[target["classes"].get_hw_tensor()].permute(2, 0, 1)
    if isinstance(task, DetectionTask):
        return {**target, "scores": torch.ones(len(target["boxes"]))}
    return target["value"] if isinstance(task, RegressionTask) else target["values"].get_hw_tensor()


def test_a_task_without_valid_labels_has_no_constant() -> None:
    task = TASKS["classification"][0]
    assert fit_baseline(task, [classification(0, valid=0)]) is None


def test_a_kind_of_task_that_we_do_not_know_has_no_primary_metric() -> None:
    class Other(Task):
        pass

    assert primary_metric(Other()) is None


MANY = {
    "classification": ClassificationTask(
        property_name="p", classes=CLASSES, enable_f1_metric=True, enable_confusion_matrix=True
    ),
    "segmentation": SegmentationTask(num_classes=3, enable_miou_metric=True, enable_f1_metric=True),
    "detection": DetectionTask(
        property_name="p", classes=["bg", "thing"], enable_map_metric=True, enable_f1_metric=True
    ),
}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("cut", [0, 1])
def test_what_several_processes_saw_adds_up_also_if_one_saw_nothing(kind: str, cut: int) -> None:
    _, targets, constant = TASKS[kind]
    task = MANY.get(kind, TASKS[kind][0])
    assert constant is not None
    outputs = [truth(task, target) for target in targets]
    outputs[0] = baseline_output(task, constant, targets[0])
    constants = [baseline_output(task, constant, target) for target in targets]
    ranks = [TaskMetrics(task) for _ in range(3)]
    whole = TaskMetrics(task)
    places = [CropPlace(("group", str(i)), (0, 0), None, alone=True) for i in range(len(targets))]
    for metrics, part in (
        (whole, slice(None)), (ranks[0], slice(0, cut)), (ranks[2], slice(cut, None))
    ):  # fmt: skip
        if outputs[part]:
            metrics.update(outputs[part], targets=targets[part], constants=constants[part], places=places[part])
    states = [metrics.state() for metrics in ranks]
    expected = whole.result()
    assert len(expected.values) >= 2
    for metrics in ranks:
        metrics.merge(states)
        assert metrics.result() == expected
        assert metrics.result().n_windows == 0
