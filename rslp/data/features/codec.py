"""Cached samples as bytes: features, targets and metadata, laid out so that a whole batch is read at once.

A record has a payload, the bytes of its tensors, and a head of three lines of JSON: the form of the features (types,
shapes, offsets), the form of everything else, and the values that belong to this sample alone. Most samples of a
dataset share their forms, so a form is parsed once, and one call makes a tensor for all samples of a batch with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from rslearn.models.component import FeatureMaps, FeatureVector, TokenFeatureMaps
from rslearn.train.model_context import RasterImage, SampleMetadata

from rslp.data.cache.index import projection_of
from rslp.data.cache.records import TimeRange

_ALIGN = 16
# numpy has no such type: these tensors are stored as integers of their width.
_AS_INTEGERS = {torch.bfloat16: torch.int16}

# Payload and head, as read.
Record = tuple[memoryview, bytes]


def _spans_to_json(spans: list[TimeRange] | None) -> list[list[str]] | None:
    return None if spans is None else [[start.isoformat(), end.isoformat()] for start, end in spans]


def _spans_from_json(spans: list[list[str]] | None) -> list[TimeRange] | None:
    return None if spans is None else [(_date(start), _date(end)) for start, end in spans]


def _metadata_to_json(metadata: SampleMetadata) -> list[Any]:
    spans = _spans_to_json(None if metadata.time_range is None else [metadata.time_range])
    projection = json.dumps(metadata.projection.serialize(), sort_keys=True)
    crop = [metadata.crop_idx, metadata.num_crops_in_window]
    window = [metadata.window_group, metadata.window_name, list(metadata.window_bounds), list(metadata.crop_bounds)]
    return [*window, *crop, spans, projection, metadata.dataset_source]


def _metadata_from_json(value: list[Any]) -> SampleMetadata:
    group, name, window, crop, number, count, spans, projection, dataset = value
    times = _spans_from_json(spans)
    return SampleMetadata(
        window_group=group,
        window_name=name,
        window_bounds=tuple(window),
        crop_bounds=tuple(crop),
        crop_idx=number,
        num_crops_in_window=count,
        time_range=None if times is None else times[0],
        projection=projection_of(projection),
        dataset_source=dataset,
    )


@lru_cache(maxsize=4096)
def _date(text: str) -> datetime:
    return datetime.fromisoformat(text)


class UncacheableSample(Exception):
    """A sample holds a value of a type that a record can't hold; it is read and encoded each time."""


@dataclass(frozen=True)
class CachedSample:
    """One sample as it is cached.

    Attributes:
        features: of this sample alone: ``FeatureMaps`` of ``1 C H W``, ``TokenFeatureMaps`` of ``1 C H W N`` or a
            ``FeatureVector`` of ``1 C``.
        inputs: the inputs that decoders need.
        targets: the targets by task.
        metadata: the sample's window, crop and times.
    """

    features: Any
    inputs: dict[str, Any]
    targets: dict[str, Any]
    metadata: SampleMetadata


class CachedBatch(NamedTuple):
    """Several cached samples, see ``CachedSample``; ``features`` are those of all samples, ``B`` first, float32."""

    features: Any
    inputs: list[dict[str, Any]]
    targets: list[dict[str, Any]]
    metadatas: list[SampleMetadata]


class _Slot(NamedTuple):
    """A tensor in a payload: type, shape, offset and size in bytes.

    A tensor that repeats one value (see ``shape_of``) is stored as that value, with an empty shape. Its full shape is
    one of the sample's own values, the one with the number ``repeated``.
    """

    dtype: str
    shape: list[int]
    offset: int
    size: int
    repeated: int | None = None


def encode(sample: CachedSample) -> tuple[bytes, bytes]:
    """Payload and head of a record.

    Raises:
        UncacheableSample: a value that is neither a tensor, a raster image, text, a number, nor made of these.
    """
    own: list[Any] = [_metadata_to_json(sample.metadata)]
    parts: list[bytes] = []
    tensors: list[torch.Tensor] = []
    kind = _features_kind(sample.features, tensors)
    forms = [[kind, _lay_out(tensors, parts, own)]]
    tensors = []
    tree = _to_json([sample.inputs, sample.targets], tensors, own)
    forms.append([tree, _lay_out(tensors, parts, own)])
    # JSON escapes line ends.
    return b"".join(parts), "\n".join(map(json.dumps, [*forms, own])).encode()


def decode(records: Sequence[Record]) -> CachedBatch | None:
    """Decode records into a batch, which shares no memory with them; None if features are of different shapes."""
    feature_forms, other_forms, owns = zip(*(head.split(b"\n", 2) for _, head in records), strict=True)
    if len(set(feature_forms)) != 1:
        return None
    payloads = [payload for payload, _ in records]
    own = json.loads(b"[" + b",".join(owns) + b"]")
    trees: list[Any] = [None] * len(records)
    for form in dict.fromkeys(other_forms):
        numbers = [i for i, other in enumerate(other_forms) if other == form]
        decoded = _decode_form(form, [payloads[i] for i in numbers], [own[i] for i in numbers])
        for i, tree in zip(numbers, decoded, strict=True):
            trees[i] = tree
    return CachedBatch(
        _decode_features(feature_forms[0], payloads),
        [inputs for inputs, _ in trees],
        [targets for _, targets in trees],
        [_metadata_from_json(values[0]) for values in own],
    )


def shape_of(image: RasterImage) -> RasterImage:
    """An image of zeros of the same shape that takes no memory, for decoders that need the size alone."""
    return RasterImage(torch.zeros((), dtype=image.image.dtype).expand(image.image.shape))


def _lay_out(tensors: list[torch.Tensor], parts: list[bytes], own: list[Any]) -> list[_Slot]:
    """Append the bytes of tensors to the payload; returns where each lies."""
    offset = sum(map(len, parts))
    slots = []
    for tensor in tensors:
        shape, repeated = list(tensor.shape), None
        if tensor.numel() > 1 and not any(tensor.stride()):
            own.append(shape)
            tensor, shape, repeated = tensor[(0,) * tensor.ndim], [], len(own) - 1
        raw = tensor.contiguous().view(_AS_INTEGERS.get(tensor.dtype, tensor.dtype)).numpy().tobytes()
        parts += [raw, bytes(-len(raw) % _ALIGN)]
        slots.append(_Slot(str(tensor.dtype).removeprefix("torch."), shape, offset, len(raw), repeated))
        offset += len(raw) + len(parts[-1])
    return slots


@lru_cache(maxsize=4096)
def _form(text: bytes) -> tuple[Any, list[_Slot]]:
    tree, slots = json.loads(text)
    return tree, [_Slot(*slot) for slot in slots]


def _decode_form(form: bytes, payloads: list[memoryview], own: list[list[Any]]) -> list[list[Any]]:
    """Inputs and targets of samples with the same form."""
    tree, slots = _form(form)
    columns: list[list[torch.Tensor]] = []
    if slots:
        start, stop = slots[0].offset, slots[-1].offset + slots[-1].size
        rows = _rows(payloads, start, stop)
        for slot in slots:
            column = list(_slot_tensor(rows, slot, start).unbind())
            if slot.repeated is not None:
                column = [value.expand(values[slot.repeated]) for value, values in zip(column, own, strict=True)]
            columns.append(column)
    return _from_json(tree, columns, own)


def _rows(payloads: list[memoryview], start: int, stop: int) -> torch.Tensor:
    """Bytes ``start`` to ``stop`` of each payload, uint8 ``B N``; rows are padded to a multiple of any type's size."""
    rows = torch.empty(len(payloads), stop - start + -(stop - start) % _ALIGN, dtype=torch.uint8)
    out = rows.numpy()
    for row, payload in zip(out, payloads, strict=True):
        row[: stop - start] = payload[start:stop]
    return rows


def _slot_tensor(rows: torch.Tensor, slot: _Slot, start: int) -> torch.Tensor:
    """One tensor for all samples, batch dimension first; ``start`` is the payload offset of the rows' first byte."""
    kind, count = getattr(torch, slot.dtype), len(rows)
    if slot.size == 0:
        return torch.empty(count, *slot.shape, dtype=kind)
    return rows[:, slot.offset - start : slot.offset - start + slot.size].view(kind).view(count, *slot.shape)


def _to_json(value: Any, tensors: list[torch.Tensor], own: list[Any]) -> Any:
    """The form of a value as JSON: a letter for its type, then its content or a number in ``tensors`` or ``own``."""
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach().cpu())
        return ["t", len(tensors) - 1]
    if isinstance(value, RasterImage):
        own.append(_spans_to_json(value.timestamps))
        return ["r", _to_json(value.image, tensors, own), len(own) - 1]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return ["n", _to_json(torch.from_numpy(np.array(value)), tensors, own)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return ["d", {key: _to_json(item, tensors, own) for key, item in value.items()}]
    if type(value) in (list, tuple):
        return ["l" if type(value) is list else "u", [_to_json(item, tensors, own) for item in value]]
    if value is None or type(value) in (str, int, float, bool):
        own.append(value)
        return ["v", len(own) - 1]
    raise UncacheableSample(f"a {type(value).__name__}")


def _from_json(node: Any, tensors: list[list[torch.Tensor]], own: list[list[Any]]) -> list[Any]:
    """The value of each sample.

    Args:
        node: the form, as ``_to_json`` returns it; the same for all samples.
        tensors: for each tensor of the form the samples' tensors.
        own: for each sample its own values.
    """
    kind, content = node[0], node[1]
    if kind == "t":
        return tensors[content]
    if kind == "r":
        images = _from_json(content, tensors, own)
        return [RasterImage(im, _spans_from_json(values[node[2]])) for im, values in zip(images, own, strict=True)]
    if kind == "n":
        return [tensor.numpy() for tensor in _from_json(content, tensors, own)]
    if kind == "v":
        return [values[content] for values in own]
    if not content:
        return [{} if kind == "d" else [] if kind == "l" else () for _ in own]
    if kind == "d":
        columns = [_from_json(item, tensors, own) for item in content.values()]
        return [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]
    rows = zip(*(_from_json(item, tensors, own) for item in content), strict=True)
    return list(map(list, rows)) if kind == "l" else list(rows)


def _features_kind(features: Any, tensors: list[torch.Tensor]) -> str:
    """The kind of features, whose tensors are appended to ``tensors``."""
    if type(features) is FeatureVector:
        tensors.append(features.feature_vector)
        kind = "vector"
    elif type(features) in (TokenFeatureMaps, FeatureMaps):
        tensors += features.feature_maps
        masks = features.masks if type(features) is TokenFeatureMaps else None
        tensors += masks or []
        kind = "maps" if type(features) is FeatureMaps else "tokens" if masks is None else "masked"
    else:
        raise UncacheableSample(f"features that are a {type(features).__name__}")
    tensors[:] = [tensor.detach().cpu().contiguous() for tensor in tensors]
    return kind


def _decode_features(form: bytes, payloads: list[memoryview]) -> Any:
    kind, slots = _form(form)
    # Contiguous tensors; the samples' batch dimensions of 1 become one of B.
    tensors = [
        _slot_tensor(_rows(payloads, slot.offset, slot.offset + slot.size), slot, slot.offset)
        .flatten(0, 1)
        .contiguous()
        for slot in slots
    ]
    tensors = [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]
    if kind == "vector":
        return FeatureVector(tensors[0])
    if kind == "maps":
        return FeatureMaps(tensors)
    half = len(tensors) // 2
    return TokenFeatureMaps(tensors) if kind == "tokens" else TokenFeatureMaps(tensors[:half], tensors[half:])


def sample_of(features: Any, i: int) -> Any:
    """The features of one sample of a batch, with a batch dimension of 1.

    Raises:
        UncacheableSample: features of an unknown type.
    """
    one = slice(i, i + 1)
    if type(features) is FeatureVector:
        return FeatureVector(features.feature_vector[one])
    if type(features) not in (FeatureMaps, TokenFeatureMaps):
        raise UncacheableSample(f"features that are a {type(features).__name__}")
    maps = [tensor[one] for tensor in features.feature_maps]
    if type(features) is FeatureMaps:
        return FeatureMaps(maps)
    return TokenFeatureMaps(maps, None if features.masks is None else [mask[one] for mask in features.masks])


def narrowed(features: Any, dtype: torch.dtype) -> Any:
    """Features, as ``sample_of`` returns them, in another floating point type."""
    if type(features) is FeatureVector:
        return FeatureVector(features.feature_vector.to(dtype))
    maps = [tensor.to(dtype) for tensor in features.feature_maps]
    return FeatureMaps(maps) if type(features) is FeatureMaps else TokenFeatureMaps(maps, features.masks)
