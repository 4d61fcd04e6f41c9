"""The table of task kinds: complete, the only place where kinds are told apart, and enough for a new kind."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import rslearn.train.tasks
import torch
from rslearn.config import DType
from rslearn.train.model_context import RasterImage
from rslearn.train.prediction_writer import PendingCropOutput, VectorMerger
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.embedding import EmbeddingTask
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.task import BasicTask, Task
from torchmetrics import MetricCollection

import rslp
from rslp.check.findings import warning
from rslp.check.labels import CHECKS, LabelSummary, TaskLabels, check_labels
from rslp.data.bad_samples import check_target
from rslp.errors import DataError
from rslp.evaluate.crops import layer_for, merger_for
from rslp.evaluate.destinations import RunFolder
from rslp.evaluate.rows import rows_of
from rslp.train.baselines import baseline_output, fit_baseline
from rslp.train.metric_types import R2, MeanIoU
from rslp.train.metrics import PRIMARY, PrimaryMetric, TaskMetrics
from rslp.upstream import task_kinds
from rslp.upstream.task_kinds import KINDS, OTHER, TaskKind, kind_of


def test_each_kind_has_a_primary_metric_and_a_check_of_its_labels() -> None:
    assert {kind.name for kind in KINDS} == set(PRIMARY) == set(CHECKS)


def test_each_task_of_rslearn_is_of_a_kind() -> None:
    modules = (
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(rslearn.train.tasks.__path__, "rslearn.train.tasks.")
    )
    tasks = {one for m in modules for _, one in inspect.getmembers(m, inspect.isclass) if issubclass(one, Task)}
    without = {one for one in tasks if not any(issubclass(one, kind.task) for kind in KINDS)}
    assert without == {Task, BasicTask, MultiTask, EmbeddingTask}, "an EmbeddingTask is refused, it has no labels"


def test_kinds_are_told_apart_in_the_table_alone() -> None:
    """One question about one kind is fine; a function that asks for two is a table of its own."""
    names = {kind.task.__name__ for kind in KINDS}
    chains = []
    for path in Path(rslp.__file__).parent.rglob("*.py"):
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            calls = [
                n for n in ast.walk(function) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "isinstance"
            ]
            asked = {n.id for call in calls for n in ast.walk(call.args[1]) if isinstance(n, ast.Name)} & names
            chains += [f"{path.name}: {function.name}: {sorted(asked)}"] if len(asked) > 1 else []
    assert not chains


class CountTask(BasicTask):
    """A number for each window."""


class ZoneTask(BasicTask):
    """A class for each pixel."""

    nodata_value = None


for _class in (CountTask, ZoneTask):
    _class.get_metrics = lambda self: MetricCollection([])  # type: ignore[method-assign]  # noqa: ARG005


def _zone(rows: list[list[int]]) -> dict[str, Any]:
    return {"zone": RasterImage(torch.tensor([[rows]])), "valid": RasterImage(torch.ones(1, 1, 2, 2))}


def _counted(count: float) -> dict[str, Any]:
    return {"count": torch.tensor(count), "valid": torch.tensor(1.0)}


NEW: dict[str, tuple[TaskKind, Any, list[dict[str, Any]], dict[str, Any], float]] = {
    "window": (
        TaskKind("counting", CountTask, "window", "count"),
        lambda _: R2(),
        [_counted(2.0), _counted(4.0)],
        _counted(float("nan")),
        3.0,
    ),
    "pixel": (
        TaskKind("zoning", ZoneTask, "pixel", "zone", lambda _: ["a", "b", "c"]),
        lambda _: MeanIoU(3),
        [_zone([[1, 1], [1, 2]]), _zone([[0, 0], [1, 1]])],
        _zone([[1, 3], [1, 1]]),
        1.0,
    ),
}


class GradeTask(ClassificationTask):
    """Classes in an order."""


class Distance(R2):
    """Mean distance between the predicted class and the label's; lower is better."""

    def update(self, preds: torch.Tensor, labels: torch.Tensor) -> None:
        super().update(preds.argmax(dim=1).double(), labels.double())

    def compute(self) -> torch.Tensor:
        return self.moments[3] / self.moments[0]


def test_a_kind_of_a_derived_class_has_its_own_baseline_and_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = TaskKind(
        "grading", GradeTask, "window", "class", lambda task: list(task.classes), best_constant=torch.median
    )
    task = GradeTask("grade", ["low", "middle", "high"])
    assert kind_of(task).name == "classification"
    # Behind the row of its base class.
    monkeypatch.setattr(task_kinds, "KINDS", (*KINDS, kind))
    monkeypatch.setitem(PRIMARY, kind.name, (PrimaryMetric("distance", 0.0, False), lambda _: Distance()))
    assert kind_of(task) is kind and kind_of(ClassificationTask("c", ["a", "b"])).name == "classification"
    targets = [{"class": torch.tensor(label), "valid": torch.tensor(1.0)} for label in (0, 0, 1, 2, 2)]
    constant = fit_baseline(task, targets)
    assert constant == 1.0, "the majority would be 0 or 2"
    outputs = [torch.eye(3)[int(target["class"])] for target in targets]
    metrics = TaskMetrics(task)
    metrics.update(outputs, targets=targets, constants=[baseline_output(task, constant, target) for target in targets])
    result = metrics.result()
    [row] = [row for row in rows_of({("d", "t"): result}) if row.primary]
    assert (row.metric, row.value, row.floor, row.higher_is_better) == ("distance", 0.0, 0.8, False)
    assert result.score == 1.0


@pytest.mark.parametrize("unit", NEW)
def test_a_new_kind_of_task_is_a_row_a_metric_and_a_check(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, metric, targets, bad, constant = NEW[unit]
    task = kind.task()
    assert kind_of(task) is OTHER and fit_baseline(task, targets) is None and TaskMetrics(task).primary is None
    monkeypatch.setattr(task_kinds, "KINDS", (*KINDS, kind))
    monkeypatch.setitem(PRIMARY, kind.name, (PrimaryMetric("new"), metric))
    finding = warning("looked at", (), id="label-new")
    monkeypatch.setitem(CHECKS, kind.name, lambda *_: (LabelSummary({}), [finding]))

    labels = TaskLabels("dataset", "task", task, (), "train", ())
    assert check_labels(labels)[1] == [finding]
    check_target(task, targets[0], label="sample")
    with pytest.raises(DataError, match="1 of "):
        check_target(task, bad, label="sample")
    assert fit_baseline(task, targets) == constant
    constants = [baseline_output(task, constant, target) for target in targets]
    truths = [kind.labels(target) for target in targets]
    outputs = truths if kind.numeric else [torch.eye(3)[truth].movedim(-1, 0) for truth in truths]
    metrics = TaskMetrics(task)
    scores = []
    for predictions in (constants, outputs):
        metrics.update(predictions, targets=targets, constants=constants)
        scores.append(metrics.result().score)
    assert scores == [0.0, pytest.approx(1.0)]
    files = RunFolder(Path("run/predictions"), begun=Path("run/.begun")).described("task", task)["files"]
    assert files.endswith("tif" if kind.dense else "geojson")
    if kind.dense:
        raster = PendingCropOutput((0, 0, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64).numpy())
        assert layer_for(task, [raster]).band_sets[0].dtype == DType.UINT8
    else:
        assert isinstance(merger_for(task, [PendingCropOutput((0, 0, 2, 2), [])], overlap=0, name="task"), VectorMerger)
