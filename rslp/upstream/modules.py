"""Modules of libraries: token order, repeated messages, deterministic transforms, who reads inputs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch

_MODALITIES = "get_modalities_to_process"


def fix_token_order(encoder: torch.nn.Module) -> None:
    """Make Helios models order their tokens as their configuration does, from now on in the whole process.

    Their package (olmoearth-pretrain-minimal 0.1.5, olmoearth-pretrain) iterates over an intersection of sets of
    modality names, whose order differs between processes. Attention sums over the tokens in that order, so that the
    last bits of features and gradients would differ between two starts.

    Args:
        encoder: a module that may contain a Helios model; others are not changed.
    """
    for name in dict.fromkeys(type(part).__module__ for part in encoder.modules()):
        module: Any = sys.modules.get(name)
        if hasattr(module, _MODALITIES):
            setattr(module, _MODALITIES, _ordered_modalities)


def _ordered_modalities(available_modalities: Sequence[str], supported_modality_names: Sequence[str]) -> list[str]:
    """The available modalities that the model supports, in the order of its configuration."""
    return [name for name in supported_modality_names if name in available_modalities]


class _Once(logging.Filter):
    """Lets each message of a logger pass once in a process."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        new = message not in self._logged
        self._logged.add(message)
        return new


def log_once(encoder: torch.nn.Module) -> None:
    """Let the classes of an encoder log each message once: rslearn's Galileo repeats one in every forward.

    Args:
        encoder: a module; the loggers are those of the Python modules that define it and its parts.
    """
    for name in dict.fromkeys(type(part).__module__ for part in encoder.modules()):
        own = logging.getLogger(name)
        if not any(isinstance(one, _Once) for one in own.filters):
            own.addFilter(_Once())


# Transforms without randomness; subclasses of them may be random.
_DETERMINISTIC = frozenset(
    {
        "rslearn.train.transforms.concatenate.Concatenate",
        "rslearn.train.transforms.mask.Mask",
        "rslearn.train.transforms.normalize.Normalize",
        "rslearn.train.transforms.resize.Resize",
        "rslearn.train.transforms.select_bands.SelectBands",
        "rslearn.train.transforms.sentinel1.Sentinel1ToDecibels",
        "rslearn.models.olmoearth_pretrain.norm.OlmoEarthNormalize",
        "rslp.helios.norm.HeliosNormalize",
    }
)
_PADS = frozenset({"rslearn.train.transforms.pad.Pad", "rslp.helios.pad.Pad"})


def are_deterministic(transforms: Iterable[torch.nn.Module]) -> bool:
    """Whether all transforms are known to have no randomness."""
    return all(_is_deterministic(transform) for transform in transforms)


def _is_deterministic(transform: torch.nn.Module) -> bool:
    name = f"{type(transform).__module__}.{type(transform).__qualname__}"
    if name not in _PADS:
        return name in _DETERMINISTIC
    low, high = cast(tuple[int, int], transform.size)
    return high - low == 1  # from a wider range, a size is drawn


# Of the modules of rslearn and rslp, these read more of the inputs than their sizes.
_READ_CONTENT = frozenset({"rslearn.models.concatenate_features.ConcatenateFeatures"})


def reads_inputs(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether modules behind the encoder may read the content of inputs, not only features and sizes.

    Args:
        modules: decoders and the trunk; a class of another library than those listed is assumed to read the content.
    """
    for module in modules:
        for part in module.modules():
            name = f"{type(part).__module__}.{type(part).__qualname__}"
            known = name.partition(".")[0] in ("rslearn", "rslp", "torch", "torchvision", "torchmetrics")
            if name in _READ_CONTENT or not known:
                return True
    return False
