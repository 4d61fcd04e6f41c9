"""Bootstrap over windows, or over blocks of ground where windows lie close together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rslp.runtime.seeds import stable_seed

LEVEL = 0.95
RESAMPLES = 1000
# Fewer where a metric sorts all its entries for each resample, such as millions of detections: so many in all.
MIN_RESAMPLES, MAX_ENTRIES = 200, 100_000_000
# Fewer units than this say little about how a value varies.
MIN_UNITS = 5
# Windows whose centres lie in one square of this side are resampled together: neighbours are alike, and resampled one
# by one they would make intervals too narrow.
BLOCK_METRES = 1000.0
_METRES_PER_DEGREE = 111_195.0
Unit = Literal["window", "block"]
Counts = npt.NDArray[np.int64]


def units(
    windows: Sequence[tuple[str, str]], places: Sequence[tuple[float, float]], *, side: float = BLOCK_METRES
) -> tuple[npt.NDArray[np.int64], Unit]:
    """The unit of resampling that each sample belongs to, as indices ``N``, and what the units are.

    Blocks are squares of a sinusoidal grid (Roberts et al. 2017 on why neighbours have to stay together). Samples of
    one window always stay together. Where there would be fewer than ``MIN_UNITS`` blocks, windows are units.

    Args:
        windows: group and name of each sample's window.
        places: longitude and latitude of each sample.
        side: side of a block (m).
    """
    place_of = dict(zip(reversed(windows), reversed(places), strict=True))
    block_of = {window: _block(*place, side=side) or window for window, place in place_of.items()}
    blocks = set(block_of.values())
    if MIN_UNITS <= len(blocks) < len(block_of):
        return _indices([block_of[window] for window in windows]), "block"
    return _indices(windows), "window"


def _block(longitude: float, latitude: float, *, side: float) -> tuple[int, int] | None:
    """Column and row of the block of a place; None for one that has no place on Earth."""
    if not (math.isfinite(longitude) and math.isfinite(latitude)):
        return None
    row = math.floor(latitude * _METRES_PER_DEGREE / side)
    middle = math.radians((row + 0.5) * side / _METRES_PER_DEGREE)
    return math.floor(longitude * math.cos(middle) * _METRES_PER_DEGREE / side), row


def _indices(keys: Sequence[Any]) -> npt.NDArray[np.int64]:
    """The position of each key among all of them, sorted, so that the order of samples has no effect."""
    positions = {key: index for index, key in enumerate(sorted(dict.fromkeys(keys), key=repr))}
    return np.array([positions[key] for key in keys], dtype=np.int64)


def resamples(
    unit_of: npt.NDArray[np.int64], *, seed_of: str, number: int = RESAMPLES
) -> Iterator[npt.NDArray[np.int64]]:
    """Bootstrap resamples: how often each sample occurs, ``N``; each unit is drawn with equal probability.

    Args:
        unit_of: the unit of each sample.
        seed_of: a text that seeds the draws; equal texts draw the same units.
        number: number of resamples.
    """
    generator = np.random.default_rng(stable_seed("resamples", seed_of))
    total = int(unit_of.max()) + 1
    for _ in range(number):
        yield generator.multinomial(total, np.full(total, 1 / total))[unit_of]


def percentile_intervals(
    values: Callable[[Counts], Mapping[str, float | None]],
    unit_of: npt.NDArray[np.int64],
    *,
    stated: Mapping[str, float | None],
    seed_of: str,
    entries: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals (Efron 1979) of the values of metrics, by name.

    A value has no interval if the recorded samples do not give the stated value again, if it is undefined in more
    than one in twenty resamples, or with fewer than ``MIN_UNITS`` units.

    Args:
        values: the values of the metrics for a resample.
        unit_of: the unit of each sample.
        stated: the values for all samples.
        seed_of: a text that seeds the draws.
        entries: how many entries a metric sorts for each resample.
    """
    number = min(RESAMPLES, max(MIN_RESAMPLES, MAX_ENTRIES // max(1, entries)))
    if not len(unit_of) or unit_of.max() + 1 < MIN_UNITS:
        return {}
    with warnings.catch_warnings():
        # torchmetrics warns of each resample without a sample of some class.
        warnings.simplefilter("ignore")
        again = values(np.ones(len(unit_of), dtype=np.int64))
        drawn = [values(counts) for counts in resamples(unit_of, seed_of=seed_of, number=number)]
    names = [name for name, value in stated.items() if _equal(value, again.get(name))]
    table = np.array([[np.nan if d[name] is None else d[name] for name in names] for d in drawn], dtype=np.float64)
    intervals = {}
    for name, column in zip(names, table.T, strict=True):
        defined = column[np.isfinite(column)]
        if len(defined) >= LEVEL * len(column):
            low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            intervals[name] = (float(low), float(high))
    return intervals


def _equal(value: float | None, other: float | None) -> bool:
    return value is not None and other is not None and math.isclose(value, other, rel_tol=1e-5, abs_tol=1e-8)
