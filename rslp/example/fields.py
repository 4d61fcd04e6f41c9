"""Land cover: five Sentinel-2 dates over a landscape; segmentation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from rslp.example import season, sensors, spectra, texture
from rslp.example.crops import Climate, grow
from rslp.example.scene import Array, Scene, Series, Site, pick, stream

CLASSES = ("water", "built_up", "forest", "grassland", "winter_crop", "spring_crop", "summer_crop")
MONTHS = (3, 5, 7, 8, 10)
# The label of a pixel that the mapper left out.
UNLABELLED = 255
# Chances that a parcel is left out, or gets a wrong class.
LEFT_OUT, WRONG = 0.06, 0.05
WATER, BUILT, FOREST, GRASS, WINTER, SPRING, SUMMER = range(len(CLASSES))
_CROPS = {
    GRASS: ("grassland",),
    WINTER: ("winter_cereal", "winter_cereal", "rapeseed"),
    SPRING: ("spring_cereal",),
    SUMMER: ("maize", "maize", "sugar_beet"),
}
_SHARES = (0.24, 0.3, 0.18, 0.28)


def make(seed: int, site: Site) -> Scene:
    """Make one window: 64 x 64 px of 10 m with a class for every pixel."""
    rng = stream(seed, site.dataset, site.index)
    climate = Climate.of(seed, site, MONTHS)
    numbers = texture.parcels(rng, site.size, width=(11.0, 22.0), length=(14.0, 34.0))
    uses = rng.choice(list(_CROPS), numbers.max() + 1, p=_SHARES)
    crops = [str(rng.choice(_CROPS[int(use)])) for use in uses]
    surface = grow(rng, numbers, crops, climate).surface
    truth = uses[numbers]
    _woods(rng, truth, surface, climate.dates.days)
    _village(rng, truth, surface)
    _water(rng, truth, surface)
    recorded = _survey(rng, truth, numbers)
    here = sensors.present(rng, len(MONTHS), 0.08)
    images = sensors.sentinel2(rng, surface, cloudy=0.25)[:, here]
    return Scene(
        series=(
            Series(layer="sentinel2", bands=spectra.S2_BANDS, values=images, times=pick(climate.dates.optical, here)),
        ),
        raster=recorded.astype(np.uint8),
        recorded=recorded.astype(float),
        truth=truth.astype(float),
    )


def _paint(surface: Array, cover: Array, spectrum: Array) -> None:
    """Replace a share of each pixel: ``cover`` is ``H W``, ``spectrum`` ``T C`` or ``C``."""
    colour = np.broadcast_to(spectrum, surface.shape[:2])[:, :, None, None]
    surface[:] = surface * (1 - cover) + colour * cover


def _woods(rng: np.random.Generator, truth: npt.NDArray[np.int64], surface: Array, days: Array) -> None:
    """Grow woods: blobs, each mostly deciduous or mostly evergreen."""
    size = truth.shape[0]
    wood = texture.smooth(rng, (size, size), 9.0) > rng.uniform(0.3, 1.1)
    kind = texture.smooth(rng, (size, size), 14.0) > rng.normal(0.0, 0.6)
    crowns = 1.0 + 0.13 * texture.smooth(rng, (size, size), 0.9)
    conifer, broadleaf, twigs = spectra.s2("conifer", "broadleaf", "twigs")
    leaf = season.leaves(days + rng.normal(0.0, 5.0))[:, None]
    # Conifers keep their needles, but stand darker under a low winter sun.
    needles = conifer * (0.8 + 0.25 * np.sin(np.pi * (days[:, None] - 20) / 365.0))
    for where, colour in ((wood & kind, leaf * broadleaf + (1 - leaf) * twigs), (wood & ~kind, needles)):
        _paint(surface, where.astype(float), np.zeros(12))
        surface += colour[:, :, None, None] * (where * crowns)
    truth[wood] = FOREST


def _village(rng: np.random.Generator, truth: npt.NDArray[np.int64], surface: Array) -> None:
    """Build a village or a farm: houses among gardens along streets. Two windows in three have one."""
    if rng.random() > 0.65:
        return
    size = truth.shape[0]
    x0, y0 = rng.uniform(0.1 * size, 0.9 * size, 2)
    y, x = np.mgrid[:size, :size]
    reach = rng.uniform(8.0, 17.0)
    near = np.hypot(x - x0, y - y0) + 3.0 * texture.smooth(rng, (size, size), 5.0)
    town = near < reach
    angle = rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    street = ((np.mod(u, 7.0) < 1.2) | (np.mod(v, 9.0) < 1.2)) & town
    roofs, asphalt, leaf = spectra.s2("roof", "asphalt", "leaf")
    houses = (texture.smooth(rng, (size, size), 0.8) > 0.15) & town & ~street
    tone = np.clip(1.0 + 0.3 * rng.standard_normal((size, size)), 0.5, 1.8)
    _paint(surface, 0.45 * town, leaf * 0.55)
    _paint(surface, 0.85 * street, asphalt)
    _paint(surface, 0.8 * houses, np.zeros(12))
    surface += roofs[:, None, None] * (0.8 * houses * tone)
    truth[town] = BUILT


def _water(rng: np.random.Generator, truth: npt.NDArray[np.int64], surface: Array) -> None:
    """Flood a lake or a winding river; a bit more than half of the windows have one."""
    size = truth.shape[0]
    y, x = np.mgrid[:size, :size]
    kind = rng.random()
    if kind > 0.6:
        return
    if kind > 0.3:
        x0, y0 = rng.uniform(0.1 * size, 0.9 * size, 2)
        depth = rng.uniform(6.0, 15.0) - np.hypot(x - x0, (y - y0) * rng.uniform(0.7, 1.6))
        depth = depth + 3.0 * texture.smooth(rng, (size, size), 6.0)
    else:
        angle, wave = rng.uniform(0, np.pi), rng.uniform(24.0, 50.0)
        u = (x - size / 2) * np.cos(angle) + (y - size / 2) * np.sin(angle)
        v = -(x - size / 2) * np.sin(angle) + (y - size / 2) * np.cos(angle)
        course = rng.uniform(-16, 16) + 6.0 * np.sin(2 * np.pi * u / wave + rng.uniform(0, 6))
        depth = rng.uniform(2.0, 5.0) - np.abs(v - course)
    wet = depth > 0
    murky = 1.0 + 0.5 * rng.random() + 0.06 * texture.smooth(rng, (size, size), 4.0)
    _paint(surface, ndimage.gaussian_filter(wet.astype(float), 0.4) * wet, np.zeros(12))
    surface += spectra.s2("water")[0][:, None, None] * (wet * murky)
    truth[wet] = WATER


def _survey(
    rng: np.random.Generator, truth: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Record a map as a mapper would: drawn a pixel off in places, a few parcels wrong or left out."""
    size = truth.shape[0]
    y, x = np.mgrid[:size, :size]
    dx, dy = np.rint(0.6 * texture.smooth(rng, (2, size, size), 8.0)).astype(int)
    recorded: npt.NDArray[np.int64] = truth[np.clip(y + dy, 0, size - 1), np.clip(x + dx, 0, size - 1)]
    farmed = np.isin(recorded, list(_CROPS))
    for number in range(numbers.max() + 1):
        chance = rng.random()
        where = farmed & (numbers == number)
        if chance < LEFT_OUT:
            recorded[where] = UNLABELLED
        elif chance < LEFT_OUT + WRONG:
            recorded[where] = rng.choice(list(_CROPS))
    return recorded
