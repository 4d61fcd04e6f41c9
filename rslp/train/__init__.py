"""Training inside a job: module, losses, metrics, callbacks, checkpoints, instantiation, fit.

The classes that run configs name as ``rslp.train.NAME`` are imported on first use, since their modules import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rslp.data.datamodule import MultiDatasetDataModule
    from rslp.models.joint import JointModel
    from rslp.models.optim import Freeze, LayerwiseAdamW
    from rslp.train.balance.affinity import Affinity
    from rslp.train.module import JointModule

__all__ = ["Affinity", "Freeze", "JointModel", "JointModule", "LayerwiseAdamW", "MultiDatasetDataModule"]

_HOMES = {
    "Affinity": "rslp.train.balance.affinity",
    "Freeze": "rslp.models.optim",
    "JointModel": "rslp.models.joint",
    "JointModule": "rslp.train.module",
    "LayerwiseAdamW": "rslp.models.optim",
    "MultiDatasetDataModule": "rslp.data.datamodule",
}


def __getattr__(name: str) -> Any:
    """Import a public class on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
