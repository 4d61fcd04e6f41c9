"""rslp: joint fine-tuning of one Earth-observation encoder on many labelled datasets.

The functions of the Python interface (docs/api.md) are imported when they are first used: importing rslp costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Name -> module, and the name there. Their types are in `__init__.pyi`.
_HOMES = {
    "CheckOptions": "rslp.check.findings:CheckOptions",
    "Job": "rslp.launch.job:Job",
    "RunDir": "rslp.rundir:RunDir",
    "UserError": "rslp.errors:UserError",
    "check": "rslp.api:check",
    "compose": "rslp.config.sources:compose_file",
    "evaluate": "rslp.api:evaluate",
    "fit": "rslp.api:fit",
    "plan": "rslp.api:plan",
    "predict": "rslp.api:predict",
    "report": "rslp.api:report",
    "study": "rslp.api:study",
    "submit": "rslp.api:submit",
}
__all__ = [*_HOMES, "__version__"]


class _Package(ModuleType):
    """The package, in which the functions ``check`` and ``evaluate`` are not replaced by the folders of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the import of a folder, which sets one too, leaves the function of that name."""
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


class _WithoutWandb:
    """Finds an empty module for wandb where that is not installed: rslearn imports it, and needs it for nothing here.

    It is asked last, after all places where packages are installed.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The specification of the empty module."""
        del path, target
        return ModuleSpec(name, _WithoutWandb) if name == "wandb" else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """None: Python makes the module."""
        del spec

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Do nothing: it stays empty."""
        del module


sys.meta_path.append(_WithoutWandb)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    """Import a name of the interface on first use."""
    if name == "__version__":
        from importlib.metadata import version

        return version("rslp")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), function)


def __dir__() -> list[str]:
    """The names of the interface."""
    return sorted(__all__)
