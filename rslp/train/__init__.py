"""What runs inside a job: data, mixture, model, module, checkpoints, entry point.

The names that run configs carry are loaded when they are asked for: the mixture and its like need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rslp.train.data import MultiDatasetDataModule
    from rslp.train.freezing import Freeze
    from rslp.train.model import JointModel
    from rslp.train.module import JointModule
    from rslp.train.optimizer import LayerwiseAdamW

__all__ = ["Freeze", "JointModel", "JointModule", "LayerwiseAdamW", "MultiDatasetDataModule"]

_HOMES = {
    "Freeze": "freezing",
    "JointModel": "model",
    "JointModule": "module",
    "LayerwiseAdamW": "optimizer",
    "MultiDatasetDataModule": "data",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
