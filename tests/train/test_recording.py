"""Recorded samples: the metrics of any resample follow from them, whatever metric a config turns on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rslearn.train.model_context import SampleMetadata
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.utils.geometry import Projection

from rslp import upstream
from rslp.data.crops import CropPlace
from rslp.train.baselines import baseline_output
from rslp.train.metrics import TaskMetrics, TaskResult
from rslp.train.metrics.recording import COLUMNS
from rslp.upstream.task_kinds import KINDS
from tests.train.test_metric_laws import TASKS, Sample, sample

UTM = Projection(CRS.from_epsg(32631), 10, -10)
# Metrics without states by sample: no number, and one that takes seconds for each resample.
WITHOUT = {"mAP"}


def place(number: int) -> CropPlace:
    """A window of 4 x 4 px, 10 km east of the one before."""
    x = 50_000 + 1000 * number
    bounds = (x, -500_000, x + 4, -499_996)
    metadata = SampleMetadata("group", f"w{number:03d}", bounds, bounds, 0, 1, None, UTM, "data")
    return CropPlace(("group", metadata.window_name), (0, 0), None, alone=True, metadata=metadata)


def evaluated(kind: str, samples: Sequence[tuple[int, Sample]], *, ranks: int = 1) -> tuple[TaskMetrics, TaskResult]:
    """The metrics of samples, by number, of several processes, with records."""
    task = TASKS[kind]
    parts = [TaskMetrics(task, record=True) for _ in range(ranks)]
    for i, (number, one) in enumerate(samples):
        constants = [baseline_output(task, 1.0, one.target)]
        parts[i % ranks].update([one.output], targets=[one.target], constants=constants, places=[place(number)])
    if ranks > 1:
        states = [metrics.state() for metrics in parts]
        for metrics in parts:
            metrics.merge(states)
        for metrics in parts[1:]:
            metrics.result()
    return parts[0], parts[0].result(threshold=0.5, tune=False)


def some(kind: str, count: int, seed: int = 0) -> list[tuple[int, Sample]]:
    generator = np.random.default_rng(seed)
    draw = lambda: generator.integers(0, 3, 4)  # noqa: E731
    noise = lambda: generator.normal(0, 0.3, 4)  # noqa: E731
    labels = [draw() for _ in range(count)]
    made = [
        sample(kind, labels=[float(v) for v in one], guesses=[float(v) for v in one + noise()], valid=[True] * 4)
        for one in labels
    ]
    return list(enumerate(made))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TASKS)
@settings(max_examples=6, deadline=None)
@given(counts=st.lists(st.integers(0, 3), min_size=6, max_size=6).filter(any))
def test_a_resample_has_the_values_of_its_samples(kind: str, counts: list[int]) -> None:
    samples = some(kind, 6)
    metrics, result = evaluated(kind, samples)
    found = metrics.resampler(result)(np.array(counts))
    repeated = [one for one, count in zip(samples, counts, strict=True) for _ in range(count)]
    _, expected = evaluated(kind, repeated)
    values = {name: value for name, value in expected.values.items() if name not in WITHOUT}
    assert found == {name: pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True) for name, value in values.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TASKS)
def test_several_processes_record_each_sample_once(kind: str) -> None:
    samples = some(kind, 7)
    alone, expected = evaluated(kind, samples)
    together, result = evaluated(kind, samples, ranks=3)
    assert expected.records is not None and result.records is not None
    key = lambda record: record.window  # noqa: E731
    assert sorted(result.records.records, key=key) == expected.records.records
    assert len(result.records.records) == 7
    again = together.resampler(result)(np.ones(7, dtype=np.int64))
    assert again == pytest.approx(alone.resampler(expected)(np.ones(7, dtype=np.int64)), rel=1e-6, abs=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TASKS)
def test_a_sample_without_a_valid_label_is_not_recorded(kind: str) -> None:
    lost = sample(kind, labels=[1.0] * 4, guesses=[1.0] * 4, valid=[False] * 4)
    if kind == "detection":
        lost.target["valid"] = torch.tensor(0)
    _, result = evaluated(kind, [*some(kind, 2), (5, lost)])
    assert result.records is not None
    assert [record.window for record in result.records.records] == ["w000", "w001"]
    assert result.n_windows == 3 and result.n == 2


def test_records_are_made_on_demand_alone_and_start_anew() -> None:
    metrics = TaskMetrics(TASKS["regression"])
    assert metrics.result().records is None
    metrics, result = evaluated("regression", some("regression", 3))
    assert len(result.records.records) == 3  # type: ignore[union-attr]
    assert metrics.result().records.records == []  # type: ignore[union-attr]


def test_each_kind_has_columns() -> None:
    assert {(kind.unit, kind.numeric) for kind in KINDS} == set(COLUMNS)


def test_a_place_is_longitude_and_latitude() -> None:
    _, result = evaluated("regression", some("regression", 1))
    [record] = result.records.records  # type: ignore[union-attr]
    assert record.place == pytest.approx((3.0, 45.15), abs=0.02)


def test_metrics_that_are_updated_alike_share_states() -> None:
    """Else recall, precision and F1 of each class would be computed anew for each sample."""
    task = ClassificationTask(property_name="p", classes=list("abcdefgh"), enable_f1_metric=True)
    records = TaskMetrics(task, record=True)._records
    assert records is not None
    # accuracy (a mean over classes), all others (by class), and the primary metric
    assert len(records.states.states) == 3


NAMES = ["corn", "corn_silage", "oats"]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (
            ClassificationTask(property_name="p", classes=NAMES, enable_f1_metric=True),
            {f"{name}_{metric}": name for name in NAMES for metric in ("recall", "precision", "f1")},
        ),
        (
            SegmentationTask(
                3, class_names=NAMES, enable_miou_metric=True, enable_multiclass_metrics=True,
                report_metric_per_class=True,
            ),
            {f"{name}_{m}": name for name in NAMES for m in ("mean_iou", "classwise_f1", "classwise_precision",
                                                             "classwise_recall")},
        ),
        (
            SegmentationTask(3, enable_miou_metric=True, report_metric_per_class=True),
            {f"mean_iou/cls_{i}": str(i) for i in range(3)},
        ),
    ],
)  # fmt: skip
def test_values_of_one_class_know_its_name(task: Any, expected: dict[str, str]) -> None:
    metrics = TaskMetrics(task)
    dense = isinstance(task, SegmentationTask)
    one = sample("segmentation" if dense else "classification", labels=[0, 1, 2, 0], guesses=[0, 1, 2, 1.0],
                 valid=[True] * 4)  # fmt: skip
    metrics.update([one.output], targets=[one.target], constants=None)
    assert metrics.result().class_of == expected


def test_a_metric_whose_states_do_not_add_up_is_left_out() -> None:
    from torchmetrics import PearsonCorrCoef

    assert not upstream.is_resampleable(PearsonCorrCoef())
