"""Live fuel moisture: Sentinel-2 and Sentinel-1 over shrubland; regression."""

from __future__ import annotations

import numpy as np

from rslp.example import sensors, spectra, texture
from rslp.example.crops import Climate
from rslp.example.scene import Array, Mark, Scene, Series, Site, pick, stream

MONTHS = (4, 5, 6, 7, 8, 9)
# Day of the year on which all plots are sampled (mid September), and the spread of a field crew's samples, percent.
SAMPLED, SPREAD = 258.0, 8.0
# Cover, lowest and highest moisture (percent of dry weight) of the fuels.
FUELS = {"chamise": (0.7, 55.0, 145.0), "sagebrush": (0.5, 60.0, 210.0), "manzanita": (0.6, 75.0, 180.0)}


def make(seed: int, site: Site) -> Scene:
    """Make one window: 16 x 16 px of 10 m around a sampled plot."""
    rng = stream(seed, site.dataset, site.index)
    climate = Climate.of(seed, site, MONTHS)
    shrub = str(rng.choice(list(FUELS)))
    cover, low, high = FUELS[shrub]
    cover = float(np.clip(cover + rng.normal(0.0, 0.08), 0.25, 0.9))
    drought = _Drought(rng, climate)
    truth = low + (high - low) * drought.wet(np.array([SAMPLED]))[0]
    recorded = float(np.clip(truth + rng.normal(0.0, SPREAD), 25.0, 300.0))
    surface = _surface(rng, site.size, cover, low + (high - low) * drought.wet(climate.dates.days), climate)
    power = _power(rng, site.size, cover, low + (high - low) * drought.wet(climate.dates.radar_days), climate)
    optical, radar = (sensors.present(rng, len(MONTHS), missing) for missing in (0.07, 0.05))
    return Scene(
        series=(
            Series(
                layer="sentinel2",
                bands=spectra.S2_BANDS,
                values=sensors.sentinel2(rng, surface, cloudy=0.1)[:, optical],
                times=pick(climate.dates.optical, optical),
            ),
            Series(
                layer="sentinel1",
                bands=spectra.S1_BANDS,
                values=sensors.sentinel1(rng, power)[:, radar],
                times=pick(climate.dates.radar, radar),
            ),
        ),
        marks=(Mark(ring=((site.size / 2, site.size / 2),), properties={"lfmc": round(recorded, 1), "shrub": shrub}),),
        recorded=np.array([recorded]),
        truth=np.array([truth]),
    )


class _Drought:
    """How a plot dries out over the summer, and whether a storm wets it again."""

    def __init__(self, rng: np.random.Generator, climate: Climate) -> None:
        self.turn = 220.0 + 1.5 * climate.early + rng.normal(0.0, 32.0)
        self.pace = rng.uniform(12.0, 26.0)
        self.flush = rng.uniform(0.75, 1.0)
        self.storm = rng.uniform(205.0, 250.0)
        self.relief = rng.uniform(0.2, 0.6) if rng.random() < 0.35 else 0.0

    def wet(self, days: Array) -> Array:
        """Return where between its lowest (0) and highest (1) moisture the plot is on each day."""
        drying = self.flush / (1.0 + np.exp((days - self.turn) / self.pace))
        rise = np.clip((days - self.storm) / 8.0, 0.0, 1.0) * np.exp(-np.clip(days - self.storm, 0, None) / 60.0)
        return np.asarray(drying + (self.flush - drying) * self.relief * rise)


def _surface(rng: np.random.Generator, size: int, cover: float, moisture: Array, climate: Climate) -> Array:
    """Return reflectance ``T C H W``: drier leaves absorb less in the short-wave infrared, and some turn brown."""
    shrub, soil, straw = spectra.s2("shrub", "soil", "straw")
    # Optical depth of leaf water relative to a leaf at 120 percent; strongest at 2190 nm, then 1610 nm, weak at 865 nm.
    water = np.array([0, 0, 0, 0.03, 0, 0.01, 0.02, 0.04, 0.55, 0.85, 0, 0.1])
    dryness = (120.0 - moisture) / 100.0
    leaves = shrub * np.exp(np.outer(dryness, water))
    brown = np.clip(0.35 * dryness, 0.0, 0.4)[:, None]
    leaves = leaves * (1 - brown) + straw * brown
    patchy = np.clip(cover * (1 + 0.18 * texture.smooth(rng, (size, size), 2.0)), 0.05, 0.97)
    ground = soil * climate.soil * rng.normal(1.0, 0.08)
    grass = np.clip((moisture - 90.0) / 150.0, 0.0, 0.5)[:, None]
    below = ground * (1 - grass) + spectra.s2("leaf")[0] * grass
    return np.asarray(leaves[:, :, None, None] * patchy + below[:, :, None, None] * (1 - patchy))


def _power(rng: np.random.Generator, size: int, cover: float, moisture: Array, climate: Climate) -> Array:
    """Return backscatter ``T 2 H W``: moister canopies scatter more, above all in vh."""
    patchy = np.clip(cover * (1 + 0.18 * texture.smooth(rng, (size, size), 2.0)), 0.05, 0.97)
    plants = patchy * (0.25 + moisture[:, None, None] / 160.0)
    rain = 0.5 * climate.rain[:, None, None]
    return sensors.canopy_echo(plants, np.array(0.4), rain, rng.normal(0.0, 0.8) * np.ones((size, size)))
