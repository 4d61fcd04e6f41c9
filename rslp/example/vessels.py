"""Vessels: one Landsat 8/9 image of the sea; detection of points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from rslp.example import sensors, spectra, texture
from rslp.example.scene import Array, Mark, Scene, Series, Site, at, stream

CLASSES = ("unknown", "vessel")
# Chance that a vessel is missing from the labels, and how far a label lies off, px.
UNSEEN, OFF = 0.05, 0.8
# Sub-pixels a pixel is drawn with, along each axis.
FINE = 2


@dataclass(frozen=True, kw_only=True)
class Sea:
    """What a block of windows shares: day, light, water."""

    day: float
    glint: float
    swell: float
    silt: float
    wind: float
    kelvin: float

    @classmethod
    def of(cls, seed: int, site: Site) -> Sea:
        """Draw the sea of a window's block."""
        rng = stream(seed, site.dataset, "block", site.block)
        day = float(rng.integers(20, 340))
        return cls(
            day=day,
            glint=float(rng.gamma(1.2, 0.09)),
            swell=float(rng.uniform(0.004, 0.016)),
            silt=float(rng.beta(1.2, 3.0)),
            wind=float(rng.uniform(0, np.pi)),
            kelvin=283.0 - 6.5 * np.cos(2 * np.pi * (day - 40) / 365.0),
        )


class Canvas:
    """A sea surface that things are painted on: reflectance on a fine grid, warmth on the pixel grid."""

    def __init__(self, rng: np.random.Generator, size: int, sea: Sea) -> None:
        fine = size * FINE
        base, silt, glint, foam = spectra.landsat("sea", "silt", "glint", "foam")
        y, x = np.mgrid[:fine, :fine] / FINE
        u = x * np.cos(sea.wind) + y * np.sin(sea.wind)
        waves = np.sin(2 * np.pi * (u + 2.0 * texture.smooth(rng, (fine, fine), 10.0)) / rng.uniform(4, 9))
        ripple = sea.swell * (0.35 * waves + 0.5 * texture.smooth(rng, (fine, fine), 2.0))
        slick = np.exp(0.5 * texture.smooth(rng, (fine, fine), 60.0))
        murk = np.clip(sea.silt * (1 + 0.8 * texture.smooth(rng, (fine, fine), 45.0)), 0.0, 1.0)
        caps = texture.smooth(rng, (fine, fine), 0.8) > rng.uniform(3.6, 4.4)
        self.fine, self.size = fine, size
        self.image = (
            base[:, None, None] * (1 - murk)
            + silt[:, None, None] * murk
            + glint[:, None, None] * (sea.glint * slick + ripple * 4.0)
            + foam[:, None, None] * 0.5 * ndimage.gaussian_filter(caps.astype(float), 0.6)
        )
        self.kelvin = sea.kelvin + 0.4 * texture.smooth(rng, (size, size), 25.0)

    def local(self, x: float, y: float, heading: float) -> tuple[Array, Array]:
        """Return each fine pixel's distance ahead of and beside a point (px), for something that heads somewhere."""
        rows, columns = (np.mgrid[: self.fine, : self.fine] + 0.5) / FINE
        ahead = (columns - x) * np.cos(heading) + (rows - y) * np.sin(heading)
        beside = -(columns - x) * np.sin(heading) + (rows - y) * np.cos(heading)
        return ahead, beside

    def paint(self, cover: npt.NDArray[np.floating[Any]], name: str, tone: float = 1.0) -> None:
        """Cover a share of the fine pixels with a surface."""
        rows, columns = np.flatnonzero((cover > 1e-3).any(1)), np.flatnonzero((cover > 1e-3).any(0))
        if len(rows):
            box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            part = cover[box]
            self.image[:, *box] *= 1 - part
            self.image[:, *box] += spectra.landsat(name)[0][:, None, None] * (tone * part)

    def warm(self, cover: Array, kelvin: float) -> None:
        """Change the temperature of what is covered."""
        coarse = cover.reshape(self.size, FINE, self.size, FINE).mean(axis=(1, 3))
        self.kelvin = self.kelvin + kelvin * coarse


def make(seed: int, site: Site) -> Scene:
    """Make one window: 128 x 128 px of 15 m with a point for every vessel."""
    rng = stream(seed, site.dataset, site.index)
    sea = Sea.of(seed, site)
    canvas = Canvas(rng, site.size, sea)
    places = _places(rng, site.size, int(rng.poisson(3.2)))
    for x, y in places:
        _vessel(rng, canvas, x, y)
    _distract(rng, canvas, places)
    _cumulus(rng, canvas, places)
    recorded = rng.random(len(places)) >= UNSEEN
    labels = places[recorded] + rng.normal(0.0, OFF, (int(recorded.sum()), 2))
    return Scene(
        series=(
            Series(
                layer="landsat",
                bands=spectra.LANDSAT_BANDS,
                values=_observe(rng, canvas),
                times=(at(sensors.YEAR, sea.day, 10.9),),
            ),
        ),
        marks=tuple(Mark(ring=((float(x), float(y)),), properties={"category": "vessel"}) for x, y in labels),
        recorded=labels,
        truth=places,
    )


def _places(rng: np.random.Generator, size: int, count: int) -> Array:
    """Draw positions ``N 2`` (x, y in px), clear of the edge and of each other."""
    places: list[Array] = []
    for _ in range(count * 20):
        spot = rng.uniform(10, size - 10, 2)
        if len(places) < count and all(np.hypot(*(spot - other)) > 22 for other in places):
            places.append(spot)
    return np.array(places).reshape(-1, 2)


def _vessel(rng: np.random.Generator, canvas: Canvas, x: float, y: float) -> None:
    """Draw a ship and, if it moves, its wake."""
    heading = rng.uniform(0, 2 * np.pi)
    length = float(np.clip(rng.lognormal(np.log(13.0), 0.35), 7.0, 24.0))
    width = max(length / rng.uniform(5.5, 7.0), 1.3)
    ahead, beside = canvas.local(x, y, heading)
    if rng.random() < 0.75:
        _wake(rng, canvas, ahead + length / 2, beside, width)
    taper = np.clip((length / 2 - ahead) / (0.25 * length), 0.0, 1.0)
    hull = (np.abs(ahead) < length / 2) & (np.abs(beside) < width / 2 * np.minimum(1.0, 0.3 + taper))
    deck = str(rng.choice(["rust", "grey", "white", "steel"], p=(0.35, 0.25, 0.2, 0.2)))
    canvas.paint(hull * 0.95, deck, float(rng.uniform(0.85, 1.35)))
    bridge = (np.abs(ahead + 0.36 * length) < 0.1 * length) & (np.abs(beside) < width * 0.45)
    canvas.paint(bridge * 0.9, "white")
    canvas.warm(hull.astype(float), float(rng.uniform(0.5, 4.0)))


def _wake(rng: np.random.Generator, canvas: Canvas, ahead: Array, beside: Array, width: float) -> None:
    """Draw foam behind the stern and the two arms of the bow wave."""
    behind = np.clip(-ahead, 0.0, None)
    moved = ahead < 0
    fade = np.exp(-behind / rng.uniform(10.0, 32.0)) * moved
    foam = np.exp(-((beside / (0.45 * width + 0.03 * behind)) ** 2)) * fade
    arms = np.exp(-(((np.abs(beside) - np.tan(0.26) * behind) / 0.7) ** 2)) * np.exp(-behind / 16.0) * moved
    speed = rng.uniform(0.3, 0.8)
    canvas.paint(np.clip(speed * foam + 0.12 * speed * arms, 0.0, 0.9), "foam")


def _distract(rng: np.random.Generator, canvas: Canvas, places: Array) -> None:
    """Draw what looks a bit like a vessel: platforms, some with a flare, and skerries."""
    for kind in ["platform"] * int(rng.poisson(0.25)) + ["skerry"] * int(rng.poisson(0.25)):
        x, y = rng.uniform(6, canvas.size - 6, 2)
        if len(places) and np.hypot(*(places - (x, y)).T).min() < 20:
            continue
        ahead, beside = canvas.local(x, y, rng.uniform(0, np.pi))
        if kind == "platform":
            half = rng.uniform(1.2, 2.6)
            canvas.paint(((np.abs(ahead) < half) & (np.abs(beside) < half)) * 0.7, "steel")
            if rng.random() < 0.5:
                flare = np.exp(-((ahead - half - 1) ** 2 + beside**2) / 1.2)
                canvas.image[5:7] += flare * np.array([0.5, 0.9])[:, None, None]
        else:
            shape = np.hypot(ahead / rng.uniform(3, 9), beside / rng.uniform(2, 5))
            shape = shape + 0.35 * texture.smooth(rng, shape.shape, 6.0)
            canvas.paint((shape < 1.0).astype(float), "rock")
            canvas.paint((shape < rng.uniform(0.3, 0.9)) * 0.8, "green")


def _cumulus(rng: np.random.Generator, canvas: Canvas, places: Array) -> None:
    """Draw fair-weather clouds with their shadows; they hide no vessel that is labelled."""
    if rng.random() > 0.4:
        return
    field = texture.smooth(rng, (canvas.fine, canvas.fine), 14.0)
    field = field + 0.4 * texture.smooth(rng, field.shape, 4.0)
    opacity = np.clip((field - rng.uniform(1.6, 2.6)) / 0.5, 0.0, 1.0)
    for x, y in places:
        ahead, beside = canvas.local(x, y, 0.0)
        opacity *= np.clip(np.hypot(ahead, beside) / 8.0 - 1.5, 0.0, 1.0)
    shade = np.roll(opacity, (-9 * FINE, -4 * FINE), (0, 1))
    canvas.image = canvas.image * (1 - 0.5 * shade)
    canvas.paint(opacity, "cloud")
    canvas.warm(opacity, -14.0)


def _observe(rng: np.random.Generator, canvas: Canvas) -> npt.NDArray[np.uint16]:
    """Bring the canvas to the sensor's grids: 15 m (B8), 30 m (other optical bands), 100 m (thermal)."""
    size = canvas.size
    pan = canvas.image[0].reshape(size, FINE, size, FINE).mean(axis=(1, 3))
    half = canvas.image.reshape(-1, size // 2, 2 * FINE, size // 2, 2 * FINE).mean(axis=(2, 4))
    # Two-fold enlargement by linear interpolation, as resampling to the 15 m grid does it.
    wide = ndimage.zoom(half, (1, 2, 2), order=1, mode="nearest", grid_mode=True)
    wide[0] = ndimage.gaussian_filter(pan, 0.4)
    air = spectra.AIR[:, None, None] * rng.normal(1.0, 0.06)
    image = (wide + air) * rng.normal(1.0, 0.01, (9, 1, 1))
    image = (
        image + rng.standard_normal(image.shape) * np.array([2.0, 1, 1, 1, 1, 1, 0.8, 0.8, 0.6])[:, None, None] * 1e-3
    )
    kelvin = ndimage.gaussian_filter(canvas.kelvin, 2.6) + 0.1 * rng.standard_normal((size, size))
    return sensors.landsat(image, kelvin)
