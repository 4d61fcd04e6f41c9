"""An rslearn dataset that exists already: only its dataset config is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rslp.errors import DataError
from rslp.example import windows as example
from tests.datasets.files import made
from tests.tiny import write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("existing")
    for portion in example.create(folder, size=0.03, seed=0):
        example.write_portion(folder, 0, portion)
    return folder


def config(text: str) -> dict[str, Any]:
    for name in ("PATCH_SIZE", "ENCODER_EMBEDDING_SIZE"):
        text = text.replace(f"{{{name}}}", "8")
    return yaml.safe_load(text)["data"]["init_args"]


def arguments(task: dict[str, Any]) -> dict[str, Any]:
    [only] = task["init_args"]["tasks"].values()
    return only["init_args"]


def test_a_classification_from_series_of_two_sensors(folder: Path) -> None:
    images = {"sentinel2_l2a": {"layer": "sentinel2"}, "sentinel1": {}}
    summary = made(
        folder, path="crop_type", dataset=True, task="classification", images=images, labels={"column": "crop"}
    )
    assert set(summary.windows) == {"train", "val", "test"} and summary.new == 0
    data = config((folder / "crop_type.yaml").read_text())
    assert data["path"] == "crop_type" and data["inputs"]["sentinel2_l2a"]["layers"] == ["sentinel2"]
    assert set(arguments(data["task"])["classes"]) <= {
        "winter_cereal", "rapeseed", "spring_cereal", "maize", "sugar_beet", "grassland"
    }  # fmt: skip
    assert data["default_config"]["transforms"][0]["init_args"]["sentinel1_units"] == "db"


def test_a_segmentation_and_a_regression(folder: Path) -> None:
    images = {"sentinel2_l2a": {"layer": "sentinel2", "bands": ["B04", "B08"]}}
    labels = {"classes": [f"c{number}" for number in range(7)], "nodata": 255}
    made(folder, path="land_cover", dataset=True, images=images, labels=labels)
    data = config((folder / "land_cover.yaml").read_text())
    assert data["inputs"]["targets"]["bands"] == ["class"] and data["inputs"]["sentinel2_l2a"]["bands"] == [
        "B04",
        "B08",
    ]
    assert arguments(data["task"])["nodata_value"] == 255
    made(folder, path="fuel_moisture", dataset=True, task="regression", images=images, labels={"column": "lfmc"})
    assert arguments(config((folder / "fuel_moisture.yaml").read_text())["task"])["scale_factor"] in (0.02, 0.03, 0.04)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere"}, "nowhere: is no rslearn dataset"),
        (
            {"images": {"sentinel2_l2a": {}}},
            "images.sentinel2_l2a.layer: the dataset has no layer 'sentinel2_l2a'; did you",
        ),
        ({"images": {"sentinel2_l2a": {"layer": "sentinel2", "bands": ["B4"]}}}, "has no band B4; did you mean B04?"),
        ({"labels": {"column": "crops"}}, "no label has the property 'crops'; did you mean crop?"),
        (
            {"labels": {"column": "crop", "layer": "sentinel1"}},
            "the layer 'sentinel1' is raster; the task needs vectors",
        ),
    ],
)
def test_mistakes(folder: Path, changes: dict[str, Any], message: str) -> None:
    spec = {
        "path": "crop_type", "dataset": True, "task": "classification", "labels": {"column": "crop"},
        "images": {"sentinel2_l2a": {"layer": "sentinel2"}}, "config": "never.yaml",
    }  # fmt: skip
    with pytest.raises(DataError) as error:
        made(folder, **{**spec, **changes})
    assert message in str(error.value)
    assert not (folder / "never.yaml").exists()


def test_windows_without_a_split(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", "classify", train=3, val=0, test=0)
    images = {"image": {"bands": ["a", "b"]}}
    with pytest.raises(
        DataError, match="its windows need the option split: train, val, test; of 3 windows there are split: train"
    ):
        made(
            tmp_path,
            path="tiny",
            dataset=True,
            task="classification",
            images=images,
            labels={"column": "value"},
            encoder="none",
        )
