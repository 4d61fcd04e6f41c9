"""Tell from an image's values in which units they are; pure arithmetic on ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIGITAL = "digital numbers"
REFLECTANCE = "reflectance 0-1"
EIGHT_BIT = "8-bit"
LINEAR = "linear power"
DECIBEL = "dB"
AMPLITUDE = "amplitude or digital numbers"
SCALED = "scaled integers"

OPTICAL = frozenset({"sentinel2_l2a", "sentinel2", "sentinel2_l1c", "landsat", "naip", "naip_10"})
RADAR = frozenset({"sentinel1"})
# Nodata markers of the usual products; no value of these sensors comes near.
NODATA_BELOW = -9999.0

# Since baseline 04.00 (25 January 2022) Sentinel-2's digital numbers carry an offset of 1000.
# Source: ESA, Sentinel-2 Products Specification Document, RADIO_ADD_OFFSET.
OFFSET = 1000.0
# Fewer windows than these may all be bright by chance.
FEW = 8


@dataclass(frozen=True)
class Range:
    """The measurements of some pixels.

    Attributes:
        low: the lowest, NaN if there is none.
        high: the highest.
        whole: whether all of them are whole numbers.
    """

    low: float
    high: float
    whole: bool

    def joined(self, other: Range) -> Range:
        """The range of both."""
        low, high = float(np.fmin(self.low, other.low)), float(np.fmax(self.high, other.high))
        return Range(low, high, self.whole and other.whole)

    @property
    def empty(self) -> bool:
        """Whether nothing was measured."""
        return bool(np.isnan(self.low))


NOTHING = Range(float("nan"), float("nan"), True)


def expected_units(modality: str, sentinel1_units: str) -> str | None:
    """What the normalisation of a modality takes; None where nothing is known."""
    if modality in RADAR:
        return DECIBEL if sentinel1_units == "db" else LINEAR
    return DIGITAL if modality in OPTICAL else None


def units_of(modality: str, values: Range) -> str | None:
    """Name the units that a range of values looks like.

    Optical: reflectance never exceeds 3, 8-bit numbers are whole and never exceed 255. Radar: power is never negative
    (apart from what noise removal leaves, down to -1), dB always is somewhere, and not below -120.

    Args:
        modality: the modality's name.
        values: what was measured in an image, or in one band of many.

    Returns:
        The name, or None where there is nothing to go by.
    """
    if values.empty:
        return None
    if modality in RADAR:
        return _radar(values)
    if modality not in OPTICAL:
        return None
    if values.high <= 3:
        return REFLECTANCE
    return EIGHT_BIT if values.whole and values.high <= 255 else DIGITAL


def _radar(values: Range) -> str:
    if values.low > 3:
        return AMPLITUDE
    if values.low < -120:
        return SCALED
    return DECIBEL if values.low < -1 else LINEAR


def offset_groups(darkest: Sequence[float]) -> tuple[int, int] | None:
    """Tell whether some windows carry Sentinel-2's offset of 1000 and others do not.

    The darkest pixel of a window (over all dates and bands) is near 0 to a few hundred, with the offset as much above
    1000. Two groups, apart by a gap of at least 400 around 1000, whose medians differ by about 1000, are a mixture,
    if the brighter one is as narrow as the other.

    Args:
        darkest: per window its darkest digital number; NaN where it has none.

    Returns:
        (windows with the offset, windows without), or None where there is no mixture.
    """
    values = np.sort(np.array([value for value in darkest if np.isfinite(value)], dtype=np.float64))
    low, high = values[values < OFFSET], values[values >= OFFSET]
    if min(len(low), len(high)) < max(2, 0.05 * len(values)):
        return None
    apart = high[0] - low[-1] >= 400 and abs(float(np.median(high) - np.median(low)) - OFFSET) < 400
    # Without the offset the brighter windows are like the others; bright ground (sand, snow, salt) is not.
    alike = float(np.mean(high - OFFSET <= low[-1] + 200)) >= 0.9
    return (len(high), len(low)) if apart and alike else None


def all_offset(darkest: Sequence[float]) -> bool:
    """Tell whether all windows may carry Sentinel-2's offset of 1000: none is ever darker.

    Water, shadow, dense green in the red, snow in the short-wave infrared are below 1000 without it; only ground that
    is bright in every band on every date (a sand desert) is not.

    Args:
        darkest: per window its darkest digital number, over all dates and bands; NaN where it has none.
    """
    values = np.array([value for value in darkest if np.isfinite(value)], dtype=np.float64)
    # Noise takes a few pixels of no reflectance a little below the offset.
    return (
        len(values) >= FEW and float(np.quantile(values, 0.05)) >= 0.97 * OFFSET and float(values.min()) > 0.8 * OFFSET
    )
