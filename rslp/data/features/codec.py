"""Samples as bytes: what decoders and losses need of them, laid out so that a whole batch is read at once.

A record has a payload, the bytes of its tensors, and a head of three lines of JSON: the form of the features (types,
shapes, places), the form of everything else, and what is the sample's own. Samples of a dataset share their forms as a
rule, so a form is parsed once, and the tensors of all samples of a batch that have it are made by one call.
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


def spans_out(spans: list[TimeRange] | None) -> list[list[str]] | None:
    """Time ranges as JSON."""
    return None if spans is None else [[start.isoformat(), end.isoformat()] for start, end in spans]


def spans_in(spans: list[list[str]] | None) -> list[TimeRange] | None:
    """What ``spans_out`` was given."""
    return None if spans is None else [(_date(start), _date(end)) for start, end in spans]


def metadata_out(metadata: SampleMetadata) -> list[Any]:
    """A sample's metadata as JSON."""
    spans = spans_out(None if metadata.time_range is None else [metadata.time_range])
    projection = json.dumps(metadata.projection.serialize(), sort_keys=True)
    crop = [metadata.crop_idx, metadata.num_crops_in_window]
    place = [metadata.window_group, metadata.window_name, list(metadata.window_bounds), list(metadata.crop_bounds)]
    return [*place, *crop, spans, projection, metadata.dataset_source]


def metadata_in(value: list[Any]) -> SampleMetadata:
    """What ``metadata_out`` was given."""
    group, name, window, crop, number, count, spans, projection, dataset = value
    times = spans_in(spans)
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


_ALIGN = 16
# Tensors of types that numpy lacks are kept as integers of their width.
_AS_INTEGERS = {torch.bfloat16: torch.int16}

# Payload and head, as read.
Record = tuple[memoryview, bytes]


class UncacheableSample(Exception):
    """A sample holds something that has no place in a record; it is read and encoded each time."""


@dataclass(frozen=True)
class CachedSample:
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


class CachedBatch(NamedTuple):
    """What was kept of several samples; see ``Kept``.

    Attributes:
        features: of all of them, ``B`` first, float32.
        inputs: of each.
        targets: of each.
        metadatas: of each.
    """

    features: Any
    inputs: list[dict[str, Any]]
    targets: list[dict[str, Any]]
    metadatas: list[SampleMetadata]


class _Slot(NamedTuple):
    """Where a tensor lies in a payload: its type, shape, first byte and bytes.

    Of a tensor that repeats one value (see ``shape_of``) that value is kept; its shape is the sample's own, and
    ``repeated`` says where.
    """

    dtype: str
    shape: list[int]
    at: int
    size: int
    repeated: int | None = None


def encode(kept: CachedSample) -> tuple[bytes, bytes]:
    """Payload and head of a record.

    Raises:
        Unfit: a value that is neither a tensor, a raster image, text, a number, nor made of these.
    """
    own: list[Any] = [metadata_out(kept.metadata)]
    parts: list[bytes] = []
    tensors: list[torch.Tensor] = []
    features = _features_out(kept.features, tensors)
    forms = [[features, _lay_out(tensors, parts, own)]]
    tensors = []
    tree = _out([kept.inputs, kept.targets], tensors, own)
    forms.append([tree, _lay_out(tensors, parts, own)])
    # JSON escapes line ends.
    return b"".join(parts), "\n".join(map(json.dumps, [*forms, own])).encode()


def decode(records: Sequence[Record]) -> CachedBatch | None:
    """Give back what was encoded; None if the samples' features are of unlike shapes.

    Args:
        records: payload and head of each sample; what comes out shares no memory with them.
    """
    forms, rests, owns = zip(*(head.split(b"\n", 2) for _, head in records), strict=True)
    if len(set(forms)) != 1:
        return None
    payloads = [payload for payload, _ in records]
    own = json.loads(b"[" + b",".join(owns) + b"]")
    trees: list[Any] = [None] * len(records)
    for form in dict.fromkeys(rests):
        at = [i for i, rest in enumerate(rests) if rest == form]
        found = _rest_in(form, [payloads[i] for i in at], [own[i] for i in at])
        for i, tree in zip(at, found, strict=True):
            trees[i] = tree
    return CachedBatch(
        _features_in(forms[0], payloads),
        [inputs for inputs, _ in trees],
        [targets for _, targets in trees],
        [metadata_in(one[0]) for one in own],
    )


def shape_of(image: RasterImage) -> RasterImage:
    """An image of the same shape that takes no memory, for decoders that look at the size alone."""
    return RasterImage(torch.zeros((), dtype=image.image.dtype).expand(image.image.shape))


def _lay_out(tensors: list[torch.Tensor], parts: list[bytes], own: list[Any]) -> list[_Slot]:
    """Put the bytes of tensors behind those that are there."""
    at = sum(map(len, parts))
    slots = []
    for tensor in tensors:
        shape, repeated = list(tensor.shape), None
        if tensor.numel() > 1 and not any(tensor.stride()):
            own.append(shape)
            tensor, shape, repeated = tensor[(0,) * tensor.ndim], [], len(own) - 1
        raw = tensor.contiguous().view(_AS_INTEGERS.get(tensor.dtype, tensor.dtype)).numpy().tobytes()
        parts += [raw, bytes(-len(raw) % _ALIGN)]
        slots.append(_Slot(str(tensor.dtype).removeprefix("torch."), shape, at, len(raw), repeated))
        at += len(raw) + len(parts[-1])
    return slots


@lru_cache(maxsize=4096)
def _form(text: bytes) -> tuple[Any, list[_Slot]]:
    tree, slots = json.loads(text)
    return tree, [_Slot(*slot) for slot in slots]


def _rest_in(form: bytes, payloads: list[memoryview], own: list[list[Any]]) -> list[list[Any]]:
    """Inputs and targets of samples of one form."""
    tree, slots = _form(form)
    columns: list[list[torch.Tensor]] = []
    if slots:
        start, stop = slots[0].at, slots[-1].at + slots[-1].size
        rows = _rows(payloads, start, stop)
        for slot in slots:
            column = list(_of_rows(rows, slot, start).unbind())
            if slot.repeated is not None:
                column = [value.expand(one[slot.repeated]) for value, one in zip(column, own, strict=True)]
            columns.append(column)
    return _column(tree, columns, own)


def _rows(payloads: list[memoryview], start: int, stop: int) -> torch.Tensor:
    """Some bytes of each payload, ``B bytes``; a row's length is padded to whole numbers of any type."""
    rows = torch.empty(len(payloads), stop - start + -(stop - start) % _ALIGN, dtype=torch.uint8)
    out = rows.numpy()
    for row, payload in zip(out, payloads, strict=True):
        row[: stop - start] = payload[start:stop]
    return rows


def _of_rows(rows: torch.Tensor, slot: _Slot, start: int) -> torch.Tensor:
    """A tensor of all samples, ``B`` first."""
    kind, count = getattr(torch, slot.dtype), len(rows)
    if slot.size == 0:
        return torch.empty(count, *slot.shape, dtype=kind)
    return rows[:, slot.at - start : slot.at - start + slot.size].view(kind).view(count, *slot.shape)


def _out(value: Any, tensors: list[torch.Tensor], own: list[Any]) -> Any:
    """The value as JSON: containers are pairs of a letter and their contents, so that nothing is taken for another."""
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach().cpu())
        return ["t", len(tensors) - 1]
    if isinstance(value, RasterImage):
        own.append(spans_out(value.timestamps))
        return ["r", _out(value.image, tensors, own), len(own) - 1]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return ["n", _out(torch.from_numpy(np.array(value)), tensors, own)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return ["d", {key: _out(item, tensors, own) for key, item in value.items()}]
    if type(value) in (list, tuple):
        return ["l" if type(value) is list else "u", [_out(item, tensors, own) for item in value]]
    if value is None or type(value) in (str, int, float, bool):
        own.append(value)
        return ["v", len(own) - 1]
    raise UncacheableSample(f"a {type(value).__name__}")


def _column(node: Any, tensors: list[list[torch.Tensor]], own: list[list[Any]]) -> list[Any]:
    """The value of each of the samples.

    Args:
        node: what ``_out`` gave for each of them.
        tensors: for each tensor of the form those of the samples.
        own: what is each sample's own.
    """
    kind, content = node[0], node[1]
    if kind == "t":
        return tensors[content]
    if kind == "r":
        images = _column(content, tensors, own)
        return [RasterImage(image, spans_in(one[node[2]])) for image, one in zip(images, own, strict=True)]
    if kind == "n":
        return [tensor.numpy() for tensor in _column(content, tensors, own)]
    if kind == "v":
        return [one[content] for one in own]
    if not content:
        return [{} if kind == "d" else [] if kind == "l" else () for _ in own]
    if kind == "d":
        columns = [_column(item, tensors, own) for item in content.values()]
        return [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]
    rows = zip(*(_column(item, tensors, own) for item in content), strict=True)
    return list(map(list, rows)) if kind == "l" else list(rows)


def _features_out(features: Any, tensors: list[torch.Tensor]) -> str:
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


def _features_in(form: bytes, payloads: list[memoryview]) -> Any:
    kind, slots = _form(form)
    # Each in one piece, ``B`` in place of the samples' 1.
    tensors = [
        _of_rows(_rows(payloads, slot.at, slot.at + slot.size), slot, slot.at).flatten(0, 1).contiguous()
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
    """The features of one sample of a batch, still with a batch dimension, of 1.

    Raises:
        Unfit: features of an unknown type.
    """
    if type(features) is FeatureVector:
        return FeatureVector(features.feature_vector[i : i + 1])
    if type(features) is FeatureMaps:
        return FeatureMaps([one[i : i + 1] for one in features.feature_maps])
    if type(features) is TokenFeatureMaps:
        masks = None if features.masks is None else [one[i : i + 1] for one in features.masks]
        return TokenFeatureMaps([one[i : i + 1] for one in features.feature_maps], masks)
    raise UncacheableSample(f"features that are a {type(features).__name__}")


def narrowed(features: Any, dtype: torch.dtype) -> Any:
    """Features in another type of floating point numbers.

    Args:
        features: as ``sample_of`` gives them.
        dtype: ``torch.float32`` or narrower.
    """
    if type(features) is FeatureVector:
        return FeatureVector(features.feature_vector.to(dtype))
    maps = [one.to(dtype) for one in features.feature_maps]
    return FeatureMaps(maps) if type(features) is FeatureMaps else TokenFeatureMaps(maps, features.masks)
