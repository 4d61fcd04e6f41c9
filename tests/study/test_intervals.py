"""Estimates over seeds and windows: intervals cover as often as they say, p-values fit to them."""

from __future__ import annotations

import numpy as np
import pytest

from rslp.study.intervals import Estimate, estimate, holm

STUDIES, RESAMPLES = 800, 200


def simulated(seeds: int, windows: int, *, seed_sd: float, interaction: float, rng: np.random.Generator) -> Estimate:
    """An estimate of a true value of 0: a mean over windows, each of which has an effect of variance 1 / ``windows``.

    So windows add 1 to the variance of a value, and seeds ``seed_sd`` squared.
    """
    of_seeds = rng.normal(0, seed_sd, seeds)
    of_windows = rng.normal(0, np.sqrt(windows), windows)
    values = of_seeds[:, None] + of_windows[None, :] + rng.normal(0, interaction * np.sqrt(windows), (seeds, windows))
    counts = rng.multinomial(windows, np.full(windows, 1 / windows), RESAMPLES)
    return estimate(values.mean(axis=1), counts @ values.T / windows, units=windows)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(("seed_sd", "interaction"), [(1.0, 0.0), (1.0, 0.5), (0.3, 0.0), (3.0, 0.0)])
def test_95_percent_intervals_cover_about_as_often(seeds: int, seed_sd: float, interaction: float) -> None:
    """With a variance of seeds as large as that of windows (1), and with others."""
    rng = np.random.default_rng(seeds)
    found = [simulated(seeds, 60, seed_sd=seed_sd, interaction=interaction, rng=rng) for _ in range(STUDIES)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])  # type: ignore[operator]
    assert 0.92 <= covered <= 0.98
    assert all((one.p < 0.05) == (not one.low <= 0 <= one.high) for one in found)  # type: ignore[operator]


@pytest.mark.parametrize("seeds", [3, 5])
def test_percentiles_over_seeds_would_be_too_narrow(seeds: int) -> None:
    """Why the interval is not the plain bootstrap."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(500):
        values = rng.normal(0, 1, seeds)
        means = values[rng.integers(0, seeds, (400, seeds))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        covered.append(low <= 0 <= high)
    assert np.mean(covered) < 0.9


def test_what_an_interval_is_over() -> None:
    values, resampled = np.array([1.0, 2.0]), np.random.default_rng(0).normal(1.5, 0.1, (100, 2))
    assert estimate(values, resampled, units=30).over == "seeds and windows"
    assert estimate(values, resampled, units=30, unit="block").over == "seeds and blocks"
    assert estimate(values).over == "seeds"
    assert estimate(values[:1], resampled[:, :1], units=30).over == "windows"
    single = estimate(values[:1])
    assert (single.value, single.low, single.high, single.over, single.p) == (1.0, None, None, None, None)


def test_seeds_alone_are_a_t_test() -> None:
    """As scipy computes it."""
    from scipy import stats

    values = np.array([0.3, 0.1, 0.25, 0.4])
    found, test = estimate(values), stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))


def test_equal_arms_have_a_difference_of_0() -> None:
    found = estimate(np.zeros(3), np.zeros((10, 3)), units=20)
    assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)


def test_seeds_to_show_a_difference() -> None:
    found = estimate(np.array([-0.01, 0.012, 0.0, 0.005]))
    by_size = [found.seeds_to_show(size) for size in (0.1, 0.02, 0.01, 0.005)]
    assert by_size == sorted(by_size) and by_size[0] == 3 and by_size[-1] > 20  # type: ignore[type-var,operator]
    assert found.seeds_to_show(1e-4) is None
    # Windows' share of the variance does not shrink with seeds.
    resampled = np.random.default_rng(0).normal(0, 0.05, (500, 1)).repeat(4, axis=1)
    noisy = estimate(np.array([-0.01, 0.012, 0.0, 0.005]), resampled, units=50)
    assert noisy.seeds_to_show(0.01) is None and noisy.seeds_to_show(0.3) == 2


def test_the_number_of_seeds_has_the_power_it_promises() -> None:
    rng = np.random.default_rng(0)
    seeds = Estimate(0, 0, 0, "seeds", 1, 3, 0.02**2, 0.0, 0).seeds_to_show(0.015)
    assert seeds is not None
    for count, enough in ((seeds, True), (seeds // 2, False)):
        shown = np.mean([estimate(rng.normal(0.015, 0.02, count)).p < 0.05 for _ in range(2000)])  # type: ignore[operator]
        assert (shown >= 0.77) == enough


def test_holm_multiplies_by_the_number_of_p_values_that_are_left() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.5]) == [0.5]


def test_seeds_that_are_all_equal_give_no_interval_without_windows() -> None:
    found = estimate(np.array([0.4, 0.4, 0.4]))
    assert (found.low, found.high, found.over, found.p) == (None, None, None, None)
    # With windows, they vary alone.
    values = np.random.default_rng(0).normal(0.4, 0.1, (200, 1)).repeat(3, axis=1)
    found = estimate(np.array([0.4, 0.4, 0.4]), values, units=30)
    assert found.low is not None and found.low < 0.3
