"""Units of raw images: nodata, decibels, values outside of the configured units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from rslp.errors import DataError
from rslp.helios import encoders

Sentinel1Units = Literal["linear", "db"]
OpticalUnits = Literal["digital_numbers", "reflectance", "reflectance_8bit"]
# By what Sentinel-2's values are multiplied to become digital numbers, reflectance x 10000; 8 bits hold it x 255.
TO_DIGITAL = {"reflectance": 10_000.0, "reflectance_8bit": 10_000.0 / 255}

# Names of units in messages.
DIGITAL = "digital numbers"
REFLECTANCE = "reflectance 0-1"
EIGHT_BIT = "8-bit"
LINEAR = "linear power"
DECIBEL = "dB"
AMPLITUDE = "amplitude or digital numbers"
SCALED = "scaled integers"

# Inputs whose units can be told from their values: those of the table of encoders, and other usual names.
OPTICAL = encoders.names_of_kind(encoders.OPTICAL) | {"sentinel2", "sentinel2_l1c", "naip", "naip_10"}
RADAR = encoders.names_of_kind(encoders.RADAR)

# Nodata values of the usual products are -9999, -32768 and -99999; valid values of all modalities are far above.
NODATA_BELOW = -9999.0
# Digital numbers of Sentinel-2 and Landsat exceed 3 somewhere, reflectance never does.
MAX_REFLECTANCE = 3.0
# Power of Sentinel-1 is never negative, apart from tiny values that noise removal leaves, and not above 3 (5 dB) in all
# pixels and both polarisations; dB is never below -120.
MIN_POWER, MAX_POWER, MIN_DECIBELS = -1.0, 3.0, -120.0
_ZERO_IS_NODATA = frozenset(one.name for one in encoders.HELIOS.inputs)
# Well below the noise floor of Sentinel-1 (about -22 to -30 dB), so that a zero left by noise removal stays dark but
# does not become an outlier that dominates its patch.
FLOOR_DB = -50.0


@dataclass(frozen=True)
class Survey:
    """Nodata and range of an image.

    Attributes:
        nodata: None if every pixel is valid; else bool ``C T H W``, or ``1 T H W`` if the same in all bands.
        valid_dates: per date whether it has a valid pixel.
        low: the lowest valid value, NaN if there is none.
        high: the highest valid value, NaN if there is none.
    """

    nodata: torch.Tensor | None
    valid_dates: tuple[bool, ...]
    low: float
    high: float


def survey_image(modality: str, image: torch.Tensor) -> Survey:
    """Find the nodata pixels of an image and the range of its valid values.

    Args:
        modality: the modality's name.
        image: raw values ``C T H W``, float32.
    """
    if image.numel() == 0:
        return Survey(None, (False,) * image.shape[1], math.nan, math.nan)
    low, high = (value.item() for value in image.aminmax())
    # NaN makes both NaN, which compares as false: the quick way out is taken by images without nodata only.
    if low > NODATA_BELOW and high < math.inf and (low > 0 or high < 0 or modality not in _ZERO_IS_NODATA):
        return Survey(None, (True,) * image.shape[1], low, high)
    # The extrema over bands are C times smaller than the image and show NaN, infinity and nodata values, too.
    lows, highs = image.amin(dim=0), image.amax(dim=0)
    empty = (lows == 0) & (highs == 0) if modality in _ZERO_IS_NODATA else torch.zeros_like(lows, dtype=torch.bool)
    odd = ~(lows > NODATA_BELOW) | ~(highs < math.inf)
    if bool(odd.any()):
        nodata = ~((image > NODATA_BELOW) & (image < math.inf)) | empty
        measured = image[~nodata]
        valid_dates = tuple((~nodata).transpose(0, 1).flatten(1).any(dim=1).tolist())
        low, high = (measured.amin().item(), measured.amax().item()) if measured.numel() else (math.nan, math.nan)
        return Survey(nodata, valid_dates, low, high)
    if not bool(empty.any()):
        return Survey(None, (True,) * image.shape[1], lows.amin().item(), highs.amax().item())
    valid_dates = tuple((~empty).flatten(1).any(dim=1).tolist())
    low, high = (lows[~empty].amin().item(), highs[~empty].amax().item()) if any(valid_dates) else (math.nan, math.nan)
    return Survey(empty[None], valid_dates, low, high)


def to_decibels(power: torch.Tensor) -> torch.Tensor:
    """Turn linear backscatter power into dB, ``10 log10``; powers at or below the floor become ``FLOOR_DB``."""
    return 10 * torch.log10(power.clamp(min=10 ** (FLOOR_DB / 10)))


def likely_units(modality: str, low: float, high: float, *, whole: bool) -> str | None:
    """Name the units that a range of values looks like; None for modalities without known units.

    The limits are those of ``check_range``; besides, 8-bit numbers are whole and never exceed 255.

    Args:
        modality: the modality's name.
        low: the lowest value.
        high: the highest.
        whole: whether all values are whole numbers.
    """
    if modality in RADAR:
        if low > MAX_POWER:
            return AMPLITUDE
        if low < MIN_DECIBELS:
            return SCALED
        return DECIBEL if low < MIN_POWER else LINEAR
    if modality not in OPTICAL:
        return None
    if high <= MAX_REFLECTANCE:
        return REFLECTANCE
    return EIGHT_BIT if whole and high <= 255 else DIGITAL


def expected_units(modality: str, sentinel1_units: str, optical_units: str = "digital_numbers") -> str | None:
    """The units in which the normalisation expects a modality; None for modalities without known units."""
    if modality in RADAR:
        return DECIBEL if sentinel1_units == "db" else LINEAR
    if modality == "sentinel2_l2a" and optical_units in TO_DIGITAL:
        return REFLECTANCE if optical_units == "reflectance" else EIGHT_BIT
    return DIGITAL if modality in OPTICAL else None


def check_range(
    modality: str, survey: Survey, sentinel1_units: Sentinel1Units, optical_units: OpticalUnits = "digital_numbers"
) -> None:
    """Refuse values that cannot be in the expected units.

    Sentinel-2 and Landsat: digital numbers exceed 3 somewhere, reflectance never does; 8-bit numbers are whole and at
    most 255. Sentinel-1: power is never
    negative, apart from tiny values that noise removal leaves (tolerated down to -1), and not above 3 (5 dB) in all
    pixels and both polarisations; an image in dB has negative values, and none below -120.

    Args:
        modality: the modality's name; only Sentinel-1, Sentinel-2 and Landsat are checked.
        survey: range of the image; one without valid pixels passes.
        sentinel1_units: the configured units of Sentinel-1.
        optical_units: the configured units of Sentinel-2.

    Raises:
        DataError: the values contradict the units; the message says which units they look like.
    """
    low, high = survey.low, survey.high
    text = f"{modality} values lie in {low:.4g} .. {high:.4g}"
    if modality in ("sentinel2_l2a", "landsat"):
        _check_optical(modality, text, high, optical_units if modality == "sentinel2_l2a" else "digital_numbers")
    if modality != "sentinel1":
        return
    if low > MAX_POWER:
        raise DataError(f"{text}: neither linear power nor dB, this looks like amplitude or digital numbers")
    if sentinel1_units == "linear" and low < MIN_POWER:
        raise DataError(f"{text}: linear power is never negative, this looks like dB; set sentinel1_units to db")
    if sentinel1_units == "db" and low >= 0:
        raise DataError(f"{text}: dB has negative values, this looks like linear power; set sentinel1_units to linear")
    if sentinel1_units == "db" and low < MIN_DECIBELS:
        raise DataError(f"{text}: too low for dB, this looks like scaled integers")


def _check_optical(modality: str, text: str, high: float, units: OpticalUnits) -> None:
    """Refuse optical values, by the highest of them, that cannot be in the configured units."""
    if units == "digital_numbers" and high <= MAX_REFLECTANCE:
        hint = "; set optical_units to reflectance" if modality == "sentinel2_l2a" else ""
        message = f"{text}: this looks like reflectance, digital numbers (hundreds to thousands) are expected"
        raise DataError(message + hint)
    if units == "reflectance" and high > MAX_REFLECTANCE:
        raise DataError(f"{text}: reflectance is never above {MAX_REFLECTANCE:g}; set optical_units to their units")
    if units == "reflectance_8bit" and high > 255:
        raise DataError(f"{text}: 8-bit values are at most 255; set optical_units to digital_numbers")
    if units == "reflectance_8bit" and high % 1 > 0:
        raise DataError(f"{text}: 8-bit values are whole numbers; set optical_units to reflectance")
