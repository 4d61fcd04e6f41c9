"""Read weights from files of torch.save without running code that they name."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rslp.errors import CheckpointError
from rslp.io import LOAD_ERRORS, archive_damage

_STATE = "state_dict"


class _Inert(dict[Any, Any]):
    """Replaces a class that a file names: takes any arguments and does nothing."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        super().__init__()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a state dict, or of a Lightning checkpoint's ``state_dict``.

    Objects of other classes, such as the hyperparameters in training checkpoints, are skipped; their classes are
    neither imported nor called.

    Args:
        path: the file.

    Returns:
        The tensors by name, on the CPU, mapped from the file.

    Raises:
        CheckpointError: the file can't be read, is damaged, or holds no named tensors.
    """
    try:
        if damage := archive_damage(path, older=True):
            raise CheckpointError(f"{path}: cannot be read as a file of torch.save: {damage}")
        content = _load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds more than tensors: {_first_line(error)}") from error
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read as a file of torch.save: {_first_line(error)}") from error
    if isinstance(content, dict) and isinstance(content.get(_STATE), dict):
        content = content[_STATE]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not weights by name")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no weights")
    return tensors


def _load(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [_stand_in(name) for name in foreign]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _stand_in(name: str) -> type:
    module, _, qualified = name.rpartition(".")
    return type(qualified, (_Inert,), {"__module__": module, "__qualname__": qualified})


def _first_line(error: BaseException) -> str:
    """The line of torch's error that names the cause; the others advise on arguments of ``torch.load``."""
    lines = [line for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "GLOBAL" in line), lines[0])
