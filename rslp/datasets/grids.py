"""Grids of rasters: where their pixels lie, where rslearn can store them, and reading a part of a file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import shapely
from pyproj import Transformer
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import Resampling, reproject
from rslearn.dataset import Window
from rslearn.utils.geometry import PixelBounds, Projection

Array = npt.NDArray[Any]
WGS84 = CRS.from_epsg(4326)
# Metres of a degree of latitude, and of one of longitude at the equator.
_DEGREE = 111_320.0
# Positions on two grids may differ by less than this many px for pixels to be copied; half a pixel is ambiguous.
_TOLERANCE = 0.499


class UnreadableFile(ValueError):
    """A file whose pixels can't be read; the message names it."""


class UnusableGrid(ValueError):
    """A raster that has no place on the ground, or one that rslearn can't store; the message says why."""


@dataclass(frozen=True)
class Grid:
    """The pixels of a raster, with rows from north to south.

    Attributes:
        crs: the coordinate reference system.
        x_size: width of a pixel in units of the CRS.
        y_size: height of a pixel, also positive.
        left: x of the outer edge of the first column.
        top: y of the outer edge of the northernmost row.
        width: number of columns.
        height: number of rows.
    """

    crs: CRS
    x_size: float
    y_size: float
    left: float
    top: float
    width: int
    height: int

    @property
    def projection(self) -> Projection:
        """The projection of rslearn with pixels of this size."""
        return Projection(self.crs, self.x_size, -self.y_size)

    @property
    def bounds(self) -> PixelBounds:
        """The nearest bounds that rslearn can store: whole numbers of pixels from the origin of the CRS."""
        column, row = round(self.left / self.x_size), round(-self.top / self.y_size)
        return (column, row, column + self.width, row + self.height)

    @property
    def transform(self) -> rasterio.Affine:
        """From column and row to coordinates of the CRS."""
        return rasterio.Affine(self.x_size, 0, self.left, 0, -self.y_size, self.top)

    @cached_property
    def box(self) -> shapely.Polygon:
        """The outline in coordinates of the CRS."""
        return shapely.box(
            self.left, self.top - self.height * self.y_size, self.left + self.width * self.x_size, self.top
        )

    @property
    def metres(self) -> tuple[float, float]:
        """Width and height of a pixel in metres."""
        if self.crs.is_geographic:
            middle = math.radians(self.top - self.height * self.y_size / 2)
            return self.x_size * _DEGREE * math.cos(middle), self.y_size * _DEGREE
        factor = self.crs.linear_units_factor[1]
        return self.x_size * factor, self.y_size * factor

    @property
    def shift(self) -> float:
        """Metres from the file's place to ``bounds``."""
        column, row, *_ = self.bounds
        width, height = self.metres
        return math.hypot((self.left / self.x_size - column) * width, (-self.top / self.y_size - row) * height)

    def part(self, column: int, row: int, width: int, height: int) -> Grid:
        """The grid of some of the pixels; the first column and row may be negative."""
        left, top = self.left + column * self.x_size, self.top - row * self.y_size
        return Grid(self.crs, self.x_size, self.y_size, left, top, width, height)

    def offset_of(self, other: Grid) -> tuple[int, int, float] | None:
        """Column and row of another grid's corner in this one, if pixels of the two match.

        Returns:
            Column, row and the distance in px that remains; None where the CRS or the pixel sizes differ, or where the
            distance is half a pixel somewhere.
        """
        if self.crs != other.crs:
            return None
        x, y = (other.left - self.left) / self.x_size, (self.top - other.top) / self.y_size
        column, row = round(x), round(y)
        drift = (other.x_size / self.x_size - 1) * other.width, (other.y_size / self.y_size - 1) * other.height
        rest = max(abs(x - column), abs(x - column + drift[0]), abs(y - row), abs(y - row + drift[1]))
        return (column, row, rest) if rest <= _TOLERANCE else None

    def cover(self, box: shapely.Geometry) -> tuple[int, int, int, int] | None:
        """Column, row, width, height of the pixels that an outline (in this CRS) touches; None if there are none."""
        left, bottom, right, top = box.bounds
        # A pixel that is touched by a rounding error alone is not touched.
        column = max(0, math.floor((left - self.left) / self.x_size + 1e-6))
        row = max(0, math.floor((self.top - top) / self.y_size + 1e-6))
        width = min(self.width, math.ceil((right - self.left) / self.x_size - 1e-6)) - column
        height = min(self.height, math.ceil((self.top - bottom) / self.y_size - 1e-6)) - row
        return (column, row, width, height) if width > 0 and height > 0 else None


@dataclass(frozen=True)
class RasterFile:
    """A raster file whose header was read.

    Attributes:
        path: the file.
        grid: its pixels.
        bands: band descriptions; None for bands without.
        dtype: data type of the values.
        nodata: the declared nodata value.
        flipped: whether the rows of the file run from south to north.
    """

    path: Path
    grid: Grid
    bands: tuple[str | None, ...] = field(default=(), compare=False)
    dtype: str = ""
    nodata: float | None = None
    flipped: bool = False

    def read(self, column: int, row: int, width: int, height: int, *, indexes: list[int] | None = None) -> Array:
        """Read ``C H W`` of some pixels, which lie in the file; rows from north to south.

        Raises:
            UnreadableFile: the file is damaged.
        """
        first = self.grid.height - row - height if self.flipped else row
        try:
            with rasterio.open(self.path) as file:
                values: Array = file.read(indexes, window=rasterio.windows.Window(column, first, width, height))
        except (RasterioError, OSError) as error:
            raise UnreadableFile(f"{self.path}: its pixels can't be read: {error.__cause__ or error}") from None
        return values[:, ::-1] if self.flipped else values

    def read_on(self, grid: Grid, fill: float) -> Array:
        """Read the first band on another grid, ``H W``, by the nearest pixel; ``fill`` outside of the file."""
        values = self.read(0, 0, self.grid.width, self.grid.height, indexes=[1])[0]
        target = np.full((grid.height, grid.width), fill, dtype=values.dtype)
        reproject(
            np.ascontiguousarray(values),
            target,
            src_transform=self.grid.transform,
            src_crs=self.grid.crs,
            dst_transform=grid.transform,
            dst_crs=grid.crs,
            resampling=Resampling.nearest,
            init_dest_nodata=False,
        )
        return target


def open_raster(path: Path) -> RasterFile:
    """Read the header of a raster file.

    Raises:
        UnusableGrid: it has no CRS, is rotated, or mirrored from east to west.
        rasterio.errors.RasterioIOError: it is no raster.
    """
    with rasterio.open(path) as file:
        transform, crs = file.transform, file.crs
        if crs is None:
            raise UnusableGrid("has no CRS, so that nobody knows where it lies; give it one (gdal_edit -a_srs EPSG:…)")
        if transform.is_identity:
            raise UnusableGrid("has a CRS but no transform, so that nobody knows where it lies")
        if abs(transform.b) > 1e-9 * abs(transform.a) or abs(transform.d) > 1e-9 * abs(transform.e):
            raise UnusableGrid("is rotated; rslearn stores grids along the axes of their CRS only: gdalwarp it first")
        if transform.a < 0:
            raise UnusableGrid("is mirrored: its columns run from east to west; gdalwarp it first")
        flipped = transform.e > 0
        top = transform.f + (file.height * transform.e if flipped else 0)
        grid = Grid(crs, transform.a, abs(transform.e), transform.c, top, file.width, file.height)
        return RasterFile(path, grid, tuple(file.descriptions), file.dtypes[0], file.nodata, flipped)


@cache
def _transformer(source: CRS, target: CRS) -> Transformer:
    return Transformer.from_crs(source.to_wkt(), target.to_wkt(), always_xy=True)


def transformed(shape: Any, source: CRS, target: CRS) -> Any:
    """A shapely geometry in another CRS, without a third dimension."""
    flat = shapely.force_2d(shape)
    if source == target:
        return flat
    transformer = _transformer(source, target)
    return shapely.transform(flat, lambda xy: np.column_stack(transformer.transform(xy[:, 0], xy[:, 1])))


def grid_of(window: Window) -> Grid:
    """The pixels of a window of a dataset."""
    projection, (x0, y0, x1, y1) = window.projection, window.bounds
    x, y = projection.x_resolution, projection.y_resolution
    return Grid(projection.crs, abs(x), abs(y), min(x0 * x, x1 * x), max(y0 * y, y1 * y), x1 - x0, y1 - y0)


def lon_lat(grid: Grid) -> tuple[float, float]:
    """Longitude and latitude of the middle of a grid, in degrees."""
    middle = transformed(grid.box.centroid, grid.crs, WGS84)
    return float(middle.x), float(middle.y)
