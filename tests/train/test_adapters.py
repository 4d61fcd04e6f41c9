"""The private parts of rslearn that we touch are where we think they are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from rslearn.config import LayerType
from rslearn.dataset import Dataset
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, ModelDataset, SplitConfig
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.segmentation import SegmentationTask
from upath import UPath

from rslp.train import adapters
from rslp.train.nodata import NodataFormat
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


def test_a_dataset_that_marks_nodata_leaves_the_given_one_as_it_is(path: Path) -> None:
    dataset = Dataset(UPath(path))
    (plain,) = [band_set.instantiate_raster_format() for band_set in dataset.layers["image"].band_sets]
    marking = adapters.honouring_nodata(dataset, inputs()["image"])
    (band_set,) = marking.layers["image"].band_sets
    assert isinstance(band_set.instantiate_raster_format(), NodataFormat)
    assert dataset.layers["image"].band_sets[0].instantiate_raster_format() is plain
    assert marking.layers["label"] is dataset.layers["label"]
    assert adapters.honouring_nodata(dataset, inputs()["targets"]) is dataset


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
