"""Cached samples as bytes: features, targets and metadata.

A record has a payload, the bytes of its tensors, and a head, everything else, pickled. Reading a head makes objects of
the classes listed here only, so a file of a stranger can't run code.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from rslearn.models.component import FeatureMaps, FeatureVector, TokenFeatureMaps
from rslearn.train.model_context import RasterImage, SampleMetadata
from rslearn.utils.geometry import Projection

from rslp.data.cache.index import projection_of
from rslp.errors import RunError

_ALIGN = 16
# numpy's types by the names of torch's; numpy has no bfloat16, whose tensors are stored as integers of their width.
_DTYPES = {
    name: np.dtype("int16" if name == "bfloat16" else name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
}

# Payload and head, as read.
Record = tuple[memoryview, bytes]


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


# The type and shape of a tensor, and its offset in the payload.
_Place = tuple[str, tuple[int, ...], int]


def _view(payload: memoryview, place: _Place) -> np.ndarray[Any, np.dtype[Any]]:
    dtype, shape, offset = place
    return np.ndarray(shape, _DTYPES[dtype], payload, offset)


def _tensor(copied: np.ndarray[Any, np.dtype[Any]], dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(copied)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


@lru_cache(maxsize=4096)
def _repeated(dtype: str, shape: tuple[int, ...], value: str) -> torch.Tensor:
    """A tensor that repeats one value (JSON), see ``shape_of``; samples may share it, since it can't be written to."""
    return torch.tensor(json.loads(value), dtype=getattr(torch, dtype)).expand(shape)


@lru_cache(maxsize=4096)
def _date(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _numpy(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    return tensor.numpy()


# All that a head may name, beside plain values.
_NAMED = (
    FeatureMaps, FeatureVector, RasterImage, SampleMetadata, TokenFeatureMaps, _date, _numpy, _repeated, projection_of
)  # fmt: skip
_BY_NAME = {(one.__module__, one.__qualname__): one for one in _NAMED}


class _Pickler(pickle.Pickler):
    """Pickles a head; the tensors in it go into ``payload``."""

    def __init__(self, head: io.BytesIO) -> None:
        super().__init__(head, protocol=5)
        self.payload = bytearray()

    def persistent_id(self, value: Any) -> _Place | None:
        is_plain = isinstance(value, torch.Tensor) and (value.numel() < 2 or any(value.stride()))
        return self.add(value) if is_plain else None

    def reducer_override(self, value: Any) -> Any:
        # Not called for plain values, containers, and the tensors above.
        if isinstance(value, torch.Tensor):
            one = json.dumps(value[(0,) * value.ndim].item())
            return _repeated, (str(value.dtype).removeprefix("torch."), tuple(value.shape), one)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return _numpy, (torch.from_numpy(np.array(value)),)
        if isinstance(value, datetime):
            return _date, (value.isoformat(),)
        if isinstance(value, Projection):
            return projection_of, (json.dumps(value.serialize(), sort_keys=True),)
        if type(value) in _NAMED or any(value is one for one in _NAMED):
            return NotImplemented
        raise UncacheableSample(f"a {type(value).__name__}")

    def add(self, tensor: torch.Tensor) -> _Place:
        """Append a tensor to the payload."""
        tensor, dtype = tensor.detach().cpu().contiguous(), str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise UncacheableSample(f"a tensor of {dtype}")
        place = dtype, tuple(tensor.shape), len(self.payload)
        raw = (tensor.view(torch.int16) if dtype == "bfloat16" else tensor).numpy().tobytes()
        self.payload += raw + bytes(-len(raw) % _ALIGN)
        return place


class _Unpickler(pickle.Unpickler):
    """Reads a head; tensors are copied from ``payload``."""

    def __init__(self, head: bytes, payload: memoryview) -> None:
        super().__init__(io.BytesIO(head))
        self._payload = payload

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return _tensor(_view(self._payload, pid).copy(), pid[0])

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _BY_NAME[module, name]
        except KeyError:
            message = f"a record of cached features names {module}.{name}: it was not written by rslp"
            raise RunError(message) from None


def encode(sample: CachedSample) -> tuple[bytes, bytes]:
    """Payload and head of a record.

    Raises:
        UncacheableSample: a value that is neither a tensor, a raster image, text, a number, nor made of these.
    """
    head = io.BytesIO()
    pickler = _Pickler(head)
    kind, tensors = _tensors_of(sample.features)
    # The places of the features' tensors, so that the features of a batch are copied once, side by side.
    features = kind, [pickler.add(tensor) for tensor in tensors]
    pickler.dump((features, sample.inputs, sample.targets, sample.metadata))
    return bytes(pickler.payload), head.getvalue()


def decode(records: Sequence[Record]) -> CachedBatch | None:
    """Decode records into a batch, which shares no memory with them; None if features are of different shapes."""
    payloads = [payload for payload, _ in records]
    features, inputs, targets, metadatas = zip(*(_Unpickler(head, p).load() for p, head in records), strict=True)
    if any(other != features[0] for other in features):
        return None
    kind, places = features[0]
    tensors = []
    for place in places:
        tensor = _tensor(np.concatenate([_view(payload, place) for payload in payloads]), place[0])
        tensors.append(tensor.float() if tensor.is_floating_point() else tensor)
    return CachedBatch(_features_of(kind, tensors), list(inputs), list(targets), list(metadatas))


def sample_of(features: Any, i: int, *, dtype: torch.dtype) -> Any:
    """The features of one sample of a batch, with a batch dimension of 1, in another floating point type.

    Raises:
        UncacheableSample: features of an unknown type.
    """
    kind, tensors = _tensors_of(features)
    parts = [tensor[i : i + 1] for tensor in tensors]
    return _features_of(kind, [part.to(dtype) if part.is_floating_point() else part for part in parts])


def _tensors_of(features: Any) -> tuple[type, list[torch.Tensor]]:
    """The class of features and their tensors; masks are the boolean ones."""
    if type(features) is FeatureVector:
        return FeatureVector, [features.feature_vector]
    if type(features) in (FeatureMaps, TokenFeatureMaps):
        return type(features), [*features.feature_maps, *(getattr(features, "masks", None) or [])]
    raise UncacheableSample(f"features that are a {type(features).__name__}")


def _features_of(kind: type, tensors: list[torch.Tensor]) -> Any:
    """Features from their class and tensors."""
    if kind is FeatureVector:
        return FeatureVector(tensors[0])
    maps, masks = ([tensor for tensor in tensors if (tensor.dtype is torch.bool) == is_mask] for is_mask in (0, 1))
    return FeatureMaps(maps) if kind is FeatureMaps else TokenFeatureMaps(maps, masks or None)


def shape_of(image: RasterImage) -> RasterImage:
    """An image of zeros of the same shape that takes no memory, for decoders that need the size alone."""
    return RasterImage(torch.zeros((), dtype=image.image.dtype).expand(image.image.shape))
