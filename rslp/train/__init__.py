"""What runs inside a job: data, mixture, model, module, checkpoints, entry point.

The names that run configs carry are loaded when they are asked for: the mixture and its like need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rslp.data.datamodule import MultiDatasetDataModule
    from rslp.models.joint import JointModel
    from rslp.models.optim import Freeze, LayerwiseAdamW
    from rslp.train.module import JointModule

__all__ = ["Freeze", "JointModel", "JointModule", "LayerwiseAdamW", "MultiDatasetDataModule"]

_HOMES = {
    "Freeze": "rslp.models.optim",
    "JointModel": "rslp.models.joint",
    "JointModule": "rslp.train.module",
    "LayerwiseAdamW": "rslp.models.optim",
    "MultiDatasetDataModule": "rslp.data.datamodule",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
