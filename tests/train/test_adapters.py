"""The private parts of rslearn that we touch are where we think they are."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from rslearn.config import LayerType
from rslearn.dataset import Dataset
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, ModelDataset, SplitConfig
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.segmentation import SegmentationTask
from upath import UPath

from rslp.errors import CheckpointError, DataError
from rslp.train import adapters
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


def test_windows_are_loaded_without_what_lies_among_them(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "data")
    group = tmp_path / "data" / "windows" / "default"
    (group / "list.csv").write_text("x")
    (group / "w999").mkdir()
    dataset = Dataset(UPath(tmp_path / "data"))
    windows, strays = adapters.load_windows(dataset)
    assert sorted(Path(name).name for name in strays) == ["list.csv", "w999"]
    stock = Dataset(UPath(path)).load_windows()
    assert {w.name: w.get_metadata() for w in windows} == {w.name: w.get_metadata() for w in stock}
    assert type(windows[0].data) is type(stock[0].data)
    assert [
        w.name for w in adapters.load_windows(dataset, groups=["default", "nowhere"], names=["w001", "w404"])[0]
    ] == ["w001"]
    for number in (1, 3):
        (group / f"w00{number}" / "metadata.json").write_text("{")
    with pytest.raises(DataError, match=r"^2 windows have no usable metadata: .*w00[13]/metadata\.json: .*; .*w00"):
        adapters.load_windows(dataset)


def test_a_checkpoint_is_handed_over_once_and_another_optimiser_is_named() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    checkpoint = {"state_dict": {}, "optimizer_states": [{"state": {}, "param_groups": []}]}
    adapters.hand_checkpoint(trainer, checkpoint, path=Path("last.ckpt"))
    parameter = torch.nn.Parameter(torch.zeros(1))
    trainer.strategy.optimizers = [torch.optim.SGD([parameter], lr=0.1)]
    taken = trainer.strategy.load_checkpoint("last.ckpt", weights_only=True)
    assert set(taken) == {"state_dict", "optimizer_states"} and checkpoint == {}
    with pytest.raises(CheckpointError, match=r"^last\.ckpt does not fit the optimiser of the config"):
        trainer.strategy.load_optimizer_state_dict(taken)
