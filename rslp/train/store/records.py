"""A record: what an input of one window holds, decoded, with all that is needed to give it back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import shapely
import torch
from rslearn.dataset import Window
from rslearn.train.model_context import RasterImage
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import PixelBounds, Projection, STGeometry

from rslp.train.store.columns import Array
from rslp.train.store.decoding import ItemGroup, Unfit

TimeRange = tuple[datetime, datetime]


@dataclass(frozen=True)
class Head:
    """How a raster's bytes are to be read.

    Attributes:
        dtype: as stored.
        final: as the input asks for it.
        shape: ``C T H W``, the item groups one after the other along T.
        steps: time steps of each item group.
        times: for each item group the time ranges of its steps, or None.
        known: those of all steps; None if they are not known of each.
        crops: a crop is a part of the whole: every source lies on the window's pixel grid.
    """

    dtype: np.dtype[Any]
    final: np.dtype[Any]
    shape: tuple[int, int, int, int]
    steps: tuple[int, ...]
    times: tuple[tuple[TimeRange, ...] | None, ...]
    known: tuple[TimeRange, ...] | None
    crops: bool


def encode_raster(groups: Sequence[ItemGroup], *, narrow: Sequence[str], crops: bool) -> tuple[bytes, bytes]:
    """Payload and head of a raster input.

    Args:
        groups: the window's item groups in rslearn's order, in the dtype that the input asks for.
        narrow: dtypes that the sources may have; the narrowest that keeps every bit is stored.
        crops: whether every source lies on the window's pixel grid.

    Raises:
        Unfit: item groups of unlike sizes.
    """
    arrays = [group.image.numpy() for group in groups]
    if len({(a.shape[0], *a.shape[2:]) for a in arrays}) != 1:
        raise Unfit(f"item groups of unlike shapes: {', '.join(str(a.shape) for a in arrays)}")
    whole = np.concatenate(arrays, axis=1) if len(arrays) > 1 else np.ascontiguousarray(arrays[0])
    stored = _narrowed(whole, narrow)
    head = {
        "dtype": stored.dtype.str,
        "final": whole.dtype.str,
        "shape": whole.shape,
        "steps": [a.shape[1] for a in arrays],
        "times": [
            None if group.times is None else [[start.isoformat(), end.isoformat()] for start, end in group.times]
            for group in groups
        ],
        "crops": crops,
    }
    return stored.tobytes(), json.dumps(head).encode()


def _narrowed(whole: Array, dtypes: Sequence[str]) -> Array:
    for dtype in sorted(map(np.dtype, dtypes), key=lambda dtype: dtype.itemsize):
        if dtype.itemsize >= whole.dtype.itemsize:
            break
        with np.errstate(invalid="ignore"):
            small = whole.astype(dtype)
        # Bit for bit: a negative zero or a NaN would be lost in an integer.
        if np.array_equal(small.astype(whole.dtype).view(np.uint32), whole.view(np.uint32)):
            return small
    return whole


@lru_cache(maxsize=4096)
def parse_head(raw: bytes) -> Head:
    """The head of a raster; equal heads are parsed once."""
    head = json.loads(raw)
    times = tuple(
        None
        if group is None
        else tuple((datetime.fromisoformat(start), datetime.fromisoformat(end)) for start, end in group)
        for group in head["times"]
    )
    return Head(
        np.dtype(head["dtype"]),
        np.dtype(head["final"]),
        tuple(head["shape"]),
        tuple(head["steps"]),
        times,
        None if None in times else tuple(span for one in times for span in one or ()),
        head["crops"],
    )


def decode_raster(
    payload: memoryview, head: Head, *, group: int | None, crop: tuple[int, int, int, int] | None
) -> RasterImage:
    """Give back what rslearn would have read.

    Args:
        payload: the stored bytes.
        head: how to read them.
        group: the item group to read; None means all.
        crop: pixels from the window's corner: x0, y0, x1, y1; None means the whole window.
    """
    image = np.ndarray(head.shape, head.dtype, payload)
    known = head.known
    if group is not None and len(head.steps) > 1:
        start = sum(head.steps[:group])
        image = image[:, start : start + head.steps[group]]
        known = head.times[group]
    if crop is not None:
        image = image[:, :, crop[1] : crop[3], crop[0] : crop[2]]
    # A copy in any case: the map is read-only, and transforms write.
    return RasterImage(torch.from_numpy(image.astype(head.final, order="C")), None if known is None else list(known))


def encode_vector(groups: Sequence[Sequence[Feature]], window: Window) -> tuple[bytes, bytes]:
    """Payload and head of a vector input.

    Args:
        groups: the features of each item group.
        window: the window that they are of.

    Raises:
        Unfit: features that JSON and WKB can't hold as they are.
    """
    document = [[_feature(feature, window) for feature in features] for features in groups]
    try:
        payload = json.dumps(document).encode()
    except (TypeError, ValueError) as error:
        raise Unfit(f"properties that are no JSON: {error}") from error
    if repr(json.loads(payload)) != repr(document):
        raise Unfit("properties that JSON changes")
    return payload, b"vector %d" % len(groups)


def _feature(feature: Feature, window: Window) -> list[Any]:
    geometry = feature.geometry
    if geometry.time_range is not None or geometry.projection != window.projection:
        raise Unfit("features of another projection, or with times of their own")
    raw = shapely.to_wkb(geometry.shp)
    back = shapely.from_wkb(raw)
    if shapely.to_wkb(back) != raw or back.geom_type != geometry.shp.geom_type:
        raise Unfit(f"a geometry that WKB changes: {geometry.shp.geom_type}")
    return [raw.hex(), feature.properties]


def decode_vector(payload: memoryview, projection: Projection, *, group: int | None) -> list[Feature]:
    """The features of one item group, or of all of them; ``projection`` is the window's."""
    document = json.loads(bytes(payload))
    chosen = document if group is None else document[group : group + 1]
    return [
        Feature(STGeometry(projection, shapely.from_wkb(bytes.fromhex(raw)), None), properties)
        for features in chosen
        for raw, properties in features
    ]


def vector_groups(head: bytes) -> int:
    """How many item groups a vector record holds."""
    return int(head.removeprefix(b"vector "))


def within(crop: PixelBounds, window: PixelBounds) -> bool:
    """Whether a crop lies in the window."""
    return crop[0] >= window[0] and crop[1] >= window[1] and crop[2] <= window[2] and crop[3] <= window[3]
