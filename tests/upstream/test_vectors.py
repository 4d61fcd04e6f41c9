"""GeoJSON as the standard allows it, and objects under one pixel, with the sample cache and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SplitConfig
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.multi_task import MultiTask

from rslp.data.cache.cache import SampleCacheSettings, open_sample_cache
from rslp.data.samples import SampleSource, open_dataset
from rslp.errors import DataError
from tests.tiny import write_dataset


def source(path: Path, *, cached: bool, box_size: int | None = None) -> SampleSource:
    task = DetectionTask(property_name="value", classes=["bg", "thing"], box_size=box_size)
    module = RslearnDataModule(
        path=str(path),
        inputs={
            "image": DataInput("raster", ["image"], bands=["a", "b"], passthrough=True),
            "label": DataInput("vector", ["label"], is_target=True),
        },
        task=MultiTask({"t": task}, {"t": {"label": "targets"}}),
        train_config=SplitConfig(tags={"split": "train"}),
    )
    store = None
    if cached:
        settings = SampleCacheSettings(store=str(path.parent / "cache"), workers=1)
        store = open_sample_cache("d", dataset=open_dataset("d", module), inputs=module.inputs, settings=settings)
    return SampleSource("d", data_module=module, split="train", seed=0, sample_cache=store)


def labelled(folder: Path, *geometries: Any, y: int = 0, **head: Any) -> Path:
    """A dataset of one window, at row ``y``, whose label file holds these geometries (pixels from its corner)."""
    path = write_dataset(folder / "d", "detect", train=1, val=0, test=0)
    (window,) = path.glob("windows/*/*")
    metadata = json.loads((window / "metadata.json").read_text())
    metadata["bounds"] = [0, y, 8, y + 8]
    (window / "metadata.json").write_text(json.dumps(metadata))
    features = [{"type": "Feature", "geometry": one, "properties": {"value": "thing"}} for one in geometries]
    document = {"type": "FeatureCollection", "properties": metadata["projection"], "features": features, **head}
    (window / "layers/label/data.geojson").write_text(json.dumps(document))
    return path


def square(x0: float, y0: float, x1: float, y1: float) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]}


def boxes(path: Path, *, cached: bool, **settings: Any) -> Any:
    return source(path, cached=cached, **settings).sample(0)[1]["t"]["boxes"].tolist()


@pytest.mark.parametrize("cached", [False, True])
def test_a_feature_without_a_geometry_is_left_out(cached: bool, tmp_path: Path) -> None:
    assert boxes(labelled(tmp_path, None, square(2, 2, 5, 6), None), cached=cached) == [[2, 2, 5, 6]]


@pytest.mark.parametrize("cached", [False, True])
def test_a_null_crs_is_no_crs(cached: bool, tmp_path: Path) -> None:
    path = labelled(tmp_path, None, crs=None, properties=None)
    found = source(path, cached=cached).sample(0)[1]["t"]["boxes"]
    assert found.shape == (0, 4)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("y", [0, -64])
@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((4.2, 4.2, 4.9, 4.9), [4, 4, 5, 5]),
        ((4.2, 1, 4.9, 6), [4, 1, 5, 6]),
        ((1, 4.2, 6, 4.9), [1, 4, 6, 5]),
        ((2, 2, 5, 6), [2, 2, 5, 6]),
    ],
)
def test_an_object_under_one_pixel_has_the_pixel_that_it_lies_in(
    shape: tuple[float, ...], box: list[int], y: int, cached: bool, tmp_path: Path
) -> None:
    x0, y0, x1, y1 = shape
    assert boxes(labelled(tmp_path, square(x0, y + y0, x1, y + y1), y=y), cached=cached) == [box]


@pytest.mark.parametrize("cached", [False, True])
def test_a_point_has_no_box(cached: bool, tmp_path: Path) -> None:
    path = labelled(tmp_path, {"type": "Point", "coordinates": [3.5, 3.5]})
    with pytest.raises(DataError, match=r"layer label: .* an object is a point, which has no box: set box_size"):
        boxes(path, cached=cached)
    assert boxes(path, cached=cached, box_size=2) == [[1, 1, 5, 5]]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"type": "FeatureCollection"}',
        '{"features": ["x"]}',
        '{"features": [{"geometry": {"type": 3}}]}',
        '{"features": [{"geometry": {"type": "Point", "coordinates": "x"}}]}',
        '{"crs": 3, "features": [{"geometry": {"type": "Point", "coordinates": [1, 2]}}]}',
        '{"crs": {"properties": {"name": "EPSG:99999"}}, "features": [{"geometry": {"type": "Point"}}]}',
    ],
)
def test_a_broken_label_is_one_line(text: str, cached: bool, tmp_path: Path) -> None:
    path = labelled(tmp_path, square(2, 2, 5, 6))
    (file,) = path.glob("windows/*/*/layers/label/data.geojson")
    file.write_text(text)
    found = source(path, cached=cached)
    try:
        assert torch.isfinite(found.sample(0)[1]["t"]["boxes"]).all()
    except DataError as error:
        assert "d/default/w000" in str(error)
        assert "layer label" in str(error)
        assert "\n" not in str(error)
