"""Write ``vocabulary.json``: the arguments of every class that a config is likely to name.

Run as ``python docs/make_vocabulary.py`` after an upgrade of rslearn or Lightning, or a change of our own
classes. The classes are imported by name, here only: composing itself needs the table and none of those packages.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from rslp.config.merge import TABLE
from rslp.io import write_atomic
from rslp.train.instantiate import parameters

_PACKAGES = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "rslearn.models", "rslearn.train")
_SINGLE = (
    "lightning.pytorch.Trainer",
    "rslp.helios.galileo.Galileo",
    "rslp.helios.model.Helios",
    "rslp.helios.norm.HeliosNormalize",
    "rslp.helios.pad.Pad",
    "rslp.helios.presto.Presto",
    "rslp.helios.tasks.MarineInfraTask",
    "rslp.train.Affinity",
    "rslp.train.Freeze",
    "rslp.train.JointModel",
    "rslp.train.JointModule",
    "rslp.train.LayerwiseAdamW",
    "rslp.train.MultiDatasetDataModule",
    "rslp.train.checkpoints.RunCheckpoints",
    "rslp.train.heads.WeightedClassificationHead",
    "rslp.train.surgery.MiniPCGrad",
)


def vocabulary() -> dict[str, list[str] | None]:
    """Collect the argument names of each class by its class path; None for a class that takes any.

    Packages that need something that is not installed are left out.
    """
    found: dict[str, list[str] | None] = {}
    for name in _PACKAGES:
        for module in _modules(name):
            for path, cls in _classes(module, name):
                found[path] = arguments_of(cls)
    for path in _SINGLE:
        module_name, _, class_name = path.rpartition(".")
        found[path] = arguments_of(getattr(importlib.import_module(module_name), class_name))
    return dict(sorted(found.items()))


def arguments_of(cls: type[Any]) -> list[str] | None:
    """Give the names that a class's constructor takes; None if it takes others, too."""
    names, takes_more = parameters(cls)
    return None if takes_more else list(names)


def render(table: dict[str, list[str] | None]) -> str:
    """Write the table as JSON with one line for each class."""
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table.items()) + "\n}\n"


def _modules(name: str) -> Iterator[ModuleType]:
    package = _imported(name)
    if package is None:
        return
    yield package
    for info in pkgutil.walk_packages(getattr(package, "__path__", []), prefix=f"{name}."):
        module = _imported(info.name)
        if module is not None:
            yield module


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        sys.stderr.write(f"left out {name}: {error}\n")
        return None


def _classes(module: ModuleType, package: str) -> Iterator[tuple[str, type[Any]]]:
    # A name that a package loads on demand is in its __all__ alone.
    names = {*vars(module), *getattr(module, "__all__", ())}
    for name, value in ((name, getattr(module, name)) for name in sorted(names)):
        if name.startswith("_") or not isinstance(value, type) or "[" in str(value):
            continue
        # A class counts where it is defined, and where its package offers it.
        if value.__module__ == module.__name__ or (module.__name__ == package and value.__module__.startswith(package)):
            yield f"{module.__name__}.{name}", value


if __name__ == "__main__":
    write_atomic(TABLE, render(vocabulary()))
