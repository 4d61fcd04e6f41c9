"""Laws of every metric that a config can turn on: its range, and that no order and no division of samples matters.

And a table of what splits are like at their edges: no metric of any kind of task may fail there, or leave its range.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.tasks.task import Task
from sklearn.metrics import r2_score

from rslp.data.crops import CropPlace
from rslp.evaluate.rows import Evaluation, rows_of
from rslp.train.baselines import baseline_output
from rslp.train.metric_types import R2
from rslp.train.metrics import TaskMetrics, TaskResult

SUMS = ["mse", "rmse", "l1", "r2", "mape"]
TASKS: dict[str, Task] = {
    "classification": ClassificationTask(
        property_name="p",
        classes=["a", "b", "c"],
        enable_f1_metric=True,
        enable_auroc=True,
        enable_prauc=True,
        enable_confusion_matrix=True,
    ),
    "segmentation": SegmentationTask(
        num_classes=3,
        class_names=["a", "b", "c"],
        enable_miou_metric=True,
        enable_f1_metric=True,
        enable_multiclass_metrics=True,
        report_metric_per_class=True,
        enable_confusion_matrix=True,
    ),
    "detection": DetectionTask(
        property_name="p",
        classes=["bg", "a", "b"],
        enable_map_metric=True,
        enable_f1_metric=True,
        enable_precision_recall=True,
    ),
    "regression": RegressionTask(property_name="p", scale_factor=0.1, metrics=SUMS, use_accuracy_metric=True),
    "per-pixel regression": PerPixelRegressionTask(metrics=SUMS),
}
# Torchmetrics' and rslearn's own end in single precision.
CLOSE = {"rel": 1e-5, "abs": 1e-6}


@dataclass(frozen=True)
class Sample:
    """Output of a head, and target."""

    output: Any
    target: dict[str, Any]


def image(values: Any, dtype: torch.dtype = torch.float32) -> RasterImage:
    return RasterImage(torch.as_tensor(values, dtype=dtype).reshape(1, 1, 2, 2))


def sample(kind: str, *, labels: Sequence[float], guesses: Sequence[float], valid: Sequence[bool]) -> Sample:
    """A sample of four pixels, boxes, or of the first of each."""
    if kind == "classification":
        target = {"class": torch.tensor(int(labels[0])), "valid": torch.tensor(float(valid[0]))}
        return Sample(scores(guesses[0]), target)
    if kind == "segmentation":
        target = {"classes": image([int(v) for v in labels], torch.int64), "valid": image(valid)}
        return Sample(torch.stack([scores(g) for g in guesses], dim=1).reshape(3, 2, 2), target)
    if kind == "regression":
        return Sample(torch.tensor(guesses[0]), {"value": torch.tensor(labels[0]), "valid": torch.tensor(valid[0])})
    if kind == "per-pixel regression":
        target = {"values": image(labels), "valid": image(valid)}
        return Sample(torch.tensor(guesses, dtype=torch.float32).reshape(2, 2), target)
    objects = [int(v) % 2 + 1 for v, ok in zip(labels, valid, strict=True) if ok]
    found = torch.tensor([[10.0 * i, 0, 10 * i + 5, 5] for i in range(4)])
    target = {"boxes": found[: len(objects)], "labels": torch.tensor(objects, dtype=torch.int64)}
    count = min(4, int(abs(guesses[0])) % 5)
    output = {
        "boxes": found[4 - count :],
        "labels": torch.tensor([int(abs(g)) % 2 + 1 for g in guesses[:count]], dtype=torch.int64),
        "scores": torch.tensor([round(abs(math.sin(g)), 1) for g in guesses[:count]]),
    }
    return Sample(output, {**target, "valid": torch.tensor(1)})


def scores(guess: float) -> torch.Tensor:
    """Probabilities of three classes; of a guess that is no number, none."""
    if not math.isfinite(guess):
        return torch.full((3,), guess)
    return torch.softmax(torch.eye(3)[int(abs(guess)) % 3] * (1 + abs(guess) % 1), dim=0)


def evaluated(kind: str, cuts: Sequence[Sequence[tuple[int, Sample]]]) -> TaskResult:
    """What several processes find that have seen these samples, by number; all have to find the same."""
    task = TASKS[kind]
    ranks = [TaskMetrics(task) for _ in cuts]
    for metrics, part in zip(ranks, cuts, strict=True):
        for number, one in part:
            metrics.update(
                [one.output],
                targets=[one.target],
                constants=[baseline_output(task, 1.0, one.target)],
                places=[CropPlace(("group", str(number)), (0, 0), None, alone=True)],
            )
    if len(ranks) == 1:
        return ranks[0].result()
    states = [metrics.state() for metrics in ranks]
    for metrics in ranks:
        metrics.merge(states)
    found = [metrics.result() for metrics in ranks]
    assert all(same(result, found[0]) for result in found)
    return found[0]


def same(a: TaskResult, b: TaskResult) -> bool:
    return repr(a) == repr(b)


def assert_in_range(result: TaskResult) -> None:
    for name, value in result.values.items():
        if value is None or math.isnan(value):
            continue
        low = 0.0 if name.lower() != "r2" else -math.inf
        high = math.inf if name in ("mse", "rmse", "l1", "mape") else 1.0
        assert low - 1e-6 <= value <= high + 1e-6, (name, value)
    assert result.score is None or 0 <= result.score <= 1
    rows = rows_of({("d", "t"): result})
    text = Evaluation("p/e", "val", "c", "0", 1, None, "0", result.score, (), rows).json()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert Evaluation.parse(text).rows == rows
    assert json.loads(text)["schema"] == 2


labels = st.sampled_from([0.0, 1.0, 2.0])
guesses = st.floats(-5, 5).map(lambda x: round(x, 2))
four = {
    "labels": st.lists(labels, min_size=4, max_size=4),
    "guesses": st.lists(guesses, min_size=4, max_size=4),
    "valid": st.lists(st.booleans(), min_size=4, max_size=4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TASKS)
@settings(
    max_examples=8, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck), deadline=None
)
@given(st.data())
def test_no_order_and_no_division_matters_and_values_stay_in_range(kind: str, data: st.DataObject) -> None:
    drawn = [sample(kind, **data.draw(st.fixed_dictionaries(four))) for _ in range(data.draw(st.integers(1, 5)))]
    numbered = list(enumerate(drawn))
    once = evaluated(kind, [numbered])
    assert_in_range(once)
    shuffled = data.draw(st.permutations(numbered))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(drawn)), min_size=2, max_size=2)))
    several = evaluated(kind, [shuffled[: cuts[0]], shuffled[cuts[0] : cuts[1]], shuffled[cuts[1] :]])
    assert several.values.keys() == once.values.keys()
    for name, value in once.values.items():
        if name == "mAP":
            continue  # COCO's: of detections of equal score the one that was seen first comes first
        assert several.values[name] == (None if value is None else pytest.approx(value, **CLOSE, nan_ok=True)), name
    for name in ("floor", "score"):
        before, after = getattr(once, name), getattr(several, name)
        assert after == (None if before is None else pytest.approx(before, abs=1e-9))
    for name in ("n", "n_windows", "valid_share", "classes", "threshold"):
        assert getattr(several, name) == getattr(once, name), name


NAN = math.nan
EDGES: dict[str, list[dict[str, list[float]]]] = {
    "no sample": [],
    "no valid label": [{"labels": [0, 1, 2, 0], "guesses": [0, 1, 2, 0], "valid": [0, 0, 0, 0]}] * 2,
    "one sample": [{"labels": [1, 1, 0, 0], "guesses": [1, 0, 1, 0], "valid": [1, 0, 0, 0]}],
    "equal labels": [{"labels": [1, 1, 1, 1], "guesses": [1, 2, 0, 1], "valid": [1, 1, 1, 1]}] * 3,
    "large equal labels": [{"labels": [1e6 + 0.1] * 4, "guesses": [1e6, 1e6, 1e6, 1e6], "valid": [1, 1, 1, 1]}] * 3,
    "equal predictions": [{"labels": [0, 1, 2, 1], "guesses": [1, 1, 1, 1], "valid": [1, 1, 1, 1]}] * 3,
    "an absent class": [{"labels": [0, 1, 0, 1], "guesses": [0, 1, 1, 0], "valid": [1, 1, 1, 1]}] * 3,
    "no predictions, no zero labels": [{"labels": [0, 0, 0, 0], "guesses": [0, 0, 0, 0], "valid": [1, 1, 1, 1]}] * 3,
    "predictions that are no numbers": [{"labels": [0, 1, 2, 1], "guesses": [NAN] * 4, "valid": [1, 1, 1, 1]}] * 3,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("kind", TASKS)
def test_no_metric_fails_at_an_edge(kind: str, edge: str) -> None:
    if kind == "detection" and edge == "predictions that are no numbers":
        pytest.skip("torchvision's detectors give none")
    large = edge.startswith("large") and kind in ("classification", "segmentation")
    drawn = [sample(kind, **{**one, **({"labels": [1] * 4} if large else {})}) for one in EDGES[edge]]
    result = evaluated(kind, [list(enumerate(drawn))])
    assert_in_range(result)
    nothing = edge in ("no sample", "no valid label")
    assert result.primary is not None
    assert (result.values[result.primary] is None) == (result.score is None) == nothing
    if nothing and (kind != "detection" or not drawn):
        assert set(result.values.values()) == {None}
        assert result.n == 0
    assert result.n_windows == len(drawn)
    if edge == "predictions that are no numbers":
        assert result.score == pytest.approx(0.0) if "regression" in kind else result.score is not None


@pytest.mark.parametrize("around", [0.0, 1e6, -3e8])
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=20), st.integers(1, 4))
def test_r2_of_large_labels_is_that_of_small_ones(around: float, found: list[tuple[int, int]], parts: int) -> None:
    small = torch.tensor(found, dtype=torch.float64)
    metric = R2()
    for part in torch.tensor_split(small + around, parts):
        metric.update(part[:, 0], part[:, 1])
    expected = r2_score(small[:, 1], small[:, 0]) if small[:, 1].unique().numel() > 1 else 0.0
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert float(metric.compute()) <= 1


def test_equal_labels_vary_by_nothing_however_they_are_written() -> None:
    for value, count in ((0.1, 3), (0.7, 7), (1234.567, 11), (1e6 + 0.1, 1000)):
        metric = R2()
        for _ in range(3):
            metric.update(torch.full((count,), value) + 0.01, torch.full((count,), value, dtype=torch.float64))
        assert float(metric.compute()) == 0.0


def test_pixels_beyond_what_single_precision_counts() -> None:
    metrics = TaskMetrics(TASKS["segmentation"])
    one = sample("segmentation", labels=[0, 1, 2, 0], guesses=[0, 1, 2, 1], valid=[True] * 4)
    metrics.update([one.output], targets=[one.target], constants=None)
    stock = metrics.metrics["mean_iou"].metric
    for name in ("intersections", "unions"):
        getattr(stock, name)[0] += 2**24
    metrics.update([one.output], targets=[one.target], constants=None)
    assert getattr(stock, "unions")[0] == 2**24 + 4  # noqa: B009
