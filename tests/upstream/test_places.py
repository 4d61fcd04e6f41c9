"""Places of pixels are those that rslearn computes; where a projection is not defined there is none."""

from __future__ import annotations

import pytest
import shapely
from rasterio.crs import CRS
from rslearn.const import WGS84_PROJECTION
from rslearn.train.model_context import SampleMetadata
from rslearn.utils.geometry import Projection, STGeometry

from rslp.errors import DataError
from rslp.helios.images.series import window_place
from rslp.upstream.places import place_of

FAR = (10**9, 0, 10**9 + 8, 8)


@pytest.mark.parametrize(
    ("epsg", "resolution", "bounds"),
    [
        (32631, 10, (50000, -500000, 50010, -499990)),
        (3857, 10, (10, 20, 30, 50)),
        (4326, 1e-4, (50000, 450000, 50010, 450010)),
        (5041, 10, (200000, -200000, 200008, -199992)),
    ],
)
def test_a_place_is_rslearns(epsg: int, resolution: float, bounds: tuple[int, int, int, int]) -> None:
    projection = Projection(CRS.from_epsg(epsg), resolution, -resolution)
    middle = shapely.Point((bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2)
    point = STGeometry(projection, middle, None).to_projection(WGS84_PROJECTION).shp
    assert place_of(projection, bounds) == pytest.approx((point.x, point.y), abs=1e-9)


def test_an_encoder_gets_no_place_that_there_is_not() -> None:
    projection = Projection(CRS.from_epsg(32631), 10, -10)
    metadata = SampleMetadata("g", "w", FAR, FAR, 0, 1, None, projection, "data")
    with pytest.raises(DataError, match="of window g/w have no place on the Earth in EPSG:32631"):
        window_place(metadata)
