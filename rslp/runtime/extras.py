"""Trackers of experiments, and other extras: which package each needs, and whether that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from rslp.errors import UsageError
from rslp.suggest import did_you_mean

# Name of a tracker, and of the extra, -> the package that it needs.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
# Extra -> the package that it needs.
_EXTRAS = {**PACKAGES, "adapters": "peft", "balance": "torchjd", "losses": "segmentation_models_pytorch"}
# Lightning's own loggers, which a config may name -> the extra.
LOGGERS = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}


def trackers_named(text: str | None, *, installed: bool) -> list[str]:
    """The trackers that the text of ``--tracker`` names, with commas between them.

    Args:
        text: the names; None for no tracker.
        installed: whether their packages must be installed here.

    Raises:
        UsageError: a tracker does not exist, or is not installed.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    refuse_absent(names, installed=installed)
    return names


def refuse_absent(trackers: Sequence[str], *, installed: bool = True) -> None:
    """Raise ``UsageError`` for a tracker that does not exist or, with ``installed``, whose package is not installed."""
    for name in trackers:
        if name not in PACKAGES:
            raise UsageError(f"there is no tracker {name!r}{did_you_mean(name, PACKAGES, otherwise='known')}")
        if installed and is_absent(name):
            raise UsageError(f"the tracker {name} is not installed; {remedy(name)}")


def is_absent(extra: str) -> bool:
    """Whether the package of an extra is not installed; the stand-in for wandb, see ``rslp``, is no package."""
    spec = importlib.util.find_spec(_EXTRAS[extra])
    return spec is None or (spec.origin is None and spec.submodule_search_locations is None)


def remedy(extra: str) -> str:
    """How an extra is installed."""
    return f"install it: pip install 'rslp[{extra}]'"
