"""Simulate the instruments: digital numbers and dB, noise, clouds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from rslp.example import spectra
from rslp.example.scene import Array, at, day_of_year
from rslp.example.texture import clouds

YEAR = 2023
_HALF = [spectra.S2_BANDS.index(band) for band in ("B05", "B06", "B07", "B8A", "B11", "B12")]
_SIXTH = [spectra.S2_BANDS.index(band) for band in ("B01", "B09")]
_BLUE = np.array([0.9, 0.6, 0.4, 0.15, 0.35, 0.3, 0.25, 0.15, 0.05, 0.03, 1.2, 0.3])


@dataclass(frozen=True)
class Calendar:
    """The acquisition dates of a place.

    Attributes:
        optical: Sentinel-2, one a month.
        radar: Sentinel-1, each within a few days of the optical one, so that both fall into one time step.
    """

    optical: tuple[datetime, ...]
    radar: tuple[datetime, ...]

    @property
    def days(self) -> Array:
        """Days of the year of the optical dates."""
        return np.array([day_of_year(time) for time in self.optical], dtype=float)

    @property
    def radar_days(self) -> Array:
        """Days of the year of the radar dates."""
        return np.array([day_of_year(time) for time in self.radar], dtype=float)


def calendar(rng: np.random.Generator, months: tuple[int, ...]) -> Calendar:
    """Draw one Sentinel-2 and one Sentinel-1 date for each month (1..12)."""
    middle = np.array([day_of_year(datetime(YEAR, month, 15)) for month in months], dtype=float)
    optical = middle + rng.integers(-6, 7, len(months))
    radar = optical + rng.integers(-3, 4, len(months))
    return Calendar(
        tuple(at(YEAR, day, 10.4) for day in optical),
        tuple(at(YEAR, day, 5.3) for day in radar),
    )


def present(rng: np.random.Generator, dates: int, missing: float) -> npt.NDArray[np.bool_]:
    """Draw which dates were delivered, ``T``; each is absent with the given chance, but never more than half."""
    here = rng.random(dates) >= missing
    short = dates // 2 - int(here.sum())
    if short > 0:
        here[rng.choice(np.flatnonzero(~here), short, replace=False)] = True
    return here


def sentinel2(rng: np.random.Generator, surface: Array, *, cloudy: float = 0.22) -> npt.NDArray[np.uint16]:
    """Observe a surface as Sentinel-2 L2A delivers it.

    Args:
        rng: source of randomness.
        surface: reflectance ``T C H W``, bands as in ``S2_BANDS``.
        cloudy: share of dates with some cloud.

    Returns:
        Digital numbers (reflectance times 10 000, no offset), ``C T H W``.
    """
    dates, bands, height, _ = surface.shape
    # Single precision: twice as fast, and far finer than a digital number.
    image = _resolve(ndimage.gaussian_filter(surface.astype(np.float32), (0, 0, 0.45, 0.45), mode="nearest"))
    # What atmospheric correction leaves behind, and the view angle: a gain and a blue haze for each date.
    gain = rng.normal(1.0, 0.025, (dates, 1, 1, 1)) * rng.normal(1.0, 0.012, (dates, bands, 1, 1))
    image *= gain.astype(np.float32)
    image += (np.abs(rng.normal(0.0, 0.009, (dates, 1, 1, 1))) * _BLUE[:, None, None]).astype(np.float32)
    opacity, shade = (layer.astype(np.float32) for layer in clouds(rng, dates, height, share=cloudy))
    # Blue sky lights shadows; the farther into the infrared, the darker they are.
    light = np.linspace(0.75, 1.0, bands, dtype=np.float32)[None, :, None, None]
    image *= 1 - shade[:, None] * light
    top = (spectra.s2("cloud")[0] * rng.uniform(0.6, 1.0, (dates, 1))).astype(np.float32)
    image += opacity[:, None] * (top[:, :, None, None] - image)
    image += rng.standard_normal(image.shape, dtype=np.float32) * (0.0025 + 0.012 * np.abs(image))
    values: npt.NDArray[np.uint16] = np.clip(np.rint(image * 1e4), 1, 18_000).astype(np.uint16)
    return np.ascontiguousarray(values.transpose(1, 0, 2, 3))


def _resolve(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Coarsen the 20 m and 60 m bands and put them back on the 10 m grid."""
    dates, _, height, width = image.shape
    half = image[:, _HALF].reshape(dates, len(_HALF), height // 2, 2, width // 2, 2).mean(axis=(3, 5))
    image[:, _HALF] = half.repeat(2, axis=2).repeat(2, axis=3)
    image[:, _SIXTH] = ndimage.uniform_filter(image[:, _SIXTH], (1, 1, 6, 6), mode="nearest")
    return image


def sentinel1(rng: np.random.Generator, power: Array, *, looks: float = 9.0) -> npt.NDArray[np.float32]:
    """Observe backscatter as a terrain-corrected, multi-looked Sentinel-1 product.

    Args:
        rng: source of randomness.
        power: linear backscatter ``T 2 H W``, vv and vh.
        looks: equivalent number of looks; speckle is gamma-distributed with this shape.

    Returns:
        Backscatter in dB, ``2 T H W``.
    """
    speckle = rng.gamma(looks, 1.0 / looks, power.shape)
    # Resampling to the map grid correlates neighbours a little.
    speckle = ndimage.gaussian_filter(speckle, (0, 0, 0.4, 0.4), mode="nearest")
    calibration = 10.0 ** (rng.normal(0.0, 0.25, (power.shape[0], 1, 1, 1)) / 10.0)
    decibel = 10.0 * np.log10(np.maximum(power * speckle * calibration, 1e-4))
    return np.ascontiguousarray(decibel.astype(np.float32).transpose(1, 0, 2, 3))


def canopy_echo(plants: Array, upright: Array, moisture: Array, rough: Array) -> Array:
    """Return the backscatter of plants over soil, after the water-cloud model (Attema and Ulaby, 1978).

    Args:
        plants: amount of vegetation ``T H W``, 0 to about 2.
        upright: share of upright stalks, broadcastable; they weaken vv.
        moisture: soil moisture 0..1, broadcastable.
        rough: roughness of the soil in dB around its mean, broadcastable.

    Returns:
        Linear power, ``T 2 H W``.
    """
    through = np.exp(-1.5 * plants)
    soil_vv = 10.0 ** ((-13.5 + 4.5 * moisture + rough) / 10.0)
    soil_vh = 10.0 ** ((-22.5 + 3.5 * moisture + 1.3 * rough) / 10.0)
    leaf_vv = 10.0 ** ((-9.0 - 6.0 * upright) / 10.0)
    leaf_vh = 10.0 ** ((-14.0 - 4.0 * upright) / 10.0)
    vv = soil_vv * through + leaf_vv * (1 - through)
    vh = soil_vh * through + leaf_vh * (1 - through)
    return np.stack([vv, vh], axis=1)


def landsat(reflectance: Array, kelvin: Array) -> npt.NDArray[np.uint16]:
    """Return Landsat 8/9 level-1 digital numbers.

    Args:
        reflectance: top of atmosphere, ``9 H W``, the optical bands of ``LANDSAT_BANDS``.
        kelvin: brightness temperature ``H W``.

    Returns:
        Digital numbers ``11 1 H W``: reflectance = 2e-5 DN - 0.1, thermal radiance = 3.342e-4 DN + 0.1
        (USGS, Landsat 8-9 calibration and validation algorithms).
    """
    optical = (reflectance + 0.1) / 2e-5
    thermal = [
        (k1 / (np.exp(k2 / kelvin) - 1.0) - 0.1) / 3.342e-4 for k1, k2 in ((774.8853, 1321.0789), (480.8883, 1201.1442))
    ]
    numbers = np.concatenate([optical, np.stack(thermal)])
    stored: npt.NDArray[np.uint16] = np.clip(np.rint(numbers), 1, 65_535).astype(np.uint16)
    return stored[:, np.newaxis]
