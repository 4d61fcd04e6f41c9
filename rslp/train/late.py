"""Modules that libraries import in passing and a run hardly uses: each is loaded when something of it is first used.

Importing torch's compiler and sharding, scipy, matplotlib, W&B, boto3 and triton takes longer than importing torch.
Lightning, torchmetrics, torchvision, rasterio, rslearn and the encoder's package import them for a type in an
annotation, a decorator or a function that a run may never call. A stand-in takes such a module's place in
``sys.modules``; it answers what the libraries ask at their import, and whoever asks it for anything else gets the real
module, which takes the place from then on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any


class StandIn(ModuleType):
    """Stands for a module that is not loaded yet.

    Args:
        spec: where the module is.
        answers: what is given without loading it, by name.
    """

    _answers: dict[str, Any]

    def __init__(self, spec: ModuleSpec, answers: Mapping[str, Any]) -> None:
        super().__init__(spec.name)
        given: dict[str, Any] = {
            "__spec__": spec,
            "__loader__": spec.loader,
            "__file__": spec.origin,
            "__package__": spec.parent,
        }
        if spec.submodule_search_locations is not None:
            given["__path__"] = list(spec.submodule_search_locations)
        self.__dict__.update(given, _answers=dict(answers))

    def __getattr__(self, name: str) -> Any:
        """What it can answer, or what the module has."""
        if loaded(self.__name__) is None and name in self._answers:
            return self._answers[name]
        if name == "__path__":
            # It is no package; the import of a name asks for this first.
            raise AttributeError(name)
        return getattr(load(self.__name__), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set something of the module."""
        setattr(load(self.__name__), name, value)


class _Children:
    """Finds modules below one that a stand-in stands for: the real one is loaded first, as it always is."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Where a module comes from; None leaves it to the other finders."""
        del path, target
        parent = name.rpartition(".")[0]
        if not isinstance(sys.modules.get(parent), StandIn):
            return None
        load(parent)
        module = sys.modules.get(name)
        if module is None or (own := module.__spec__) is None:
            return None
        # Python prefers the spec of a module that appeared meanwhile, and would execute it again.
        module.__spec__ = None
        return ModuleSpec(name, _Loaded(module, own), origin=own.origin)


class _Loaded(Loader):
    """Gives a module that its parent has loaded meanwhile, instead of loading it a second time."""

    def __init__(self, module: ModuleType, spec: ModuleSpec) -> None:
        self._module = module
        self._spec = spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module that is there."""
        del spec
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to be done but to put its own spec back."""
        module.__spec__ = self._spec


def loaded(name: str) -> ModuleType | None:
    """The real module, if it was loaded."""
    module = sys.modules.get(name)
    return None if isinstance(module, StandIn) else module


def load(name: str) -> ModuleType:
    """Load the real module, and those that were asked for above and below it."""
    top = next((one for one in _prefixes(name) if one in _AT_IMPORT), name)
    group = [one for one in _AT_IMPORT if one == top or one.startswith(f"{top}.")]
    # All go before the first is loaded: a real module must not take a stand-in's answers.
    waiting = [one for one in group if isinstance(sys.modules.get(one), StandIn)]
    for one in waiting:
        sys.modules.pop(one, None)
    for one in waiting:
        importlib.import_module(one)
    return importlib.import_module(name)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _is_a(module: str, name: str) -> type:
    """A class of a module that is not loaded: there is no instance of it before that."""

    class Kind(type):
        def __instancecheck__(cls, instance: object) -> bool:
            real = loaded(module)
            return real is not None and isinstance(instance, getattr(real, name))

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return Kind(name, (), {"__module__": module})


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is not loaded."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def _style(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    """Pyplot's style for a block or a function."""

    @contextlib.contextmanager
    def style() -> Iterator[None]:
        with importlib.import_module("matplotlib.pyplot").style.context(*args, **kwargs):
            yield

    return style()


def _disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
    """A function that the compiler leaves alone: as it is, as long as there is no compiler."""
    if fn is None:
        return functools.partial(_disable, recursive=recursive, **options)
    if not isinstance(fn, FunctionType):
        return load("torch._dynamo").disable(fn, recursive, **options)
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (compiler := loaded("torch._dynamo")) is None:
            return fn(*args, **kwargs)
        if not disabled:
            disabled.append(compiler.disable(fn, recursive, **options))
        return disabled[0](*args, **kwargs)

    # What the compiler looks for.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def _graph_break(msg: str = "") -> None:
    if (compiler := loaded("torch._dynamo")) is not None:
        compiler.graph_break(msg)


# What torch asks of its compiler at each optimiser step, and when functions are decorated.
_ALWAYS = {"torch._dynamo": {"graph_break": _graph_break, "disable": _disable}}
# What libraries take at their import, for annotations, decorators and tests of a type.
_AT_IMPORT: dict[str, dict[str, Any]] = {
    "torch._dynamo": {"OptimizedModule": _is_a("torch._dynamo", "OptimizedModule")},
    "torch._dynamo.utils": {"is_compile_supported": _later("torch._dynamo.utils", "is_compile_supported")},
    "torch.distributed.fsdp": {
        "MixedPrecisionPolicy": _is_a("torch.distributed.fsdp", "MixedPrecisionPolicy"),
        "fully_shard": _later("torch.distributed.fsdp", "fully_shard"),
        "register_fsdp_forward_method": _later("torch.distributed.fsdp", "register_fsdp_forward_method"),
    },
    "triton.runtime.jit": {"JITFunction": _is_a("triton.runtime.jit", "JITFunction")},
    # Names that torchmetrics puts into scipy where they are missing, for a library that a run does without.
    "scipy.signal": {"hamming": _later("scipy.signal.windows", "hamming")},
    "scipy.optimize": {},
    "scipy.spatial": {},
    "matplotlib": {},
    "matplotlib.axes": {"Axes": _is_a("matplotlib.axes", "Axes")},
    "matplotlib.colors": {"Colormap": _is_a("matplotlib.colors", "Colormap")},
    "matplotlib.pyplot": {
        "Figure": _is_a("matplotlib.figure", "Figure"),
        "style": SimpleNamespace(context=_style),
    },
    "wandb": {},
    "boto3": {},
}


@contextlib.contextmanager
def late_modules() -> Iterator[None]:
    """Import the training stack in this block: without the modules above, until they are used.

    A module that is loaded already, or not installed, is left as it is; ``RSLP_LATE_IMPORTS=off`` leaves all of them.
    """
    if os.environ.get("RSLP_LATE_IMPORTS") == "off":
        yield
        return
    stands = [one for name, answers in _AT_IMPORT.items() if (one := _stand_in(name, answers)) is not None]
    sys.meta_path.insert(0, _Children)
    by_name = {one.__name__: one for one in stands}
    for one in stands:
        parent, _, child = one.__name__.rpartition(".")
        if parent in by_name:
            by_name[parent]._answers[child] = one
    sys.modules.update(by_name)
    try:
        yield
    finally:
        # From here on, whoever imports a class is given the class itself.
        for one in stands:
            one._answers.clear()
            one._answers.update(_ALWAYS.get(one.__name__, {}))


def _stand_in(name: str, answers: Mapping[str, Any]) -> StandIn | None:
    if name in sys.modules:
        return None
    path: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    for prefix in _prefixes(name):
        spec = PathFinder.find_spec(prefix, path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return StandIn(spec, {**_ALWAYS.get(name, {}), **answers}) if spec else None
