"""Transforms that change images and not labels are told of: what the check says is what happens to a sample."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import rslearn.models
import rslearn.train.transforms
import torch
from rslearn.dataset import Dataset
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SplitConfig
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks import Task
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.transforms.adaptive_pooling import AdaptivePooling
from rslearn.train.transforms.crop import Crop
from rslearn.train.transforms.flip import Flip
from rslearn.train.transforms.pad import Pad
from rslearn.train.transforms.resize import Resize
from rslearn.train.transforms.transform import Transform
from upath import UPath

import rslp.helios
from rslp.check.dataset import check_alignment
from rslp.check.findings import Finding
from rslp.check.view import MOVING, SCALING, DatasetView
from rslp.helios.norm import HeliosNormalize
from rslp.helios.pad import Pad as OwnPad

SIZE = 8
# Those that leave every pixel where it is, and as many.
IN_PLACE = {
    "Transform", "Identity", "Concatenate", "EarthDailyCloudMaskToMask", "GaussianNoise", "Mask", "Normalize",
    "RandomTimeDropping", "SelectBands", "Sentinel1ToDecibels", "Sentinel2SCLToMask", "ElevationToSlopeAspect",
    "HeliosNormalize", "OlmoEarthNormalize", "ClayNormalize", "TerramindNormalize", "PrithviNormalize",
    "TesseraNormalize", "CromaNormalize", "DinoV3Normalize",
}  # fmt: skip


def test_each_transform_is_known() -> None:
    found = set()
    for package in (rslearn.train.transforms, rslearn.models, rslp.helios):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "class" not in (source := Path(importlib.util.find_spec(module.name).origin or "").read_text()):  # type: ignore[union-attr]
                continue
            found |= {
                line.split("class ")[1].split("(")[0]
                for line in source.splitlines()
                if line.startswith("class ") and line.rstrip().endswith(("Transform):", "Pad):"))
            }
    geometric = {one.__name__ for one in MOVING + SCALING}
    assert found - IN_PLACE == geometric
    assert all(issubclass(OwnPad, one) for one in [Pad])
    assert inspect.isclass(Transform)


def view(
    tmp_path: Path, task: Task, transform: Transform, *, modalities: tuple[str, ...] = ("sentinel2_l2a",)
) -> DatasetView:
    tmp_path.joinpath("config.json").write_text('{"layers": {}}')
    inputs = {
        name: DataInput("raster", [name], bands=["B02"], passthrough=True) for name in ("sentinel2_l2a", "landsat")
    }
    normalise = HeliosNormalize(band_names={name: [{"landsat": "B2"}.get(name, "B02")] for name in modalities})
    module = RslearnDataModule(
        path=str(tmp_path),
        inputs={**inputs, "label": DataInput("raster", ["label"], bands=["x"], is_target=True)},
        task=MultiTask({"t": task}, {"t": {"label": "targets"}}),
        default_config=SplitConfig(transforms=[normalise, transform]),
    )
    return DatasetView("d", ("data",), {}, module, Dataset(UPath(tmp_path)))


TASKS: dict[str, Task] = {
    "classes": SegmentationTask(num_classes=2),
    "values": PerPixelRegressionTask(),
    "boxes": DetectionTask(property_name="x", classes=["bg", "a"]),
    "class": ClassificationTask(property_name="x", classes=["a", "b"]),
}
DENSE = {"classes": ["target/t/classes", "target/t/valid"], "values": ["target/t/values", "target/t/valid"]}
KINDS: dict[str, Any] = {
    "Flip": lambda images, boxes: Flip(image_selectors=images, box_selectors=boxes),
    "Crop": lambda images, boxes: Crop(crop_size=5, offset=(2, 1), image_selectors=images, box_selectors=boxes),
    "Pad": lambda images, boxes: Pad(size=12, image_selectors=images, box_selectors=boxes),
    "OwnPad": lambda images, boxes: OwnPad(size=12, image_selectors=images, box_selectors=boxes),
    "OwnPad, center": lambda images, boxes: OwnPad(size=12, mode="center", image_selectors=images, box_selectors=boxes),
    "Resize": lambda images, boxes: Resize(target_size=(16, 16), selectors=images + boxes),
    "AdaptivePooling": lambda images, boxes: AdaptivePooling(target_size=(4, 4), selectors=images + boxes),
}


def sample(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    pattern = torch.zeros(1, 1, SIZE, SIZE)
    pattern[..., 2:4, 4:6] = 1
    own: dict[str, Any] = {
        "classes": {"classes": RasterImage(pattern.clone()), "valid": RasterImage(pattern + 1)},
        "values": {"values": RasterImage(pattern.clone()), "valid": RasterImage(pattern + 1)},
        "boxes": {"boxes": torch.tensor([[4.0, 2, 6, 4]]), "width": SIZE, "height": SIZE, "labels": torch.tensor([1])},
        "class": {"class": torch.tensor(1)},
    }[kind]
    return {"sentinel2_l2a": RasterImage(pattern)}, {"t": own}


def fits(kind: str, inputs: dict[str, Any], targets: dict[str, Any]) -> bool:
    """Whether image and labels say the same of the same ground."""
    image, own = inputs["sentinel2_l2a"].image[0, 0], targets["t"]
    if kind == "class":
        return True
    if kind == "boxes":
        x0, y0, x1, y1 = (int(value) for value in own["boxes"][0])
        inside = torch.zeros_like(image)
        inside[y0:y1, x0:x1] = 1
        return bool((inside == (image > 0)).all())
    at_image = [
        torch.nn.functional.interpolate(one.image, image.shape, mode="nearest")[0, 0]
        for one in (own[kind], own["valid"])
    ]
    # What a padding adds is invalid.
    valid = at_image[1] > 0
    return bool((at_image[0] == image).all()) and bool((at_image[1] == at_image[0] + 1)[valid].all())


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("chosen", ["images", "all", "labels", "all but valid"])
def test_what_the_check_says_is_what_happens(name: str, kind: str, chosen: str, tmp_path: Path) -> None:
    dense, boxes = DENSE.get(kind, []), ["target/t"] if kind == "boxes" else []
    if chosen == "all but valid":
        dense = dense[:1]
    images = ["sentinel2_l2a"] * (chosen != "labels") + dense * (chosen != "images")
    transform = KINDS[name](images, boxes if chosen != "images" else [])
    happened = set()
    for seed in range(12):
        torch.manual_seed(seed)
        try:
            happened.add(fits(kind, *transform(*copy.deepcopy(sample(kind)))))
        except (NotImplementedError, AttributeError, ValueError):
            pytest.skip("it has nothing for boxes, and says so")
    assert (check_alignment(view(tmp_path, TASKS[kind], transform), "train") == []) == (happened == {True})


def one(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


def test_a_modality_that_is_left_behind_is_told_of(tmp_path: Path) -> None:
    both = ("sentinel2_l2a", "landsat")
    task = TASKS["class"]
    left = view(tmp_path, task, Flip(image_selectors=["input/landsat"]), modalities=both)
    finding = one(check_alignment(left, "train"))
    assert finding.what == "dataset 'd': Flip changes landsat and not sentinel2_l2a: they no longer fit together"
    assert finding.at == ("data", "default_config", "transforms", 1, "init_args")
    assert not finding.error
    assert check_alignment(view(tmp_path, task, Flip(image_selectors=list(both)), modalities=both), "train") == []
    # Another number of pixels over the same ground is no harm.
    resized = view(tmp_path, task, Resize(target_size=(8, 8), selectors=["landsat"]), modalities=both)
    assert check_alignment(resized, "train") == []


def test_it_names_what_is_missing(tmp_path: Path) -> None:
    flip = Flip(image_selectors=["sentinel2_l2a"])
    assert one(check_alignment(view(tmp_path, TASKS["classes"], flip), "train")).what == (
        "dataset 'd': Flip changes sentinel2_l2a and not the labels target/t/classes, target/t/valid: they no longer "
        "fit together; add them to its image_selectors"
    )
    assert one(check_alignment(view(tmp_path, TASKS["boxes"], flip), "train")).what.endswith(
        "add them to its box_selectors"
    )
