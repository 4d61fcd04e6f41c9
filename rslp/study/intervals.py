"""Estimates over seeds and windows together: intervals, p-values, Holm's correction, how many seeds would be enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from statsmodels.stats.multitest import multipletests

from rslp.evaluate.resampling import LEVEL

# By so much power a number of seeds is judged to be enough.
POWER = 0.8
MAX_SEEDS = 100
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval.

    Attributes:
        value: the mean.
        low: lower end of its 95 % interval; None where there is nothing to compute one from.
        high: the upper end.
        over: what varies in the interval: ``seeds``, ``windows`` or ``blocks`` of them, or both.
        p: two-sided p-value of the value being 0.
        seeds: number of seeds.
        seed_variance: variance of the value of one seed.
        window_variance: variance that more seeds would not make smaller.
        units: number of windows or blocks.
    """

    value: float
    low: float | None
    high: float | None
    over: str | None
    p: float | None
    seeds: int
    seed_variance: float
    window_variance: float
    units: int

    def seeds_to_show(self, difference: float) -> int | None:
        """How many seeds would show a difference of a size with a power of 80 %.

        None if 100 would not: then it takes more windows.
        """
        for seeds in range(2, MAX_SEEDS + 1):
            of_seeds = self.seed_variance / seeds
            error = math.sqrt(of_seeds + self.window_variance)
            df = _degrees_of_freedom(of_seeds, self.window_variance, seeds=seeds, units=self.units)
            if error == 0 or stats.nct.sf(stats.t.ppf((1 + LEVEL) / 2, df), df, abs(difference) / error) >= POWER:
                return seeds
        return None


def estimate(by_seed: Floats, resampled: Floats | None = None, *, units: int = 0, unit: str = "window") -> Estimate:
    """Estimate a mean over seeds.

    Seeds and windows are crossed random effects: each seed is evaluated on the same windows. The variance of the mean
    is the sum of that of seeds, by their spread, and that of windows, by a bootstrap in which all seeds share the
    resamples. The spread of seeds holds the interaction of both, which the bootstrap holds again (Owen 2007, "The
    pigeonhole bootstrap"): it is subtracted there. The interval is Student's, with the degrees of freedom of a sum of
    variances (Satterthwaite 1946, "An approximate distribution of estimates of variance components"): percentiles over
    three seeds would be far too narrow.

    Args:
        by_seed: the value of each seed on all windows, ``S``.
        resampled: the values on resamples, ``R S``; None if there are no predictions to resample.
        units: number of windows or blocks that were resampled.
        unit: ``window`` or ``block``.
    """
    seeds, value = len(by_seed), float(by_seed.mean())
    of_seeds = float(by_seed.var(ddof=1)) / seeds if np.ptp(by_seed) > 0 else 0.0
    of_windows = total = 0.0
    if resampled is not None and units > 1:
        # The bootstrap's variance is that of a sample of n, by n instead of n - 1.
        correction = units / (units - 1)
        means = resampled.mean(axis=1)
        total = correction * float(means.var(ddof=1))
        deviations = (resampled - means[:, None]).var(axis=0, ddof=1).sum()
        interaction = correction * float(deviations) / (seeds - 1) if seeds > 1 else 0.0
        of_windows = max(0.0, total - interaction / seeds)
    # Seeds that all give the same, such as those of a forest on few windows, say nothing of how sure a value is.
    varied = seeds > 1 and (of_seeds > 0 or resampled is not None)
    over = " and ".join([*["seeds"] * varied, *[f"{unit}s"] * (resampled is not None)]) or None
    error = math.sqrt(max(of_seeds + of_windows, total))
    low, high, p = None, None, None
    if over is not None:
        df = _degrees_of_freedom(of_seeds, of_windows, seeds=seeds, units=units)
        half = float(stats.t.ppf((1 + LEVEL) / 2, df)) * error
        low, high = value - half, value + half
        p = float(2 * stats.t.sf(abs(value) / error, df)) if error > 0 else float(value == 0)
    return Estimate(value, low, high, over, p, seeds, of_seeds * seeds, of_windows, units)


def _degrees_of_freedom(of_seeds: float, of_windows: float, *, seeds: int, units: int) -> float:
    """Satterthwaite's degrees of freedom of the sum of two estimated variances."""
    parts = of_seeds**2 / max(1, seeds - 1) + of_windows**2 / max(1, units - 1)
    if parts == 0:
        return float(max(1, seeds - 1, units - 1))
    return (of_seeds + of_windows) ** 2 / parts


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979), in the given order."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []
