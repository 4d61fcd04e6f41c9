"""Read whole windows through rslearn, item group by item group, and note what the sources are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from rasterio.enums import Resampling
from rasterio.io import DatasetReader
from rslearn.dataset import Dataset, Window
from rslearn.dataset.window import get_layer_and_group_from_dir_name
from rslearn.train.dataset import DataInput, read_layer_time_range, read_raster_layer_groups_for_data_input
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import PixelBounds, Projection
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import (
    GeotiffRasterFormat,
    ImageTileRasterFormat,
    NumpyRasterFormat,
    RasterFormat,
    SingleImageRasterFormat,
)
from upath import UPath

from rslp.train import adapters

# These formats refuse another projection and crop by whole pixels.
_EXACT = (ImageTileRasterFormat, NumpyRasterFormat, SingleImageRasterFormat)
# Coarser sources up to this factor; a pixel's centre is then far enough from the edge of its source pixel.
_COARSEST = 64
_OFF_GRID = 1e-4


class Unfit(Exception):
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


class NotingFormat(RasterFormat):
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
        with adapters.watching_rasters(lambda source: fitting.append(_on_grid(source, projection))):
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
    marking = adapters.honouring_nodata(dataset, data_input)
    found: dict[tuple[str, int], ItemGroup] = {}
    for layer in dict.fromkeys(layer for layer, _ in options):
        groups = sorted({group for name, group in options if name == layer})
        images, times = read_raster_layer_groups_for_data_input(
            window, window.bounds, layer, groups, marking.layers[layer], data_input
        )
        layer_data: Any = None
        for group, image, spans in zip(groups, images, times, strict=True):
            if spans is None and image.shape[1] != 1:
                raise Unfit("several time steps without timestamps")
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
        raise Unfit("no complete item group")
    return options
