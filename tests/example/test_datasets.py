"""The datasets as rslearn sees them, through the inputs of the shipped configs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import yaml
from rslearn.dataset import Dataset
from rslearn.models.olmoearth_pretrain.model import OlmoEarth
from rslearn.train.dataset import DataInput, ModelDataset, SplitConfig
from rslearn.train.model_context import ModelContext, RasterImage
from rslearn.train.tasks import Task
from rslearn.utils.jsonargparse import init_jsonargparse
from shapely import box
from upath import UPath

from rslp.example.datasets import KINDS, Kind
from rslp.example.layout import sites

NAMES = [kind.name for kind in KINDS]


def load(example: Path, name: str, split: str) -> ModelDataset:
    """Open a dataset as a run does, without the transforms."""
    text = (example / f"{name}.yaml").read_text(encoding="utf-8")
    for constant, value in (("PATCH_SIZE", "8"), ("ENCODER_EMBEDDING_SIZE", "128")):
        text = text.replace("{" + constant + "}", value)
    config: dict[str, Any] = yaml.safe_load(text)["data"]["init_args"]
    chosen = {**config["default_config"], **config[f"{split}_config"]}
    chosen.pop("transforms")
    init_jsonargparse()
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--inputs", type=dict[str, DataInput])
    parser.add_argument("--task", type=Task)
    parser.add_argument("--split", type=SplitConfig)
    made = parser.instantiate(
        parser.parse_object({"inputs": config["inputs"], "task": config["task"], "split": chosen})
    )
    return ModelDataset(Dataset(UPath(example / config["path"])), made.split, made.inputs, made.task, workers=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_split_loads_with_images_dates_and_targets(example: Path, name: str) -> None:
    for split in ("train", "val", "test"):
        dataset = load(example, name, split)
        assert len(dataset) >= 4
        inputs, targets, _ = dataset[0]
        images = {key: value for key, value in inputs.items() if isinstance(value, RasterImage)}
        assert images
        for image in images.values():
            assert image.timestamps is not None
            assert len(image.timestamps) == image.shape[1]
            assert torch.isfinite(image.image).all()
        assert targets[name]


def test_months_are_the_real_ones_and_some_are_missing(example: Path) -> None:
    dataset = load(example, "crop_type", "train")
    months = []
    for number in range(len(dataset)):
        image = dataset[number][0]["sentinel2_l2a"]
        seen = [start.month for start, _ in image.timestamps]
        assert seen == sorted(set(seen))
        months.append(len(seen))
    assert min(months) < 12
    assert max(months) >= 10


def test_the_bundle_reads_every_dataset(example: Path) -> None:
    encoder = OlmoEarth(
        patch_size=8, model_path=str(example / "encoder"), autocast_dtype=None, use_legacy_timestamps=False
    ).eval()
    for name in NAMES:
        dataset = load(example, name, "val")
        samples = [dataset[0], dataset[1]]
        inputs = [{key: value for key, value in one[0].items() if isinstance(value, RasterImage)} for one in samples]
        for one in inputs:
            for image in one.values():
                image.image = image.image / 1e4
        with torch.no_grad():
            features = encoder(ModelContext(inputs, [one[2] for one in samples])).feature_maps[0]
        assert features.shape[:2] == (2, 128)
        assert features.std() > 0


def test_the_bundle_is_small_and_has_no_sleeping_start(example: Path) -> None:
    assert sum(path.stat().st_size for path in (example / "encoder").iterdir()) < 6e6
    weights = torch.load(example / "encoder" / "weights.pth", weights_only=True)
    projection = "encoder.patch_embeddings.per_modality_embeddings.sentinel2_l2a.sentinel2_l2a__0.proj"
    plain = torch.full((weights[projection + ".weight"].shape[1],), 0.5)
    token = weights[projection + ".weight"] @ plain + weights[projection + ".bias"]
    assert token.abs().max() < 1e-4


def test_no_footprint_overlaps_another(example: Path) -> None:
    for kind in KINDS:
        boxes = [(site.split, box(*site.bounds)) for site in sites(kind.region, size=1.0, seed=0)]
        tree = {split: [shape for own, shape in boxes if own == split] for split in ("train", "val", "test")}
        for one, other in combinations(tree.values(), 2):
            bounds = {shape.bounds for shape in one} & {shape.bounds for shape in other}
            assert not bounds
        corners = {shape.bounds[:2] for _, shape in boxes}
        assert len(corners) == len(boxes)
        size = kind.region.size
        assert all((x - kind.region.east // kind.region.resolution) % size == 0 for x, _ in corners)
    assert len({kind.region.epsg for kind in KINDS}) == len(KINDS)


def test_splits_do_not_touch() -> None:
    for kind in KINDS:
        places = sites(kind.region, size=0.2, seed=3)
        for one, other in combinations(places, 2):
            if one.split != other.split:
                assert box(*one.bounds).distance(box(*other.bounds)) >= kind.region.size


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_digital_numbers_are_in_the_range_of_the_sensors(kind: Kind) -> None:
    scene = kind.make(0, sites(kind.region, size=0.1, seed=0)[5])
    for series in scene.series:
        values = series.values.astype(float)
        if series.layer == "sentinel1":
            assert series.values.dtype == "float32"
            assert -30 < values.mean() < -5
            assert values[0].mean() > values[1].mean() + 3
        else:
            assert series.values.dtype == "uint16"
            assert values.min() >= 1
            assert 300 < values.mean() < 12_000
