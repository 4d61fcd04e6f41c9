"""Batches on their way to the device: tensors move, everything else stays what it is.

Lightning's own way visits and copies every object of a batch, down to the coordinate systems in its metadata: on small
batches it takes longer than the heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from rslp.train.batches import Batch


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch with inputs, targets and features on a device."""
    if device.type == "cpu":
        return batch
    return batch._replace(
        inputs=tensors_to(batch.inputs, device),
        targets=tensors_to(batch.targets, device),
        features=tensors_to(batch.features, device),
    )


def tensors_to(value: Any, device: torch.device) -> Any:
    """The tensors in containers and dataclasses on a device; containers are made anew, other values are shared."""
    if isinstance(value, torch.Tensor):
        # On the way back to the CPU one has to wait: the values would be read before they are there.
        return value.to(device, non_blocking=device.type != "cpu")
    if isinstance(value, Mapping):
        return {key: tensors_to(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(tensors_to(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Raster images and features; what they hold besides tensors (dates) is shared.
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: tensors_to(item, device) for name, item in fields.items()})
    return value
