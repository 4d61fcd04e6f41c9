"""Records: one input of one window, decoded through rslearn, as bytes that give it back bit for bit."""

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
from rasterio.enums import Resampling
from rasterio.io import DatasetReader
from rslearn.dataset import Dataset, Window
from rslearn.dataset.window import get_layer_and_group_from_dir_name
from rslearn.train.dataset import DataInput, read_layer_time_range, read_raster_layer_groups_for_data_input
from rslearn.train.model_context import RasterImage
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import PixelBounds, Projection, STGeometry
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import (
    GeotiffRasterFormat,
    ImageTileRasterFormat,
    NumpyRasterFormat,
    RasterFormat,
    SingleImageRasterFormat,
)
from upath import UPath

from rslp import upstream
from rslp.data.cache.columns import Array

# These formats refuse another projection and crop by whole pixels.
_EXACT = (ImageTileRasterFormat, NumpyRasterFormat, SingleImageRasterFormat)
# Coarser sources up to this factor; a pixel's centre is then far enough from the edge of its source pixel.
_COARSEST = 64
_OFF_GRID = 1e-4


class UncacheableWindow(Exception):
    """Something that a record can't hold; it is read directly."""


@dataclass(frozen=True)
class ItemGroup:
    """One item group of a raster layer over a whole window.

    Attributes:
        image: ``C T H W``, in the dtype that the input asks for.
        times: the time range of each step, or None where rslearn would find none.
    """

    image: torch.Tensor
    times: list[tuple[datetime, datetime]] | None


class GridCheckingFormat(RasterFormat):
    """Decodes as the format it wraps, and notes whether the source lies on the grid of pixels that was asked for.

    If it does, a crop of the whole is what reading the crop would have given.

    Attributes:
        inner: the format that it wraps.
        on_grid: whether all sources since it was last set to true did.
    """

    def __init__(self, inner: RasterFormat) -> None:
        self.inner = inner
        self.on_grid = True

    def decode_raster(
        self,
        path: UPath,
        projection: Projection,
        bounds: PixelBounds,
        resampling: Resampling = Resampling.bilinear,
    ) -> RasterArray:
        """Decode, see the class."""
        if not self.on_grid or type(self.inner) in _EXACT:
            return self.inner.decode_raster(path, projection, bounds, resampling)
        fitting: list[bool] = []
        with upstream.observe_rasters(lambda source: fitting.append(_on_grid(source, projection))):
            decoded = self.inner.decode_raster(path, projection, bounds, resampling)
        # Of another format, or of none that was opened as expected, nothing is known.
        self.on_grid = type(self.inner) is GeotiffRasterFormat and bool(fitting) and all(fitting)
        return decoded


def _on_grid(source: DatasetReader, projection: Projection) -> bool:
    place = source.transform
    if source.crs != projection.crs or place.b or place.d:
        return False
    for step, start, pixel in (
        (place.a, place.c, projection.x_resolution),
        (place.e, place.f, projection.y_resolution),
    ):
        factor, offset = step / pixel, start / pixel
        whole = abs(factor - round(factor)) < 1e-9 and 1 <= round(factor) <= _COARSEST
        if not whole or abs(offset - round(offset)) > _OFF_GRID:
            return False
    return True


def layer_options(window: Window, data_input: DataInput) -> list[tuple[str, int]]:
    """The item groups that rslearn reads, or draws one of, in its order."""
    if not data_input.load_all_item_groups:
        options = [get_layer_and_group_from_dir_name(option) for option in data_input.layers]
        return [option for option in options if window.is_layer_completed(*option)]
    completed = window.list_completed_layers()
    return [
        (layer, group)
        for layer in data_input.layers
        for group in sorted(group for name, group in completed if name == layer)
    ]


def read_rasters(dataset: Dataset, window: Window, data_input: DataInput) -> list[ItemGroup]:
    """Every item group of a raster input over the whole window.

    Raises:
        Unfit: there is none, or one that rslearn would refuse.
    """
    options = layer_options(window, data_input)
    marking = upstream.with_nodata_marked(dataset, data_input)
    found: dict[tuple[str, int], ItemGroup] = {}
    for layer in dict.fromkeys(layer for layer, _ in options):
        groups = sorted({group for name, group in options if name == layer})
        images, times = read_raster_layer_groups_for_data_input(
            window, window.bounds, layer, groups, marking.layers[layer], data_input
        )
        layer_data: Any = None
        for group, image, spans in zip(groups, images, times, strict=True):
            if spans is None and image.shape[1] != 1:
                raise UncacheableWindow("several time steps without timestamps")
            if spans is None:
                layer_data = layer_data or window.load_layer_datas().get(layer)
                span = read_layer_time_range(layer_data, group)
                spans = None if span is None else [span]
            found[layer, group] = ItemGroup(image, spans)
    return [found[option] for option in _some(options)]


def read_vectors(dataset: Dataset, window: Window, data_input: DataInput) -> list[list[Feature]]:
    """The features of every item group of a vector input.

    Raises:
        Unfit: there is no item group.
    """
    return [
        window.data.read_vector(layer, dataset.layers[layer].instantiate_vector_format(), group_idx=group)
        for layer, group in _some(layer_options(window, data_input))
    ]


def _some(options: Sequence[tuple[str, int]]) -> Sequence[tuple[str, int]]:
    if not options:
        raise UncacheableWindow("no complete item group")
    return options


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
        raise UncacheableWindow(f"item groups of unlike shapes: {', '.join(str(a.shape) for a in arrays)}")
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
        raise UncacheableWindow(f"properties that are no JSON: {error}") from error
    if repr(json.loads(payload)) != repr(document):
        raise UncacheableWindow("properties that JSON changes")
    return payload, b"vector %d" % len(groups)


def _feature(feature: Feature, window: Window) -> list[Any]:
    geometry = feature.geometry
    if geometry.time_range is not None or geometry.projection != window.projection:
        raise UncacheableWindow("features of another projection, or with times of their own")
    raw = shapely.to_wkb(geometry.shp)
    back = shapely.from_wkb(raw)
    if shapely.to_wkb(back) != raw or back.geom_type != geometry.shp.geom_type:
        raise UncacheableWindow(f"a geometry that WKB changes: {geometry.shp.geom_type}")
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


def crop_is_inside(crop: PixelBounds, window: PixelBounds) -> bool:
    """Whether a crop lies in the window."""
    return crop[0] >= window[0] and crop[1] >= window[1] and crop[2] <= window[2] and crop[3] <= window[3]
