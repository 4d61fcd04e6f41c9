"""A sample as bytes: what a decoder and a loss need of it, with tensors laid out so that they are read in one piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from rslearn.models.component import FeatureMaps, FeatureVector, TokenFeatureMaps
from rslearn.train.model_context import RasterImage, SampleMetadata
from rslearn.utils.geometry import Projection

_ALIGN = 16
# Tensors of types that numpy lacks are kept as integers of their width.
_AS_INTEGERS = {torch.bfloat16: torch.int16}


class Unfit(Exception):
    """A sample holds something that has no place in a record; it is read and encoded each time."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a sample.

    Attributes:
        features: of this sample alone: ``FeatureMaps`` of ``1 C H W``, ``TokenFeatureMaps`` of ``1 C H W N`` or a
            ``FeatureVector`` of ``1 C``.
        inputs: what decoders read of the inputs.
        targets: the targets by task.
        metadata: where the sample comes from.
    """

    features: Any
    inputs: dict[str, Any]
    targets: dict[str, Any]
    metadata: SampleMetadata


def encode(kept: Kept) -> tuple[bytes, bytes]:
    """Payload and head of a record.

    Raises:
        Unfit: a value that is neither a tensor, a raster image, text, a number, nor made of these.
    """
    tensors: list[torch.Tensor] = []
    tree = {
        "features": _features_out(kept.features, tensors),
        "inputs": _out(kept.inputs, tensors),
        "targets": _out(kept.targets, tensors),
        "metadata": _metadata_out(kept.metadata),
    }
    payload, layout = _lay_out(tensors)
    return payload, json.dumps([tree, layout]).encode()


def decode(payload: np.ndarray[Any, np.dtype[np.uint8]], head: bytes) -> Kept:
    """Give back what was encoded.

    Args:
        payload: the bytes, which the tensors then share.
        head: how to read them.
    """
    tree, layout = json.loads(head)
    whole = torch.from_numpy(payload)
    tensors = [_tensor(whole, *entry) for entry in layout]
    return Kept(
        features=_features_in(tree["features"], tensors),
        inputs=_in(tree["inputs"], tensors),
        targets=_in(tree["targets"], tensors),
        metadata=_metadata_in(tree["metadata"]),
    )


def shape_of(image: RasterImage) -> RasterImage:
    """An image of the same shape that takes no memory, for decoders that look at the size alone."""
    return RasterImage(torch.zeros((), dtype=image.image.dtype).expand(image.image.shape))


def _lay_out(tensors: list[torch.Tensor]) -> tuple[bytes, list[list[Any]]]:
    parts: list[bytes] = []
    layout: list[list[Any]] = []
    at = 0
    for tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        # A tensor that repeats one value (see shape_of) is kept as that value.
        single = tensor.numel() > 1 and not any(tensor.stride())
        flat = tensor.reshape(-1)[:1] if single else tensor.contiguous().reshape(-1)
        raw = flat.view(_AS_INTEGERS.get(flat.dtype, flat.dtype)).numpy().tobytes()
        parts += [raw, bytes(-len(raw) % _ALIGN)]
        layout.append([dtype, list(tensor.shape), at, len(raw), single])
        at += len(raw) + len(parts[-1])
    return b"".join(parts), layout


def _tensor(whole: torch.Tensor, dtype: str, shape: list[int], at: int, size: int, single: bool) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if size == 0:
        return torch.empty(shape, dtype=kind)
    flat = whole[at : at + size].view(kind)
    return flat[0].expand(shape) if single else flat.view(shape)


def _out(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The value as JSON: containers are pairs of a letter and their contents, so that nothing is taken for another."""
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach().cpu())
        return ["t", len(tensors) - 1]
    if isinstance(value, RasterImage):
        return ["r", _out(value.image, tensors), _spans_out(value.timestamps)]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return ["n", _out(torch.from_numpy(np.array(value)), tensors)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return ["d", {key: _out(item, tensors) for key, item in value.items()}]
    if type(value) in (list, tuple):
        return ["l" if type(value) is list else "u", [_out(item, tensors) for item in value]]
    if value is None or type(value) in (str, int, float, bool):
        return ["v", value]
    raise Unfit(f"a {type(value).__name__}")


def _in(value: Any, tensors: list[torch.Tensor]) -> Any:
    kind, content = value[0], value[1]
    if kind == "t":
        return tensors[content]
    if kind == "r":
        return RasterImage(_in(content, tensors), _spans_in(value[2]))
    if kind == "n":
        return _in(content, tensors).numpy()
    if kind == "d":
        return {key: _in(item, tensors) for key, item in content.items()}
    if kind in "lu":
        items = [_in(item, tensors) for item in content]
        return items if kind == "l" else tuple(items)
    return content


def _features_out(features: Any, tensors: list[torch.Tensor]) -> list[Any]:
    if type(features) is FeatureVector:
        return ["vector", _out(features.feature_vector, tensors), ["v", None]]
    if type(features) is TokenFeatureMaps:
        return ["tokens", _out(list(features.feature_maps), tensors), _out(features.masks, tensors)]
    if type(features) is FeatureMaps:
        return ["maps", _out(list(features.feature_maps), tensors), ["v", None]]
    raise Unfit(f"features that are a {type(features).__name__}")


def _features_in(value: list[Any], tensors: list[torch.Tensor]) -> Any:
    kind, content, masks = value
    if kind == "vector":
        return FeatureVector(_in(content, tensors))
    if kind == "tokens":
        return TokenFeatureMaps(_in(content, tensors), _in(masks, tensors))
    return FeatureMaps(_in(content, tensors))


def _spans_out(spans: list[tuple[datetime, datetime]] | None) -> list[list[str]] | None:
    return None if spans is None else [[start.isoformat(), end.isoformat()] for start, end in spans]


def _spans_in(spans: list[list[str]] | None) -> list[tuple[datetime, datetime]] | None:
    return None if spans is None else [(_date(start), _date(end)) for start, end in spans]


def _metadata_out(metadata: SampleMetadata) -> list[Any]:
    spans = _spans_out(None if metadata.time_range is None else [metadata.time_range])
    projection = json.dumps(metadata.projection.serialize(), sort_keys=True)
    crop = [metadata.crop_idx, metadata.num_crops_in_window]
    place = [metadata.window_group, metadata.window_name, list(metadata.window_bounds), list(metadata.crop_bounds)]
    return [*place, *crop, spans, projection, metadata.dataset_source]


def _metadata_in(value: list[Any]) -> SampleMetadata:
    group, name, window, crop, number, count, spans, projection, dataset = value
    times = _spans_in(spans)
    return SampleMetadata(
        window_group=group,
        window_name=name,
        window_bounds=tuple(window),
        crop_bounds=tuple(crop),
        crop_idx=number,
        num_crops_in_window=count,
        time_range=None if times is None else times[0],
        projection=_projection(projection),
        dataset_source=dataset,
    )


@lru_cache(maxsize=1024)
def _projection(text: str) -> Projection:
    projection: Projection = Projection.deserialize(json.loads(text))
    return projection


@lru_cache(maxsize=4096)
def _date(text: str) -> datetime:
    return datetime.fromisoformat(text)
