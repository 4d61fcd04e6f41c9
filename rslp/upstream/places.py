"""Where pixels of an rslearn projection lie on the Earth."""

from __future__ import annotations

from functools import lru_cache

from pyproj import Transformer
from rasterio.crs import CRS
from rslearn.utils.geometry import PixelBounds, Projection


@lru_cache(maxsize=65536)
def place_of(projection: Projection, bounds: PixelBounds) -> tuple[float, float]:
    """Longitude and latitude of the centre of bounds, which are in pixels of a projection."""
    x = (bounds[0] + bounds[2]) / 2 * projection.x_resolution
    y = (bounds[1] + bounds[3]) / 2 * projection.y_resolution
    longitude, latitude = _to_degrees(projection.crs).transform(x, y)
    return longitude, latitude


@lru_cache
def _to_degrees(crs: CRS) -> Transformer:
    return Transformer.from_crs(crs.to_wkt(), "EPSG:4326", always_xy=True)
