"""Average precision and F1 of detections, against rslearn's own counts and a slow reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rslearn.train.tasks.detection import F1Metric
from sklearn.metrics import average_precision_score
from torchmetrics.detection.mean_ap import MeanAveragePrecision

from rslp.train.metric_types import DetectionScores

RULES: list[dict[str, Any]] = [
    {},
    {"cmp_mode": "distance", "cmp_threshold": 3.0},
    {"cmp_mode": "distance", "cmp_threshold": 3.0, "flatten_classes": False},
]
Image = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def boxes(corners: Sequence[tuple[int, int]], classes: Sequence[int]) -> dict[str, torch.Tensor]:
    found = torch.tensor([[x, y, x + 4, y + 4] for x, y in corners], dtype=torch.float32).reshape(-1, 4)
    return {"boxes": found, "labels": torch.tensor(classes, dtype=torch.int64)}


corner = st.tuples(st.integers(0, 8), st.integers(0, 4))
thing = st.tuples(corner, st.integers(1, 2))
found_thing = st.tuples(corner, st.integers(1, 2), st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))


@st.composite
def images(draw: st.DrawFn) -> list[Image]:
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        objects, detections = draw(st.lists(thing, max_size=5)), draw(st.lists(found_thing, max_size=6))
        pred = boxes([c for c, _, _ in detections], [k for _, k, _ in detections])
        scores = torch.tensor([s for _, _, s in detections], dtype=torch.float32)
        drawn.append((pred | {"scores": scores}, boxes([c for c, _ in objects], [k for _, k in objects])))
    return drawn


def scores_of(found: Sequence[Image], **rule: Any) -> DetectionScores:
    metric = DetectionScores(3, **rule)
    for pred, target in found:
        metric.update([pred], [target])
    return metric


def counts(found: Sequence[Image], threshold: float, **rule: Any) -> np.ndarray[Any, Any]:
    """True positives, detections and objects of each class at a threshold, by rslearn."""
    stock = F1Metric(3, [threshold], **{**rule, "flatten_classes": False})
    stock.update([pred for pred, _ in found], [target for _, target in found])
    tp, fp, fn = (np.array([int(getattr(stock, f"{c}_0_{what}")) for c in range(3)]) for what in ("tp", "fp", "fn"))
    return np.stack([tp, tp + fp, tp + fn])


def slow(found: Sequence[Image], rule: dict[str, Any]) -> tuple[float, dict[float, float]]:
    """The average precision, and F1 by threshold, from rslearn's counts at each score that occurs."""
    thresholds = sorted({float(s) for pred, _ in found for s in pred["scores"]}, reverse=True)
    table = {t: counts(found, t, **rule) for t in thresholds}
    objects = counts(found, 2.0, **rule)[2]
    if not objects.sum():
        return math.nan, {}
    flat = rule.get("flatten_classes", True)
    groups = [[0, 1, 2]] if flat else [[c] for c in range(3) if objects[c]]
    areas, f1 = [], dict.fromkeys(thresholds, 0.0)
    for group in groups:
        total = objects[group].sum()
        points = [(tp[group].sum(), n[group].sum()) for tp, n, _ in table.values()]
        area, before = 0.0, 0
        for i, (tp, _) in enumerate(points):
            best = max((p / n if n else 0.0) for p, n in points[i:])
            area += (tp - before) / total * best
            before = tp
        areas.append(area)
        for t, (tp, n) in zip(thresholds, points, strict=True):
            f1[t] += 2 * tp / (n + total) / len(groups)
    return float(np.mean(areas)), f1


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=25)
@given(images())
def test_they_are_what_rslearns_counts_give(rule: dict[str, Any], found: list[Image]) -> None:
    metric = scores_of(found, **rule)
    area, f1 = slow(found, rule)
    value = float(metric.compute())
    assert value == pytest.approx(area, abs=1e-12, nan_ok=True)
    assert math.isnan(value) or 0 <= value <= 1
    for threshold, expected in f1.items():
        assert metric.f1(threshold) == pytest.approx(expected, abs=1e-12)
    chosen = metric.best_threshold()
    highest = max(f1.values(), default=0.0)
    assert (chosen is None) == (highest == 0)
    if chosen is not None:
        assert metric.f1(chosen) == pytest.approx(highest)
        assert chosen == max(t for t in f1 if f1[t] == pytest.approx(highest))


@given(images(), st.randoms())
def test_no_order_matters(found: list[Image], random: Any) -> None:
    whole = scores_of(found)
    shuffled = []
    for pred, target in found:
        order = list(range(len(pred["labels"])))
        random.shuffle(order)
        shuffled.append(({name: value[order] for name, value in pred.items()}, target))
    random.shuffle(shuffled)
    again = DetectionScores(3)
    again.update([pred for pred, _ in shuffled], [target for _, target in shuffled])
    assert float(again.compute()) == pytest.approx(float(whole.compute()), abs=0, nan_ok=True)
    assert again.best_threshold() == whole.best_threshold()


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=20))
def test_the_area_bounds_sklearns_which_does_not_interpolate(found: list[tuple[float, bool]]) -> None:
    metric = DetectionScores(2)
    for score, hit in found:
        near = boxes([(0, 0) if hit else (50, 50)], [1]) | {"scores": torch.tensor([score])}
        metric.update([near], [boxes([(0, 0)] if hit else [], [1] if hit else [])])
    flags = [hit for _, hit in found]
    if any(flags):
        stepwise = average_precision_score(flags, [score for score, _ in found])
        assert stepwise - 1e-9 <= float(metric.compute()) <= 1


def test_coco_samples_the_same_curve() -> None:
    rng = np.random.default_rng(0)
    ours = DetectionScores(2)
    coco = MeanAveragePrecision(iou_thresholds=[0.5])
    for _ in range(300):
        places = [(int(x) * 20, 0) for x in range(3)]
        hits = rng.random(3) < 0.7
        scores = torch.tensor(np.clip(0.3 * hits + rng.random(3) * 0.7, 0, 1), dtype=torch.float32)
        pred = boxes([(x, 0 if hit else 100) for (x, _), hit in zip(places, hits, strict=True)], [1, 1, 1])
        pred["scores"] = scores
        target = boxes(places, [1, 1, 1])
        ours.update([pred], [target])
        coco.update([pred], [target])
    assert float(ours.compute()) == pytest.approx(float(coco.compute()["map_50"]), abs=0.01)


def test_a_detection_gives_its_object_to_one_that_has_no_other() -> None:
    """The first detection fits both objects, the second one of them alone: both are true positives."""
    pred = boxes([(4, 0), (0, 0)], [1, 1]) | {"scores": torch.tensor([0.9, 0.8])}
    metric = scores_of([(pred, boxes([(2, 0), (6, 0)], [1, 1]))], cmp_mode="distance", cmp_threshold=2.5)
    assert float(metric.compute()) == 1.0


def test_a_score_that_is_no_number_is_no_detection() -> None:
    pred = boxes([(0, 0), (0, 0)], [1, 1]) | {"scores": torch.tensor([math.nan, 0.5])}
    assert float(scores_of([(pred, boxes([(0, 0)], [1]))]).compute()) == 1.0
