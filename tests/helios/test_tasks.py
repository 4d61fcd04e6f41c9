"""Tasks of our own, against rslearn's."""

from __future__ import annotations

import pytest
import shapely
import torch
from rasterio.crs import CRS
from rslearn.train.model_context import SampleMetadata
from rslearn.train.tasks.detection import DetectionTask
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry

from rslp.helios.tasks import MarineInfraTask

_PROJECTION = Projection(CRS.from_epsg(32631), 10, -10)
_CLASSES = ["unknown", "platform", "turbine"]


def features(*categories: str) -> list[Feature]:
    return [
        Feature(STGeometry(_PROJECTION, shapely.Point(10 + 20 * i, 30), None), {"category": category})
        for i, category in enumerate(categories)
    ]


def targets(task: DetectionTask, labelled: list[Feature]) -> dict[str, torch.Tensor]:
    metadata = SampleMetadata(
        window_group="g",
        window_name="w",
        window_bounds=(0, 0, 64, 64),
        crop_bounds=(0, 0, 64, 64),
        crop_idx=0,
        num_crops_in_window=1,
        time_range=None,
        projection=_PROJECTION,
        dataset_source=None,
    )
    found: dict[str, torch.Tensor] = task.process_inputs({"targets": labelled}, metadata)[1]
    return found


def task(**options: bool) -> MarineInfraTask:
    return MarineInfraTask(property_name="category", classes=_CLASSES, box_size=5, **options)


def test_a_platform_for_power_is_a_platform() -> None:
    labelled = features("power", "turbine", "platform")
    found = targets(task(), labelled)
    assert found["labels"].tolist() == [1, 2, 1]
    stock = DetectionTask(property_name="category", classes=_CLASSES, box_size=5)
    same = targets(stock, features("platform", "turbine", "platform"))
    assert all(torch.equal(found[key], same[key]) for key in same)
    assert labelled[0].properties == {"category": "power"}  # the caller's features stay as they are


def test_other_categories_are_left_to_the_options() -> None:
    assert targets(task(skip_unknown_categories=True), features("buoy", "power"))["labels"].tolist() == [1]
    with pytest.raises(AssertionError):
        targets(task(), features("buoy"))


def test_without_targets_there_is_nothing_to_rename() -> None:
    assert task().process_inputs({}, metadata=None, load_targets=False) == ({}, {})
