"""The private parts of rslearn that we touch are where we think they are."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from rslearn.config import LayerType
from rslearn.dataset import Dataset
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, ModelDataset, SplitConfig
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.regression import RegressionAccuracy, RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from torch.optim.swa_utils import AveragedModel
from upath import UPath

from rslp.train import adapters
from rslp.train.metric_types import WithinFactor
from tests.tiny import write_dataset


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "crops", "classify", train=5, size=16)


def inputs() -> dict[str, DataInput]:
    return {
        "image": DataInput("raster", ["image"], bands=["a", "b"], passthrough=True),
        "targets": DataInput("vector", ["label"], is_target=True),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"tags": {"split": "train"}},
        {"tags": {"split": ""}},
        {"groups": ["default"], "tags": {"split": "val"}},
        {"names": ["w001", "w004"]},
        {"num_samples": 3},
        {"tags": {"split": "nowhere"}},
    ],
)
def test_windows_are_listed_as_rslearn_lists_them(path: Path, settings: dict[str, Any]) -> None:
    config = SplitConfig(**settings)
    task = ClassificationTask(property_name="value", classes=["low", "high"])
    stock = ModelDataset(Dataset(UPath(path)), config, inputs(), task, workers=0)
    ours = adapters.list_windows(Dataset(UPath(path)), inputs(), config)
    assert [w.name for w in ours] == [w.name for w in stock.get_dataset_examples()]


def test_vector_formats_are_made_once_and_read_the_same(path: Path) -> None:
    plain, kept = Dataset(UPath(path)), adapters.keep_formats(Dataset(UPath(path)))
    (layer,) = [layer for layer in kept.layers.values() if layer.type == LayerType.VECTOR]
    assert layer.instantiate_vector_format() is layer.instantiate_vector_format()
    window = adapters.list_windows(plain, inputs(), SplitConfig(tags={"split": "train"}))[0]
    found = []
    for dataset in (plain, kept):
        raw = adapters.read_inputs(
            dataset, window, bounds=window.bounds, inputs={"targets": inputs()["targets"]}, rng=random.Random(0)
        )
        found.append([feature.to_geojson() for feature in raw["targets"]])  # type: ignore[union-attr]
    assert found[0] == found[1]
    assert len(found[0]) == 1


def test_a_crop_lies_in_the_window_or_around_it(path: Path) -> None:
    window = adapters.list_windows(Dataset(UPath(path)), inputs(), SplitConfig(names=["w002"]))[0]
    x0, y0, x1, y1 = window.bounds
    rng = random.Random(0)
    for size in ((8, 8), (16, 16), (5, 24), (40, 40)):
        for _ in range(20):
            left, top, right, bottom = adapters.draw_crop(window.bounds, size, rng)
            assert (right - left, bottom - top) == size
            assert left >= x0 and right <= x1 if size[0] <= 16 else left <= x0 and right >= x1
            assert top >= y0 and bottom <= y1 if size[1] <= 16 else top <= y0 and bottom >= y1
    assert adapters.draw_crop(window.bounds, None, rng) == window.bounds


def test_split_settings_are_read_merged(path: Path) -> None:
    module = RslearnDataModule(
        inputs=inputs(),
        task=SegmentationTask(num_classes=2),
        path=str(path),
        default_config=SplitConfig(groups=["default"], crop_size=8),
        val_config=SplitConfig(tags={"split": "val"}, load_all_crops=True),
    )
    config = adapters.split_config(module, "val")
    assert (config.groups, config.tags) == (["default"], {"split": "val"})
    window = adapters.list_windows(Dataset(UPath(path)), inputs(), config)[0]
    assert len(adapters.all_crops(window.bounds, config)) == 4


@pytest.mark.parametrize(("kind", "options"), [("regression", {"use_accuracy_metric": True}), ("per pixel", {})])
def test_sums_are_in_double_precision(kind: str, options: dict[str, Any]) -> None:
    task: Any = (RegressionTask if kind == "regression" else PerPixelRegressionTask)(
        **({"property_name": "p"} if kind == "regression" else {}), metrics=["mse", "l1", "r2", "mape"], **options
    )
    metrics = adapters.precise_metrics(task.get_metrics())
    for name, wrapper in metrics.items():
        states = [getattr(wrapper.metric, state) for state in wrapper.metric._defaults]
        assert states, name
        assert all(value.dtype in (torch.float64, torch.int64) for value in states), name
        if name == "accuracy":
            assert isinstance(wrapper.metric, WithinFactor)


def test_a_share_within_a_factor_is_rslearns_and_adds_up() -> None:
    preds, labels = torch.tensor([1.0, 1.4, 3.0, 0.2]), torch.tensor([1.1, 1.0, 3.0, 1.0])
    stock, ours = RegressionAccuracy(0.2), WithinFactor(0.2)
    for part in (slice(0, 1), slice(1, 4)):
        stock.update(preds[part], labels[part])
        ours.update(preds[part], labels[part])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert float(ours.compute()) == float(stock.compute()) == 0.5


def test_one_metric_that_cannot_be_computed_leaves_the_others() -> None:
    """Torchmetrics refuses R2 of one sample, and its collection gives nothing then."""
    task = RegressionTask(property_name="p", metrics=["mse", "r2"])
    metrics = adapters.precise_metrics(task.get_metrics())
    metrics.update([torch.tensor(1.0)], [{"value": torch.tensor(3.0), "valid": torch.tensor(1.0)}])
    with pytest.raises(ValueError, match="at least two samples"):
        metrics.compute()
    assert adapters.scalars(metrics) == {"mse": 4.0, "r2": None}


def test_mean_average_precision_without_an_object_is_no_value() -> None:
    task = DetectionTask(property_name="p", classes=["bg", "thing"])
    metrics = adapters.precise_metrics(task.get_metrics())
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    metrics.update([nothing | {"scores": torch.zeros(0)}], [nothing | {"valid": torch.tensor(1)}])
    assert float(metrics.compute()["mAP"]) == -1
    assert adapters.scalars(metrics) == {"mAP": None}


@pytest.mark.parametrize("callback", [EMAWeightAveraging(decay=0.9), WeightAveraging()], ids=["EMA", "mean"])
def test_an_average_of_weights_leaves_whole_numbers(callback: WeightAveraging) -> None:
    module = torch.nn.Linear(1, 1)
    module.register_buffer("index", torch.arange(20))
    module.register_buffer("mean", torch.zeros(()))
    adapters.average_numbers_alone([callback])
    average: Any = AveragedModel(module, use_buffers=True, **callback._kwargs)
    average.update_parameters(module)
    module.mean.fill_(1.0)
    for _ in range(10):
        average.update_parameters(module)
    assert torch.equal(average.module.index, torch.arange(20))
    assert 0 < float(average.module.mean) < 1
