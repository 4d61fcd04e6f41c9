"""Phenology: calendars of crops and other vegetation of the temperate north."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rslp.example.scene import Array

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A crop's year as (day of year, share of ground) points, joined by straight lines.

    Attributes:
        green: living leaves.
        dry: ripe straw, stubble.
        blossom: flowers that hide the leaves.
        upright: 1 for stalks that weaken the co-polarised echo (cereals), 0 for broad leaves that strengthen it.
        height: how much plant stands on the ground at most; scales the echo of the canopy.
    """

    green: Curve
    dry: Curve = ((1, 0.0),)
    blossom: Curve = ((1, 0.0),)
    upright: float = 0.0
    height: float = 1.0


def _points(text: str) -> Curve:
    """Read ``day:percent`` pairs."""
    pairs = (pair.split(":") for pair in text.split())
    return tuple((int(day), int(percent) / 100) for day, percent in pairs)


CROPS: dict[str, Crop] = {
    "winter_cereal": Crop(
        green=_points("1:28 60:33 90:55 120:86 150:90 170:50 188:10 200:3 300:6 366:20"),
        dry=_points("1:2 150:3 170:32 190:78 204:70 215:42 260:18 300:6"),
        upright=1.0,
    ),
    "rapeseed": Crop(
        green=_points("1:42 60:48 85:68 104:85 116:50 132:50 144:80 165:70 185:25 200:5 300:10 366:15"),
        dry=_points("1:2 165:6 190:55 205:50 240:20 300:5"),
        blossom=_points("98:0 112:42 130:40 143:0"),
        height=1.3,
    ),
    "spring_cereal": Crop(
        green=_points("1:5 82:4 105:20 130:70 155:90 182:72 200:25 216:3 366:8"),
        dry=_points("1:8 82:2 170:5 182:16 206:70 219:62 240:35 300:15 366:8"),
        upright=1.0,
    ),
    "maize": Crop(
        green=_points("1:5 128:4 150:20 175:65 200:92 236:90 255:62 270:25 281:3 366:5"),
        dry=_points("1:10 110:3 236:5 262:35 276:45 300:35 366:12"),
        height=1.6,
    ),
    "sugar_beet": Crop(
        green=_points("1:5 112:4 136:15 160:60 186:90 260:92 286:85 302:12 366:5"),
        dry=_points("1:5 112:2 300:8 366:5"),
        height=0.8,
    ),
    "grassland": Crop(
        green=_points("1:44 60:48 100:66 132:86 200:72 250:72 300:62 366:46"),
        dry=_points("1:24 100:12 200:16 300:18 366:24"),
        height=0.45,
    ),
}


def read(curve: Curve, days: Array) -> Array:
    """Return a curve's value at days of the year; the year before and after look the same."""
    x, y = np.array(curve).T
    return np.asarray(np.interp(days, x, y, period=366.0))


def leaves(days: Array) -> Array:
    """Return the share of leaves that a deciduous wood carries, 0..1, at days of the year."""
    return 1.0 / (1.0 + np.exp(-(days - 118.0) / 6.0)) - 1.0 / (1.0 + np.exp(-(days - 297.0) / 8.0))


def cuts(rng: np.random.Generator, days: Array) -> Array:
    """Return what mowing takes from a meadow at each day: about half just after a cut, nothing a month later."""
    loss = np.zeros_like(days)
    for day in (148, 205, 258):
        cut = day + rng.normal(0.0, 10.0)
        since = days - cut
        loss = np.maximum(loss, np.where((since >= 0) & (since < 35), 0.55 * (1 - since / 35.0), 0.0))
    return loss
