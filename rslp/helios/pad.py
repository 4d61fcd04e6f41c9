"""A transform that pads or crops to a fixed size: rslearn's Pad, repaired."""

from __future__ import annotations

from typing import Any

import torch
from rslearn.train.model_context import RasterImage
from rslearn.train.transforms.pad import Pad as RslearnPad


class Pad(RslearnPad):
    """rslearn's ``Pad``, repaired.

    rslearn 0.1.19 pads the width twice and the height never with ``mode="center"``, and does not crop with
    ``mode="topleft"``.
    """

    def apply_image(self, image: RasterImage, state: dict[str, Any]) -> RasterImage:
        """Pad or crop an image (``C T H W``) to a square.

        Args:
            image: the image; its values are replaced.
            state: ``size``, the edge length in pixels.
        """
        for dim in (-2, -1):
            image.image = _resized(image.image, dim, int(state["size"]), centred=self.mode == "center")
        return image


def _resized(image: torch.Tensor, dim: int, size: int, *, centred: bool) -> torch.Tensor:
    extra = size - image.shape[dim]
    # As in rslearn, the odd pixel goes to the right or the bottom.
    before = extra // 2 if centred else 0
    if extra < 0:
        return image.narrow(dim, -before, size)
    sides = (before, extra - before)
    return torch.nn.functional.pad(image, sides if dim == -1 else (0, 0, *sides))
