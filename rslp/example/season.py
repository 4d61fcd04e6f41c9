"""When things are green: the calendar of crops and of other vegetation of the temperate north."""

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


CROPS: dict[str, Crop] = {
    "winter_cereal": Crop(
        green=((1, 0.28), (60, 0.33), (90, 0.55), (120, 0.86), (150, 0.9), (170, 0.5), (188, 0.1), (200, 0.03), (300, 0.06), (366, 0.2)),
        dry=((1, 0.02), (150, 0.03), (170, 0.32), (190, 0.78), (204, 0.7), (215, 0.42), (260, 0.18), (300, 0.06)),
        upright=1.0,
    ),
    "rapeseed": Crop(
        green=((1, 0.42), (60, 0.48), (85, 0.68), (104, 0.85), (116, 0.5), (132, 0.5), (144, 0.8), (165, 0.7), (185, 0.25), (200, 0.05), (300, 0.1), (366, 0.15)),
        dry=((1, 0.02), (165, 0.06), (190, 0.55), (205, 0.5), (240, 0.2), (300, 0.05)),
        blossom=((98, 0.0), (112, 0.42), (130, 0.4), (143, 0.0)),
        height=1.3,
    ),
    "spring_cereal": Crop(
        green=((1, 0.05), (82, 0.04), (105, 0.2), (130, 0.7), (155, 0.9), (182, 0.72), (200, 0.25), (216, 0.03), (366, 0.08)),
        dry=((1, 0.08), (82, 0.02), (170, 0.05), (182, 0.16), (206, 0.7), (219, 0.62), (240, 0.35), (300, 0.15), (366, 0.08)),
        upright=1.0,
    ),
    "maize": Crop(
        green=((1, 0.05), (128, 0.04), (150, 0.2), (175, 0.65), (200, 0.92), (236, 0.9), (255, 0.62), (270, 0.25), (281, 0.03), (366, 0.05)),
        dry=((1, 0.1), (110, 0.03), (236, 0.05), (262, 0.35), (276, 0.45), (300, 0.35), (366, 0.12)),
        height=1.6,
    ),
    "sugar_beet": Crop(
        green=((1, 0.05), (112, 0.04), (136, 0.15), (160, 0.6), (186, 0.9), (260, 0.92), (286, 0.85), (302, 0.12), (366, 0.05)),
        dry=((1, 0.05), (112, 0.02), (300, 0.08), (366, 0.05)),
        height=0.8,
    ),
    "grassland": Crop(
        green=((1, 0.44), (60, 0.48), (100, 0.66), (132, 0.86), (200, 0.72), (250, 0.72), (300, 0.62), (366, 0.46)),
        dry=((1, 0.24), (100, 0.12), (200, 0.16), (300, 0.18), (366, 0.24)),
        height=0.45,
    ),
}  # fmt: skip


def read(curve: Curve, days: Array) -> Array:
    """Return a curve's value at days of the year; the year before and after look the same."""
    x, y = np.array(curve).T
    return np.interp(days, x, y, period=366.0)


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
