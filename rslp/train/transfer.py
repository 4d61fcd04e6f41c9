"""Tensors on their way to the device: they move, everything else stays what it is.

Lightning's own way visits and copies every object of a batch, down to the coordinate systems in its metadata: on small
batches it takes longer than the heads. torch's way of pinning passes over dataclasses, and raster images are some.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch


def tensors_to(value: Any, device: torch.device) -> Any:
    """The tensors in containers and dataclasses on a device; containers are made anew, other values are shared."""
    # On the way back to the CPU one has to wait: the values would be read before they are there.
    return _each(value, lambda tensor: tensor.to(device, non_blocking=device.type != "cpu"))


def tensors_pinned(value: Any) -> Any:
    """The tensors in memory from which a device can fetch them while the processor goes on; see ``tensors_to``."""
    return _each(value, torch.Tensor.pin_memory)


def _each(value: Any, act: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.numel() > 1 and not any(value.stride()):
            # One value that stands for a whole image: it stays one.
            return act(value[(0,) * value.ndim]).expand(value.shape)
        return act(value)
    if isinstance(value, Mapping):
        return {key: _each(item, act) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_each(item, act) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Raster images and features; what they hold besides tensors (dates) is shared.
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _each(item, act) for name, item in fields.items()})
    return value
