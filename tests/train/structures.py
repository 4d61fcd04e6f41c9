"""Objects as plain data, so that two that should be alike can be compared to their depths."""

from __future__ import annotations

import functools
import inspect
from enum import Enum
from pathlib import PurePath
from types import ModuleType
from typing import Any

import numpy as np
import torch

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def structure(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Types and values of an object and of everything that it holds; what was met before is its number."""
    seen = {} if seen is None else seen
    if isinstance(value, float) and value.is_integer():
        # jsonargparse makes floats of defaults that are whole numbers.
        return "int", int(value)
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, type | ModuleType) or inspect.isroutine(value) or isinstance(value, PurePath | torch.dtype):
        return type(value).__name__, getattr(value, "__qualname__", str(value))
    if isinstance(value, Enum):
        return type(value).__name__, value.name
    # A list or mapping that is a default is the same in all objects; jsonargparse copies it.
    if isinstance(value, tuple | list):
        return type(value).__name__, [structure(item, seen) for item in value]
    if isinstance(value, dict):
        items = [(structure(key, seen), structure(item, seen)) for key, item in value.items()]
        return type(value).__qualname__, items
    if id(value) in seen:
        return "met", seen[id(value)]
    seen[id(value)] = len(seen)
    return type(value).__qualname__, _inside(value, seen)


def _inside(value: Any, seen: dict[int, int]) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.requires_grad, value.detach().tolist()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, functools.partial):
        return [structure(part, seen) for part in (value.func, value.args, value.keywords)]
    if hasattr(value, "__dict__"):
        return [(name, structure(item, seen)) for name, item in sorted(vars(value).items())]
    return str(value) if type(value).__str__ is not object.__str__ else ""


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two structures differ, deepest places alone."""
    if one == other:
        return []
    if type(one) is type(other) and isinstance(one, list | tuple) and len(one) == len(other):
        named = isinstance(one, tuple) and bool(one) and isinstance(one[0], str) and one[0] == other[0]
        inner = f"{place}.{one[0]}" if named else place
        return [found for a, b in zip(one, other, strict=True) for found in differences(a, b, inner)]
    return [f"{place}: {str(one)[:200]} != {str(other)[:200]}"]
