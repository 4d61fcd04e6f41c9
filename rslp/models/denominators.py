"""What a loss is a mean over: the unit in which each head counts, so that parts of a batch add up to the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionHead
from rslearn.train.tasks.segmentation import SegmentationHead

from rslp.models.heads import WeightedClassificationHead


def loss_denominator(head: torch.nn.Module, targets: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The denominator of a head's mean over these targets, in double precision where the device has it.

    Valid pixels for segmentation and per-pixel regression; for a classification with class weights, the weights of the
    valid samples; otherwise samples: rslearn's classification and regression divide by all of a batch, valid or not,
    and torchvision's detector by anchors and proposals drawn from each image, which is nearly by images.

    Args:
        head: the last module of the task's decoder.
        targets: targets of the task, labels in the head's numbering.
    """
    if isinstance(head, SegmentationHead | PerPixelRegressionHead):
        return _total([target["valid"].get_hw_tensor().sum() for target in targets])
    if isinstance(head, WeightedClassificationHead):
        return _total([head.weights[target["class"]] * target["valid"] for target in targets])
    return torch.tensor(float(len(targets)), dtype=torch.float64)


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum().to(accumulation_dtype(parts[0].device))


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The floating type to count and sum in."""
    return torch.float32 if device.type == "mps" else torch.float64
