"""What an argument changes: a class made twice, with and without it, and everything that can be seen of the two."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rslearn.utils.feature import Feature

from rslp.runtime.class_paths import resolve
from rslp.train.instantiate import Construction, Invalid, plan_call, problems


@dataclass(frozen=True)
class Effects:
    """The arguments of one class whose effect is seen.

    Attributes:
        base: arguments of both objects.
        changed: by argument, its other value.
        beside: by argument, further arguments of both objects, without which it could change nothing.
    """

    base: Mapping[str, Any]
    changed: Mapping[str, Any]
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def cases(table: Mapping[str, Effects]) -> list[str]:
    """``Class.argument`` for each of a table by class path."""
    return [f"{path.rpartition('.')[2]}.{name}" for path, effects in table.items() for name in effects.changed]


def pair(table: Mapping[str, Effects], case: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Class path, and the arguments without and with the change."""
    cls, _, name = case.partition(".")
    path = next(path for path in table if path.rpartition(".")[2] == cls)
    effects = table[path]
    base = {**effects.base, **effects.beside.get(name, {})}
    return path, base, {**base, name: effects.changed[name]}


def made(path: str, arguments: Mapping[str, Any]) -> Any:
    """Make a class as a run does."""
    planned, construction = plan_call(resolve(path), arguments), Construction()
    assert list(problems(planned)) == []
    made = construction.make(planned)
    if isinstance(made, Invalid):
        raise ValueError(made.what)
    return made


def outcome(look: Callable[[], Any]) -> Any:
    """What is seen, in plain values that compare; an exception by its kind and message."""
    try:
        return plain(look())
    except Exception as error:  # noqa: BLE001 - whatever a class raises is what is seen of it
        return type(error).__name__, str(error)[:200]


def plain(value: Any) -> Any:
    """Plain values of anything that is made of tensors, arrays, features, mappings and lists."""
    if isinstance(value, torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach()
        return str(tensor.dtype), tuple(tensor.shape), tensor.double().nan_to_num(-12345.0).flatten().tolist()
    if isinstance(value, Feature):
        return value.geometry.shp.wkt, plain(value.properties)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, str | int | float | bool | Path) or value is None:
        return value
    return plain(vars(value)) if hasattr(value, "image") else str(value)


def seeded_draws(look: Callable[[], Any], draws: int = 6) -> list[Any]:
    """What is seen under several seeds: of something random, more than one draw has to be looked at."""
    seen = []
    for seed in range(draws):
        random.seed(seed)
        torch.manual_seed(seed)
        seen.append(outcome(look))
    return seen
