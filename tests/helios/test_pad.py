"""Padding in the middle: both edges, once each."""

from __future__ import annotations

import pytest
import torch
from rslearn.train.model_context import RasterImage
from rslearn.train.transforms.pad import Pad as RslearnPad

from rslp.helios.pad import Pad


def padded(cls: type[RslearnPad], *, height: int, width: int, size: int, mode: str = "center") -> torch.Tensor:
    image = RasterImage(torch.arange(1, 2 * height * width + 1, dtype=torch.float32).reshape(1, 2, height, width))
    inputs, _ = cls(size, mode=mode)({"image": image}, {})
    values = inputs["image"].image
    assert isinstance(values, torch.Tensor)
    return values


@pytest.mark.parametrize(("height", "width", "size"), [(4, 6, 8), (5, 5, 8), (8, 8, 8), (9, 12, 8), (4, 12, 7)])
def test_the_image_lies_in_the_middle_of_a_square(height: int, width: int, size: int) -> None:
    image = padded(Pad, height=height, width=width, size=size)
    assert image.shape == (1, 2, size, size)
    whole = torch.arange(1, 2 * height * width + 1, dtype=torch.float32).reshape(1, 2, height, width)
    top, left = (size - height) // 2, (size - width) // 2
    here = image[..., max(0, top) : max(0, top) + min(size, height), max(0, left) : max(0, left) + min(size, width)]
    there = whole[..., max(0, -top) : max(0, -top) + size, max(0, -left) : max(0, -left) + size]
    assert torch.equal(here, there)
    assert image.count_nonzero() == here.numel()


def test_at_the_top_left_it_pads_as_rslearn_does_and_crops_too() -> None:
    small, large = ({"height": edge, "width": edge + 2, "size": 8, "mode": "topleft"} for edge in (4, 9))
    assert torch.equal(padded(Pad, **small), padded(RslearnPad, **small))
    assert torch.equal(padded(Pad, **large)[0, 0, 0], torch.arange(1.0, 9.0))
    assert padded(Pad, **large).shape == (1, 2, 8, 8)


def test_rslearn_still_needs_it() -> None:
    """When this fails, rslearn has mended it, and ours can go."""
    assert padded(RslearnPad, height=4, width=4, size=8).shape != (1, 2, 8, 8)
    with pytest.raises(AssertionError):
        padded(RslearnPad, height=9, width=9, size=8, mode="topleft")
