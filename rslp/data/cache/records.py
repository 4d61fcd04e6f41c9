"""Records: one input of one whole window, decoded through rslearn, as bytes and back, bit for bit."""

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

TimeRange = tuple[datetime, datetime]

# These formats refuse another projection and crop by whole pixels.
_EXACT = (ImageTileRasterFormat, NumpyRasterFormat, SingleImageRasterFormat)
# A source's pixels may be up to this many times coarser: the centres of the window's pixels are then far enough from
# the edges of the source's pixels.
_MAX_FACTOR = 64
# Distance from the grid above which a source lies off it (px).
_OFF_GRID = 1e-4


class UncacheableWindow(Exception):
    """A window's input can't be held by a record; it is read from the dataset each time."""


@dataclass(frozen=True)
class ItemGroup:
    """One item group of a raster layer over a whole window.

    Attributes:
        image: ``C T H W``, in the dtype that the input asks for.
        times: the time range of each step, or None where rslearn finds none.
    """

    image: torch.Tensor
    times: list[TimeRange] | None


class GridCheckingFormat(RasterFormat):
    """Wraps a raster format and notes whether the sources lie on the requested grid of pixels.

    If they do, a crop that is cut out of the whole window equals the crop as rslearn would read it.

    Attributes:
        inner: the wrapped format.
        on_grid: whether all sources lay on the grid since this was last set to true.
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
        """Decode with the wrapped format."""
        if not self.on_grid or type(self.inner) in _EXACT:
            return self.inner.decode_raster(path, projection, bounds, resampling)
        observed: list[bool] = []
        with upstream.observe_rasters(lambda source: observed.append(_on_grid(source, projection))):
            decoded = self.inner.decode_raster(path, projection, bounds, resampling)
        # Sources of other formats, and those that were not observed, may lie off the grid.
        self.on_grid = type(self.inner) is GeotiffRasterFormat and bool(observed) and all(observed)
        return decoded


def _on_grid(source: DatasetReader, projection: Projection) -> bool:
    transform = source.transform
    if source.crs != projection.crs or transform.b or transform.d:
        return False
    for step, start, pixel in (
        (transform.a, transform.c, projection.x_resolution),
        (transform.e, transform.f, projection.y_resolution),
    ):
        factor, offset = step / pixel, start / pixel
        is_multiple = abs(factor - round(factor)) < 1e-9 and 1 <= round(factor) <= _MAX_FACTOR
        if not is_multiple or abs(offset - round(offset)) > _OFF_GRID:
            return False
    return True


def layer_options(window: Window, data_input: DataInput) -> list[tuple[str, int]]:
    """The item groups (layer, number) that rslearn reads, or of which it draws one, in its order.

    Raises:
        UncacheableWindow: there is none.
    """
    if data_input.load_all_item_groups:
        completed = window.list_completed_layers()
        options = [
            (layer, group)
            for layer in data_input.layers
            for group in sorted(group for name, group in completed if name == layer)
        ]
    else:
        named = [get_layer_and_group_from_dir_name(option) for option in data_input.layers]
        options = [option for option in named if window.is_layer_completed(*option)]
    if not options:
        raise UncacheableWindow("no complete item group")
    return options


def read_rasters(dataset: Dataset, window: Window, data_input: DataInput) -> list[ItemGroup]:
    """Read all item groups of a raster input over the whole window.

    Raises:
        UncacheableWindow: there is no item group, or one that rslearn would refuse.
    """
    options = layer_options(window, data_input)
    marking = upstream.with_nodata_marked(dataset, data_input)
    item_groups: dict[tuple[str, int], ItemGroup] = {}
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
            item_groups[layer, group] = ItemGroup(image, spans)
    return [item_groups[option] for option in options]


def read_vectors(dataset: Dataset, window: Window, data_input: DataInput) -> list[list[Feature]]:
    """Read the features of all item groups of a vector input.

    Raises:
        UncacheableWindow: there is no item group.
    """
    return [
        window.data.read_vector(layer, dataset.layers[layer].instantiate_vector_format(), group_idx=group)
        for layer, group in layer_options(window, data_input)
    ]


@dataclass(frozen=True)
class Head:
    """The head of a raster record: how its payload is decoded.

    Attributes:
        dtype: dtype of the payload.
        final: dtype of the input.
        shape: ``C T H W``, the item groups one after the other along T.
        steps: number of time steps of each item group.
        times: for each item group the time ranges of its steps, or None.
        all_times: the time ranges of all steps; None if an item group has none.
        crops: whether crops may be cut out of the window, since every source lies on its pixel grid.
    """

    dtype: np.dtype[Any]
    final: np.dtype[Any]
    shape: tuple[int, int, int, int]
    steps: tuple[int, ...]
    times: tuple[tuple[TimeRange, ...] | None, ...]
    all_times: tuple[TimeRange, ...] | None
    crops: bool

    def has_crop(self, crop: PixelBounds) -> bool:
        """Whether a crop (px from the window's corner) lies in the window, and may be cut out of it."""
        return self.crops and min(crop) >= 0 and crop[2] <= self.shape[3] and crop[3] <= self.shape[2]


def encode_raster(groups: Sequence[ItemGroup], *, narrow: Sequence[str], crops: bool) -> tuple[bytes, bytes]:
    """Payload and head of a raster input.

    Args:
        groups: the window's item groups in rslearn's order, in the dtype that the input asks for.
        narrow: dtypes that the sources may have; the narrowest one that keeps all values is stored.
        crops: whether every source lies on the window's pixel grid.

    Raises:
        UncacheableWindow: the item groups have different numbers of bands, or sizes.
    """
    arrays = [group.image.numpy() for group in groups]
    if len({(a.shape[0], *a.shape[2:]) for a in arrays}) != 1:
        raise UncacheableWindow(f"item groups of different shapes: {', '.join(str(a.shape) for a in arrays)}")
    stacked = np.concatenate(arrays, axis=1) if len(arrays) > 1 else np.ascontiguousarray(arrays[0])
    stored = _narrowed(stacked, narrow)
    head = {
        "dtype": stored.dtype.str,
        "final": stacked.dtype.str,
        "shape": stacked.shape,
        "steps": [a.shape[1] for a in arrays],
        "times": [
            None if group.times is None else [[start.isoformat(), end.isoformat()] for start, end in group.times]
            for group in groups
        ],
        "crops": crops,
    }
    return stored.tobytes(), json.dumps(head).encode()


def _narrowed(array: Array, dtypes: Sequence[str]) -> Array:
    for dtype in sorted(map(np.dtype, dtypes), key=lambda dtype: dtype.itemsize):
        if dtype.itemsize >= array.dtype.itemsize:
            break
        with np.errstate(invalid="ignore"):
            small = array.astype(dtype)
        # Compared bit by bit: a negative zero would be lost in an integer, and is equal to 0.
        if np.array_equal(small.astype(array.dtype).view(np.uint32), array.view(np.uint32)):
            return small
    return array


@lru_cache(maxsize=4096)
def parse_head(raw: bytes) -> Head:
    """Parse the head of a raster record; equal heads are parsed once."""
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
        None if None in times else tuple(span for group in times for span in group or ()),
        head["crops"],
    )


def decode_raster(
    payload: memoryview, head: Head, *, group: int | None, crop: tuple[int, int, int, int] | None
) -> RasterImage:
    """The image as rslearn would read it, ``C T H W``.

    Args:
        payload: the stored bytes.
        head: the record's head.
        group: number of the item group to read; None means all.
        crop: x0, y0, x1, y1 from the window's corner (px); None means the whole window.
    """
    image = np.ndarray(head.shape, head.dtype, payload)
    times = head.all_times
    if group is not None and len(head.steps) > 1:
        start = sum(head.steps[:group])
        image = image[:, start : start + head.steps[group]]
        times = head.times[group]
    if crop is not None:
        image = image[:, :, crop[1] : crop[3], crop[0] : crop[2]]
    # astype always copies: the map is read-only, and transforms write.
    return RasterImage(torch.from_numpy(image.astype(head.final, order="C")), None if times is None else list(times))


def encode_vector(groups: Sequence[Sequence[Feature]], window: Window) -> tuple[bytes, bytes]:
    """Payload and head of a vector input, from the features of each item group.

    Raises:
        UncacheableWindow: JSON or WKB would change the features.
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
    """The number of item groups of a vector record."""
    return int(head.removeprefix(b"vector "))
