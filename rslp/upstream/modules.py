"""What is known of the classes of others: order of tokens, transforms without randomness, decoders that read inputs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch

_MODALITIES = "get_modalities_to_process"


def fix_token_order(encoder: torch.nn.Module) -> None:
    """Have Helios models lay out their tokens in one order, whoever wraps them; from then on in the whole process.

    Their package (olmoearth-pretrain-minimal 0.1.5, olmoearth-pretrain) goes through an intersection of sets of
    modality names, whose order is another one in each process. Attention sums over the tokens in that order, so the
    last bits of features and gradients would differ between two starts.

    Args:
        encoder: what may hold such a model; others are left alone.
    """
    for name in dict.fromkeys(type(part).__module__ for part in encoder.modules()):
        module: Any = sys.modules.get(name)
        if hasattr(module, _MODALITIES):
            setattr(module, _MODALITIES, _in_order_of_the_model)


def _in_order_of_the_model(available_modalities: Sequence[str], supported_modality_names: Sequence[str]) -> list[str]:
    """The modalities that are there and that the model supports, in the order of the model's configuration."""
    return [name for name in supported_modality_names if name in available_modalities]


# Transforms without randomness; their subclasses may have some.
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
    """Whether transforms have no randomness, as far as is known."""
    return all(_is_deterministic(transform) for transform in transforms)


def _is_deterministic(transform: torch.nn.Module) -> bool:
    name = f"{type(transform).__module__}.{type(transform).__qualname__}"
    if name not in _PADS:
        return name in _DETERMINISTIC
    low, high = cast(tuple[int, int], transform.size)
    return high - low == 1  # of a wider range it draws one


# What reads of the inputs no more than their sizes.
_READ_SIZES = frozenset(
    {
        "rslearn.models.faster_rcnn.FasterRCNN",
        "rslearn.models.detr.detr.Detr",
        "rslearn.models.pooling_decoder.SegmentationPoolingDecoder",
    }
)
_READ_CONTENT = frozenset({"rslearn.models.concatenate_features.ConcatenateFeatures"})


def reads_inputs(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether what follows the encoder may read the content of inputs, not only features and sizes.

    Args:
        modules: decoders and what else follows; of classes that are not rslearn's or ours, it has to be assumed.
    """
    for module in modules:
        for part in module.modules():
            name = f"{type(part).__module__}.{type(part).__qualname__}"
            known = name.partition(".")[0] in ("rslearn", "rslp", "torch", "torchvision", "torchmetrics")
            if name in _READ_CONTENT or not known:
                return True
    return False
