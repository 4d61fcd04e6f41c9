"""A batch on its way to the device."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import torch
from rslearn.models.component import FeatureMaps, TokenFeatureMaps
from rslearn.train.model_context import RasterImage
from torch.utils.data._utils.pin_memory import pin_memory

from rslp.data.batches import Batch, tensors_to
from rslp.data.features.codec import shape_of
from rslp.models.joint import Features
from tests.data.features.test_codec import METADATA

DAY = datetime(2024, 3, 1, tzinfo=UTC)


def batch() -> Batch:
    image = RasterImage(torch.rand(2, 1, 3, 3), [(DAY, DAY)])
    target = {"segment": {"classes": RasterImage(torch.ones(1, 1, 3, 3)), "weights": [torch.ones(2), (torch.ones(3),)]}}
    return Batch(
        "d", [{"image": image}], [target], [METADATA], features=Features(1, FeatureMaps([torch.rand(1, 2, 3, 3)]))
    )


def test_every_tensor_moves_and_the_rest_is_shared() -> None:
    before, device = batch(), torch.device("meta")
    after = before.to(device)
    image, target = after.inputs[0]["image"], after.targets[0]["segment"]
    tensors = [image.image, target["classes"].image, target["weights"][0], target["weights"][1][0]]
    assert after.features is not None and after.features.depth == 1
    tensors += after.features.value.feature_maps
    assert all(tensor.device == device for tensor in tensors)
    assert image.timestamps == [(DAY, DAY)] and after.metadatas is before.metadatas
    # What was given stays where it was.
    assert before.inputs[0]["image"].image.device.type == "cpu"


def test_on_the_cpu_nothing_is_copied() -> None:
    before = batch()
    assert before.to(torch.device("cpu")) is before


def test_the_loader_pins_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory can be pinned only where there is a device to fetch from it.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    (after,) = pin_memory([batch()])  # type: ignore[no-untyped-call]
    target = after.targets[0]["segment"]
    tensors = [after.inputs[0]["image"].image, target["classes"].image, target["weights"][1][0]]
    tensors += after.features.value.feature_maps
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert after.dataset == "d" and after.metadatas[0] is METADATA


def test_an_image_that_is_a_shape_alone_stays_small() -> None:
    after = tensors_to(shape_of(RasterImage(torch.rand(2, 3, 9, 9))), torch.device("meta"))
    assert after.image.shape == (2, 3, 9, 9) and after.image.stride() == (0, 0, 0, 0)


def test_masks_of_tokens_move_too() -> None:
    tokens = TokenFeatureMaps([torch.rand(1, 2, 1, 1, 3)], [torch.ones(1, 1, 1, 3, dtype=torch.bool)])
    after = tensors_to(tokens, torch.device("meta"))
    assert after.masks is not None and after.masks[0].device.type == "meta"
