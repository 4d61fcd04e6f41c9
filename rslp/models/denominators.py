"""Denominators of losses: over how many pixels, samples or class weights a head's loss is a mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionHead
from rslearn.train.tasks.segmentation import SegmentationHead

from rslp.models.heads import WeightedClassificationHead


def loss_denominator(head: torch.nn.Module, targets: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The denominator of a head's mean loss over some targets, in double precision where the device has it.

    It is the number of valid pixels for segmentation and per-pixel regression, the sum of the valid samples' weights
    for a classification with class weights, and otherwise the number of samples: rslearn's classification and
    regression divide by all samples, valid or not, and torchvision's detectors by anchors and proposals, of which they
    draw about the same number from each image.

    Args:
        head: the last module of the task's decoder.
        targets: targets of the task, with labels in the head's numbering.
    """
    if isinstance(head, SegmentationHead | PerPixelRegressionHead):
        return _total([target["valid"].get_hw_tensor().sum() for target in targets])
    if isinstance(head, WeightedClassificationHead):
        return _total([head.factor(target) for target in targets])
    return torch.tensor(float(len(targets)), dtype=torch.float64)


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum().to(accumulation_dtype(parts[0].device))


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The floating-point type for counts and sums on a device."""
    return torch.float32 if device.type == "mps" else torch.float64
