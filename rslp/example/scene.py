"""Content of one window in memory: images, labels, and the truth behind them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A window's place: where it lies, and in which split.

    Attributes:
        dataset: name of the example dataset.
        index: number of the window within its dataset; seeds everything random about it.
        block: number of its block; windows of one block are neighbours, share dates and climate, and one split.
        split: ``train``, ``val`` or ``test``.
        name: name of the window.
        epsg: code of its UTM zone.
        resolution: metres per pixel.
        bounds: left, top, right, bottom in pixels of that projection (y grows to the south).
    """

    dataset: str
    index: int
    block: int
    split: str
    name: str
    epsg: int
    resolution: int
    bounds: tuple[int, int, int, int]

    @property
    def size(self) -> int:
        """Edge length of the (square) window, px."""
        return self.bounds[2] - self.bounds[0]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Images of one sensor.

    Attributes:
        layer: name of the rslearn layer.
        bands: band names.
        values: ``C T H W``, in the dtype that is stored.
        times: start of each acquisition, ``T`` of them; an absent date is simply not there.
    """

    layer: str
    bands: tuple[str, ...]
    values: npt.NDArray[np.generic]
    times: tuple[datetime, ...]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vector label: a point (one coordinate pair) or a polygon's ring, in px from the window's top left corner."""

    ring: tuple[tuple[float, float], ...]
    properties: dict[str, str | float]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One window's content.

    Attributes:
        series: the images.
        marks: vector labels, or None if the label is a raster.
        raster: raster label ``H W``, or None.
        recorded: what the label says, in the form that ``oracle`` compares (class, value, points, class raster).
        truth: the same before mistakes of whoever recorded it.
    """

    series: tuple[Series, ...]
    marks: tuple[Mark, ...] | None = None
    raster: npt.NDArray[np.uint8] | None = None
    recorded: Array
    truth: Array


def stream(seed: int, *keys: str | int) -> np.random.Generator:
    """Return the random stream of one named thing; the same keys give the same numbers in any process."""
    words = [key if isinstance(key, int) else zlib.crc32(key.encode()) for key in keys]
    return np.random.default_rng([seed, *words])


def at(year: int, day_of_year: float, hour: float) -> datetime:
    """Return the UTC time of a (1-based) day of the year; days beyond its end run on into the next."""
    whole = int(np.floor(day_of_year))
    return datetime(year, 1, 1, tzinfo=UTC) + timedelta(days=whole - 1, seconds=int(hour * 3600))


def day_of_year(time: datetime) -> int:
    """Return the 1-based day of the year."""
    return time.timetuple().tm_yday


def pick(times: tuple[datetime, ...], kept: npt.NDArray[np.bool_]) -> tuple[datetime, ...]:
    """Return the times whose date was delivered."""
    return tuple(time for time, here in zip(times, kept, strict=True) if here)
