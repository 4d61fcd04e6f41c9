"""Crop type: a year of Sentinel-2 and Sentinel-1 over a field; classification."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull

from rslp.example import season, sensors, spectra, texture
from rslp.example.scene import Array, Mark, Scene, Series, Site, pick, stream

CLASSES = tuple(season.CROPS)
# Shares of the crops; the first is the majority class.
SHARES = (0.28, 0.14, 0.14, 0.19, 0.12, 0.13)
MONTHS = tuple(range(1, 13))
# Share of fields whose farmer declared another crop than the one that grew.
WRONG = 0.05


@dataclass(frozen=True)
class Farmland:
    """Optical and radar signal of a landscape of parcels over a year.

    Attributes:
        surface: reflectance ``T C H W``.
        power: backscatter ``T 2 H W``, linear.
    """

    surface: Array
    power: Array


@dataclass(frozen=True, kw_only=True)
class Climate:
    """Dates and weather of a block of neighbouring windows.

    Attributes:
        dates: acquisition dates.
        early: how many days the season runs ahead.
        soil: factor on the soil's reflectance.
        rain: soil moisture 0..1 at each date.
    """

    dates: sensors.Calendar
    early: float
    soil: float
    rain: Array

    @classmethod
    def of(cls, seed: int, site: Site, months: tuple[int, ...]) -> Climate:
        """Draw the climate of a window's block."""
        rng = stream(seed, site.dataset, "block", site.block)
        return cls(
            dates=sensors.calendar(rng, months),
            early=float(rng.normal(0.0, 7.0)),
            soil=float(rng.uniform(0.75, 1.25)),
            rain=rng.beta(2.0, 2.5, len(months)),
        )


def grow(rng: np.random.Generator, numbers: npt.NDArray[np.int64], crops: list[str], climate: Climate) -> Farmland:
    """Let crops grow on parcels.

    Args:
        rng: source of randomness.
        numbers: parcel number of each pixel, ``H W``.
        crops: crop of each parcel.
        climate: dates and weather.

    Returns:
        The landscape's signal.
    """
    count = len(crops)
    shift = climate.early + rng.normal(0.0, 11.0, count)
    vigour = np.clip(rng.normal(0.95, 0.16, count), 0.5, 1.2)
    bright = climate.soil * rng.normal(1.0, 0.12, count)
    patchy = texture.smooth(rng, numbers.shape, 5.0)
    optical = _states(rng, crops, climate.dates.days, shift, vigour)
    radar = _states(rng, crops, climate.dates.radar_days, shift, vigour)
    fractions = _ground(optical, numbers, patchy)
    wet = (1.0 - 0.4 * climate.rain)[:, None, None]
    tilth = 1.0 + 0.05 * texture.smooth(rng, numbers.shape, 2.0)
    fractions[0] *= bright[numbers] * tilth * wet
    surface = spectra.mix(fractions, spectra.s2("soil", "leaf", "straw", "blossom"))
    height = np.array([season.CROPS[crop].height for crop in crops])
    plants = (radar[0] + 0.5 * radar[1] + radar[2]) * height[:, None]
    upright = np.array([season.CROPS[crop].upright for crop in crops])
    rough = rng.normal(0.0, 0.8, count)[numbers]
    power = sensors.canopy_echo(
        np.clip(plants.T[:, numbers] * (1 + 0.1 * patchy), 0.0, None),
        upright[numbers],
        climate.rain[:, None, None],
        rough,
    )
    return Farmland(surface, power)


def _states(rng: np.random.Generator, crops: list[str], days: Array, shift: Array, vigour: Array) -> Array:
    """Return green, dry and blossom shares of each parcel at each date, ``3 N T``."""
    states = np.zeros((3, len(crops), len(days)))
    for number, name in enumerate(crops):
        crop, own = season.CROPS[name], days + shift[number]
        green = season.read(crop.green, own) * vigour[number]
        if name == "grassland":
            green = green - green * season.cuts(rng, days)
        states[:, number] = green, season.read(crop.dry, own), season.read(crop.blossom, own)
    return states


def _ground(states: Array, numbers: npt.NDArray[np.int64], patchy: Array) -> Array:
    """Return shares of soil, leaf, straw and blossom, ``4 T H W``; patches of a field grow better than others."""
    leaf, straw, bloom = (state.T[:, numbers] for state in states)
    leaf = np.clip(leaf * (1 + 0.1 * patchy), 0.0, 0.97)
    bloom = np.clip(bloom * (1 + 0.1 * patchy), 0.0, 0.9)
    covered = np.maximum(leaf + straw + bloom, 1e-6)
    scale = np.minimum(1.0, 0.98 / covered)
    return np.stack([1 - covered * scale, leaf * scale, straw * scale, bloom * scale])


def hedges(farmland: Farmland, numbers: npt.NDArray[np.int64], days: Array) -> None:
    """Draw grassy, shrubby margins between parcels into the images."""
    margin = 0.6 * ndimage.gaussian_filter(texture.edges(numbers).astype(float), 0.5)
    green = 0.45 + 0.5 * season.leaves(days)
    leaf, twigs = spectra.s2("leaf", "twigs")
    hedge = green[:, None] * leaf * 0.8 + (1 - green[:, None]) * twigs
    farmland.surface[:] = farmland.surface * (1 - margin) + hedge[:, :, None, None] * margin
    farmland.power[:] = farmland.power * (1 - margin) + np.array([0.11, 0.03])[:, None, None] * margin


def make(seed: int, site: Site) -> Scene:
    """Make one window: 32 x 32 px of 10 m, the labelled field in the middle."""
    rng = stream(seed, site.dataset, site.index)
    climate = Climate.of(seed, site, MONTHS)
    numbers = texture.parcels(rng, site.size, width=(20.0, 30.0), length=(24.0, 48.0))
    middle = int(numbers[site.size // 2, site.size // 2])
    crops = [CLASSES[k] for k in rng.choice(len(CLASSES), int(numbers.max()) + 1, p=SHARES)]
    farmland = grow(rng, numbers, crops, climate)
    hedges(farmland, numbers, climate.dates.days)
    truth = CLASSES.index(crops[middle])
    recorded = int(rng.choice(len(CLASSES), p=SHARES)) if rng.random() < WRONG else truth
    optical = sensors.present(rng, len(MONTHS), 0.15)
    radar = sensors.present(rng, len(MONTHS), 0.04)
    images = sensors.sentinel2(rng, farmland.surface, cloudy=0.35)[:, optical]
    echoes = sensors.sentinel1(rng, farmland.power)[:, radar]
    return Scene(
        series=(
            Series(
                layer="sentinel2", bands=spectra.S2_BANDS, values=images, times=pick(climate.dates.optical, optical)
            ),
            Series(layer="sentinel1", bands=spectra.S1_BANDS, values=echoes, times=pick(climate.dates.radar, radar)),
        ),
        marks=(Mark(ring=_outline(numbers == middle), properties={"crop": CLASSES[recorded]}),),
        recorded=np.array([recorded]),
        truth=np.array([truth]),
    )


def _outline(inside: Array) -> tuple[tuple[float, float], ...]:
    """Return the convex outline of a field as a closed ring of pixel coordinates."""
    rows, columns = np.nonzero(inside)
    corners = np.concatenate([np.c_[columns + dx, rows + dy] for dx in (0, 1) for dy in (0, 1)]).astype(float)
    hull = corners[ConvexHull(corners).vertices]
    return tuple((float(x), float(y)) for x, y in np.r_[hull, hull[:1]])
