"""Each argument of rslearn's tasks changes labels, metrics or predictions of a run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import shapely
import torch
from rasterio.crs import CRS
from rslearn.train.model_context import RasterImage, SampleMetadata
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.task import Task
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry

from rslp import upstream
from rslp.check.config import parse
from rslp.train.metrics import TaskMetrics
from tests.arguments.effects import Effects, cases, made, outcome, pair
from tests.tiny import run_config

pytestmark = pytest.mark.filterwarnings("ignore")
_T = "rslearn.train.tasks"
SIZE = 8
_PROJECTION = Projection(CRS.from_epsg(32631), 10, -10)
_METADATA = SampleMetadata(
    window_group="g",
    window_name="w",
    window_bounds=(0, 0, SIZE, SIZE),
    crop_bounds=(0, 0, SIZE, SIZE),
    crop_idx=0,
    num_crops_in_window=1,
    time_range=(datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 2, 1, tzinfo=UTC)),
    projection=_PROJECTION,
    dataset_source=None,
)
_NAMED = {"property_name": "value", "classes": ["a", "b"]}
_OTHERS = {"other": {"class_path": "torchmetrics.classification.MulticlassF1Score", "init_args": {"num_classes": 3}}}
_WRAPPED = {"class_path": f"{_T}.segmentation.SegmentationMetric", "init_args": {"metric": _OTHERS["other"]}}
EFFECTS = {
    f"{_T}.classification.ClassificationTask": Effects(
        _NAMED,
        {
            "property_name": "other",
            "classes": ["b", "a"],
            "filters": [["checked", "yes"]],
            "read_class_id": True,
            "allow_invalid": True,
            "skip_unknown_categories": True,
            "prob_property": "p",
            "metric_kwargs": {"average": "micro"},
            "enable_f1_metric": True,
            "f1_metric_kwargs": {"average": "macro"},
            "enable_auroc": True,
            "auroc_metric_kwargs": {"ignore_index": 0},
            "enable_prauc": True,
            "prauc_metric_kwargs": {"average": "weighted"},
            "positive_class": "a",
            "positive_class_threshold": 0.2,
        },
        {
            "read_class_id": {"property_name": "index"},
            "f1_metric_kwargs": {"enable_f1_metric": True},
            "auroc_metric_kwargs": {"enable_auroc": True},
            "prauc_metric_kwargs": {"enable_prauc": True},
            "positive_class": {"positive_class": "b", "positive_class_threshold": 0.2},
            "positive_class_threshold": {"positive_class": "b"},
        },
    ),
    f"{_T}.detection.DetectionTask": Effects(
        _NAMED,
        {
            "property_name": "other",
            "classes": ["b", "a"],
            "filters": [["checked", "yes"]],
            "read_class_id": True,
            "skip_unknown_categories": True,
            "box_size": 2,
            "clip_boxes": False,
            "exclude_by_center": True,
            "score_threshold": 0.9,
            "enable_map_metric": False,
            "enable_f1_metric": True,
            "enable_precision_recall": True,
            "f1_metric_thresholds": [[0.9]],
            "f1_metric_kwargs": {"cmp_threshold": 0.05},
        },
        {"read_class_id": {"property_name": "index"}, "f1_metric_thresholds": {"enable_f1_metric": True}},
    ),
    f"{_T}.segmentation.SegmentationTask": Effects(
        {"num_classes": 3},
        {
            "num_classes": 4,
            "class_id_mapping": {1: 2},
            "zero_is_invalid": True,
            "nodata_value": 2,
            "enable_accuracy_metric": False,
            "enable_miou_metric": True,
            "enable_f1_metric": True,
            "enable_multiclass_metrics": True,
            "report_metric_per_class": True,
            "f1_metric_thresholds": [[0.1], [0.9]],
            "metric_kwargs": {"average": "micro"},
            "miou_metric_kwargs": {"nodata_value": 1},
            "multiclass_metric_kwargs": {"ignore_index": 0},
            "prob_scales": [1.0, 0.1, 5.0],
            "other_metrics": {"other": _WRAPPED},
            "output_probs": True,
            "output_class_idx": 1,
            "class_names": ["x", "y", "z"],
        },
        {
            "report_metric_per_class": {"enable_miou_metric": True},
            "f1_metric_thresholds": {"enable_f1_metric": True},
            "miou_metric_kwargs": {"enable_miou_metric": True},
            "multiclass_metric_kwargs": {"enable_multiclass_metrics": True},
            "output_class_idx": {"output_probs": True},
            "class_names": {"enable_miou_metric": True, "report_metric_per_class": True},
        },
    ),
    f"{_T}.regression.RegressionTask": Effects(
        {"property_name": "number"},
        {
            "property_name": "index",
            "filters": [["checked", "yes"]],
            "allow_invalid": True,
            "scale_factor": 0.1,
            "metric_mode": "l1",
            "use_accuracy_metric": True,
            "within_factor": 0.9,
            "metrics": ["r2"],
        },
        {"within_factor": {"use_accuracy_metric": True}},
    ),
    f"{_T}.per_pixel_regression.PerPixelRegressionTask": Effects(
        {},
        {"scale_factor": 0.1, "metric_mode": "l1", "nodata_value": 2.0, "metrics": ["mape"]},
    ),
    f"{_T}.multi_task.MultiTask": Effects(
        {
            "tasks": {"t": {"class_path": f"{_T}.segmentation.SegmentationTask", "init_args": {"num_classes": 3}}},
            "input_mapping": {"t": {"label": "targets"}},
        },
        {
            "tasks": {"t": {"class_path": f"{_T}.per_pixel_regression.PerPixelRegressionTask"}},
            "input_mapping": {"t": {"second": "targets"}},
        },
    ),
}


def _feature(x: float, y: float, side: float, **properties: Any) -> Feature:
    return Feature(STGeometry(_PROJECTION, shapely.box(x, y, x + side, y + side), None), properties)


def labels(task: Task) -> list[Any]:
    """Labels of several windows: plain ones, none, one of an unknown class, one at the window's edge."""
    if isinstance(task, MultiTask) or "Segmentation" in type(task).__name__ or "PerPixel" in type(task).__name__:
        draw = torch.Generator().manual_seed(3)
        return [RasterImage(torch.randint(0, 3, (1, 1, SIZE, SIZE), generator=draw).float(), None) for _ in range(3)]
    rows = [
        {"value": "a", "other": "b", "index": 0, "number": 1.0, "checked": "no"},
        {"value": "b", "other": "a", "index": 1, "number": 2.0, "checked": "yes"},
    ]
    many = [[_feature(1, 1, 3, **rows[i]), _feature(3.0, 2.0, 2, **rows[1 - i])] for i in (0, 1)]
    edge = [_feature(-4.0, 1.0, 5, **rows[0])]
    unknown = [_feature(1, 1, 3, value="c", other="c", index=7, number=4.0), _feature(1, 1, 2, **rows[0])]
    return [*many, edge, [], unknown]


def predictions(task: Task, count: int) -> list[Any]:
    """What a head would give, of the form that the task wants."""
    draw = torch.Generator().manual_seed(5)
    kind = type(task).__name__
    if kind == "SegmentationTask":
        classes: int = task.num_classes  # type: ignore[attr-defined]
        return [torch.rand(classes, SIZE, SIZE, generator=draw).softmax(0) for _ in range(count)]
    if kind == "PerPixelRegressionTask":
        return [3 * torch.rand(SIZE, SIZE, generator=draw) for _ in range(count)]
    if kind == "DetectionTask":
        boxes = torch.tensor([[1.0, 1.0, 3.0, 4.0], [3.0, 2.0, 5.0, 4.0]])
        return [
            {"boxes": boxes, "scores": torch.tensor([0.95, 0.6]), "labels": torch.tensor([0, 1])} for _ in range(count)
        ]
    if kind == "ClassificationTask":
        return [torch.tensor(p) for p in ([0.7, 0.3], [0.6, 0.4], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8])[:count]]
    return [torch.tensor(value) for value in (0.5, 1.5, 2.5, 3.5, 4.5)[:count]]


def seen(task: Task) -> list[Any]:
    """Targets of each label, metrics over those that are sound, and predictions as they would be written."""

    def target(label: Any) -> Callable[[], Any]:
        raw = {"targets": label, "label": label, "second": RasterImage(2 - label.image, None)} if isinstance(
            label, RasterImage
        ) else {"targets": label}  # fmt: skip
        return lambda: upstream.process_inputs(task, raw, metadata=_METADATA, load_targets=True)

    looks = [target(label) for label in labels(task)]
    found = [outcome(look) for look in looks]
    if isinstance(task, MultiTask):
        return found
    sound = [look()[1] for look, one in zip(looks, found, strict=True) if isinstance(one, list)]
    written = [outcome(lambda p=p: task.process_output(p, _METADATA)) for p in predictions(task, len(sound))]  # type: ignore[misc]
    return [found, outcome(lambda: metrics(task, sound)), written]


def metrics(task: Task, targets: list[dict[str, Any]]) -> dict[str, float]:
    """A run's metrics of the task: those that it is selected by, and those that its config asks for."""
    all_metrics = TaskMetrics(task)
    all_metrics.update(predictions(task, len(targets)), targets=targets, constants=None)
    return dict(all_metrics.result().values)


@pytest.mark.parametrize("case", cases(EFFECTS))
def test_effect(case: str) -> None:
    path, base, changed = pair(EFFECTS, case)
    assert seen(made(path, base)) != seen(made(path, changed))


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        ("classification.ClassificationTask", "enable_confusion_matrix", True),
        ("segmentation.SegmentationTask", "enable_confusion_matrix", True),
        ("detection.DetectionTask", "colors", [[1, 2, 3]]),
        ("segmentation.SegmentationTask", "colors", [[1, 2, 3]]),
        ("detection.DetectionTask", "image_bands", [1, 0, 1]),
        ("detection.DetectionTask", "remap_values", [[0, 1], [0, 255]]),
    ],
)
def test_what_is_noted_has_no_effect(kind: str, argument: str, value: Any) -> None:
    base = EFFECTS[f"{_T}.{kind}"].base
    changed = {**base, argument: value}
    assert seen(made(f"{_T}.{kind}", base)) == seen(made(f"{_T}.{kind}", changed))


@pytest.mark.parametrize("kind", ["embedding.EmbeddingTask", "per_pixel_timestep.PerPixelTimestepTask"])
def test_tasks_without_labels_to_train_on_are_refused(kind: str) -> None:
    config = run_config({"a": ("nowhere", "segment")})
    task = {"class_path": f"{_T}.{kind}"} | ({} if "embedding" in kind else {"init_args": {"num_classes": 2}})
    config["data"]["init_args"]["data_modules"]["a"]["init_args"]["task"]["init_args"]["tasks"] = {"a": task}
    found = [finding for finding in parse(config).findings if finding.error]
    assert any("is not supported: it has no label" in finding.what for finding in found), found
