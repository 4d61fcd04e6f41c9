"""Random patterns: smooth fields, parcels, clouds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from rslp.example.scene import Array


def smooth(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    """Return a Gaussian random field of zero mean and unit variance.

    Args:
        rng: source of randomness.
        shape: ``… H W``; leading axes are independent fields.
        scale: correlation length, px.
    """
    step = max(1, int(scale / 4))
    coarse = tuple(shape[:-2]) + tuple(-(-n // step) + 1 for n in shape[-2:])
    sigma = (0.0,) * (len(shape) - 2) + (scale / step, scale / step)
    field = ndimage.gaussian_filter(rng.standard_normal(coarse), sigma, mode="wrap", truncate=3.0)
    # Divided by the expected, not the measured spread: a window then may be rather smooth, or rather rough.
    field *= max(1.0, 2.0 * np.sqrt(np.pi) * scale / step)
    if step > 1:
        # A wide field needs no fine grid: drawn coarsely and enlarged, it costs a hundredth.
        field = ndimage.zoom(field, (1,) * (len(shape) - 2) + (step, step), order=1)
    return np.asarray(field[..., : shape[-2], : shape[-1]])


def parcels(
    rng: np.random.Generator, size: int, *, width: tuple[float, float], length: tuple[float, float]
) -> npt.NDArray[np.int64]:
    """Return a map of farm parcels: strips across the window at some angle, cut into lengths that do not line up.

    Args:
        rng: source of randomness.
        size: edge length of the window, px.
        width: range of the strips' widths, px.
        length: range of the parcels' lengths along a strip, px.

    Returns:
        ``H W``: parcel numbers from 0. One strip and one parcel are centred on the window.
    """
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    bend = 1.2 * smooth(rng, (size, size), 12.0)
    across = x * np.cos(angle) + y * np.sin(angle) + bend
    along = -x * np.sin(angle) + y * np.cos(angle) + bend
    strip = np.searchsorted(_cuts(rng, size, width), across)
    numbers = np.zeros((size, size), dtype=np.int64)
    for which in np.unique(strip):
        inside = strip == which
        numbers[inside] = which * 1000 + np.searchsorted(_cuts(rng, size, length), along[inside])
    return np.unique(numbers, return_inverse=True)[1].reshape(size, size).astype(np.int64)


def _cuts(rng: np.random.Generator, size: int, step: tuple[float, float]) -> Array:
    """Return ascending positions with random steps over the window's diagonal, none near its centre."""
    first = rng.uniform(*step)
    centre = first * rng.uniform(0.42, 0.58)
    count = int(2 * size / step[0]) + 2
    after = centre + np.cumsum(np.r_[0.0, rng.uniform(*step, count)])
    before = centre - first - np.cumsum(np.r_[0.0, rng.uniform(*step, count)])
    return np.sort(np.r_[before, after])


def edges(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return where a pixel's right or lower neighbour belongs to another parcel, ``H W``."""
    edge = np.zeros(numbers.shape, dtype=bool)
    edge[:, :-1] |= numbers[:, :-1] != numbers[:, 1:]
    edge[:-1] |= numbers[:-1] != numbers[1:]
    return edge


def clouds(rng: np.random.Generator, dates: int, size: int, *, share: float, scale: float = 7.0) -> tuple[Array, Array]:
    """Return clouds and their shadows.

    Args:
        rng: source of randomness.
        dates: number of images.
        size: edge length, px.
        share: share of the images that have any cloud.
        scale: size of the clouds, px.

    Returns:
        Opacity and shade, both ``T H W`` in 0..1.
    """
    pad = size + 24
    field = 0.9 * smooth(rng, (dates, pad, pad), scale) + 0.3 * smooth(rng, (dates, pad, pad), scale / 4)
    cloudy = rng.random(dates) < share
    # The threshold decides the cover: 0.3 covers about a third of the image, 1.5 a few percent.
    threshold = np.where(cloudy, rng.uniform(0.3, 1.5, dates), 9.0)
    opacity = np.clip((field - threshold[:, None, None]) / 0.9, 0.0, 1.0) ** 0.7
    shift = rng.integers(6, 14)
    cloud = opacity[:, 12 : 12 + size, 12 : 12 + size]
    # The sun stands in the south (north of the tropics): shadows fall to the north and a little west.
    shade = opacity[:, 12 + shift - 2 : 12 + shift - 2 + size, 12 + shift // 3 : 12 + shift // 3 + size]
    return cloud, 0.6 * shade * (1 - cloud)
