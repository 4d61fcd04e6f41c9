"""What losses are means over, and means that add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rslearn.models.component import FeatureMaps, FeatureVector
from rslearn.train.model_context import ModelContext, RasterImage
from rslearn.train.tasks.classification import ClassificationHead
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionHead
from rslearn.train.tasks.regression import RegressionHead
from rslearn.train.tasks.segmentation import SegmentationHead

from rslp.models.denominators import loss_denominator
from rslp.models.heads import WeightedClassificationHead
from rslp.models.segmentation_head import SegmentationHead as ChosenLosses
from rslp.train.losses import LossMeter

SAMPLES, CLASSES, SIZE = 7, 3, 4
CONTEXT = ModelContext(inputs=[], metadatas=[])


def targets(kind: str) -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(1)

    def raster(values: torch.Tensor) -> RasterImage:
        return RasterImage(values[None, None])

    found: list[dict[str, Any]] = []
    for index in range(SAMPLES):
        label = torch.randint(CLASSES, (SIZE, SIZE), generator=rng)
        # Sample 2 has nothing valid, the others more or less.
        valid = (torch.rand(SIZE, SIZE, generator=rng) < index / SAMPLES).float() * (index != 2)
        if kind == "pixels":
            found.append({"classes": raster(label), "values": raster(label.float()), "valid": raster(valid)})
        else:
            found.append({"class": label[0, 0], "value": label[0, 0].float(), "valid": torch.tensor(float(index != 2))})
    return found


@pytest.mark.parametrize(
    ("head", "kind", "channels"),
    [
        (ClassificationHead(), "samples", CLASSES),
        (WeightedClassificationHead([1.0, 5.0, 0.2]), "samples", CLASSES),
        (WeightedClassificationHead(focal_gamma=2.0), "samples", CLASSES),
        (RegressionHead(), "samples", 1),
        (RegressionHead(loss_mode="huber"), "samples", 1),
        (SegmentationHead(), "pixels", CLASSES),
        (SegmentationHead(weights=[1.0, 5.0, 0.2]), "pixels", CLASSES),
        (ChosenLosses({"focal": 1.0}, weights=[1.0, 5.0, 0.2]), "pixels", CLASSES),
        (PerPixelRegressionHead(loss_mode="l1"), "pixels", 1),
    ],
)
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_parts_of_a_batch_weighted_by_their_counts_make_the_whole(
    head: torch.nn.Module, kind: str, channels: int, cut: int
) -> None:
    torch.manual_seed(0)
    features = torch.randn(SAMPLES, channels, *((SIZE, SIZE) if kind == "pixels" else ()))
    labels = targets(kind)

    def loss(part: slice) -> torch.Tensor:
        chosen: Any = FeatureMaps([features[part]]) if kind == "pixels" else FeatureVector(features[part])
        (value,) = head(chosen, CONTEXT, labels[part]).loss_dict.values()
        return value  # type: ignore[no-any-return]

    parts = [slice(0, cut), slice(cut, SAMPLES)]
    counts = [loss_denominator(head, labels[part]) for part in parts]
    total = sum(loss(part) * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(total.float(), loss(slice(None)))


values = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 9)), min_size=1, max_size=9)


@given(values, st.integers(0, 9))
def test_a_meter_that_was_stored_and_merged_says_the_same(batches: list[tuple[float, int]], cut: int) -> None:
    whole, parts = LossMeter(), [LossMeter(), LossMeter()]
    for number, (mean, count) in enumerate(batches):
        for meter in (whole, parts[number >= cut]):
            losses = {"crops": {"cls": torch.tensor(mean, dtype=torch.float64)}}
            meter.add("fields", losses=losses, counts={"crops": torch.tensor(float(count))}, samples=2)
    merged = LossMeter()
    merged.load([part.state() for part in parts])
    assert merged.values("val") == pytest.approx(whole.values("val"))
    total = sum(count for _, count in batches)
    expected = sum(mean * count for mean, count in batches) / total if total else 0.0
    merged.load([part.state() for part in parts])
    assert merged.values("val") == pytest.approx(
        dict.fromkeys(("val_crops_cls", "val/fields/crops/loss", "val/fields/loss", "val_loss"), expected)
    )
    assert merged.values("val") == {}


def test_the_loss_of_a_split_is_a_mean_over_samples() -> None:
    meter = LossMeter()
    for dataset, loss, samples in (("a", 1.0, 3), ("b", 5.0, 1)):
        losses = {dataset: {"cls": torch.tensor(loss)}}
        meter.add(dataset, losses=losses, counts={dataset: torch.tensor(1.0)}, samples=samples)
    assert meter.values("val")["val_loss"] == pytest.approx(2.0)


def test_a_batch_without_a_valid_pixel_counts_for_nothing() -> None:
    meter = LossMeter()
    meter.add("a", losses={"a": {"cls": torch.tensor(float("nan"))}}, counts={"a": torch.tensor(0.0)}, samples=1)
    assert meter.values("train")["train_loss"] == 0.0
