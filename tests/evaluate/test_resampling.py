"""The bootstrap: over windows, over blocks where windows lie close together, and the same in any order."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rslp.evaluate.resampling import (
    BLOCK_METRES,
    MIN_RESAMPLES,
    MIN_UNITS,
    RESAMPLES,
    percentile_intervals,
    resamples,
    units,
)

DEGREE = 111_195.0


def places(count: int, *, metres: float, latitude: float = 50.0) -> list[tuple[float, float]]:
    """Places along a meridian, from the middle of a block on."""
    first = (np.floor(latitude * DEGREE / BLOCK_METRES) + 0.5) * BLOCK_METRES
    return [(3.0, float((first + i * metres) / DEGREE)) for i in range(count)]


def windows(count: int) -> list[tuple[str, str]]:
    return [("g", f"w{i:04d}") for i in range(count)]


def test_windows_far_from_each_other_are_units() -> None:
    unit_of, unit = units(windows(20), places(20, metres=5000))
    assert unit == "window" and sorted(unit_of) == list(range(20))


def test_close_windows_are_resampled_together() -> None:
    unit_of, unit = units(windows(40), places(40, metres=250))
    assert unit == "block"
    assert len(set(unit_of)) == pytest.approx(40 * 250 / BLOCK_METRES, abs=1)
    assert list(unit_of) == sorted(unit_of)


def test_too_few_blocks_leave_windows_as_units() -> None:
    count = MIN_UNITS * 3
    assert units(windows(count), places(count, metres=50))[1] == "window"


def test_crops_of_one_window_stay_together() -> None:
    twice = [window for window in windows(6) for _ in range(2)]
    spread = places(12, metres=3000)
    unit_of, unit = units(twice, spread)
    assert unit == "window" and list(unit_of) == [i for i in range(6) for _ in range(2)]


def test_a_block_is_as_wide_in_the_north() -> None:
    """A degree of longitude is half as long there."""
    east = [(10 + i * 500 / (DEGREE * np.cos(np.radians(60))), 60.004) for i in range(40)]
    assert len(set(units(windows(40), east)[0])) == pytest.approx(20, abs=1)


def test_places_that_are_nowhere_are_units_of_their_own() -> None:
    assert units(windows(9), [(float("inf"), float("inf"))] * 9)[1] == "window"


def test_the_order_of_samples_has_no_effect() -> None:
    order = np.random.default_rng(0).permutation(30)
    names, spots = windows(30), places(30, metres=400)
    unit_of, _ = units(names, spots)
    mixed, _ = units([names[i] for i in order], [spots[i] for i in order])
    assert list(mixed) == [unit_of[i] for i in order]


def test_each_resample_has_as_many_units_and_equal_seeds_the_same() -> None:
    unit_of = np.array([0, 0, 1, 2, 2, 2])
    first, again = (list(resamples(unit_of, seed_of="d", number=5)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, list(resamples(unit_of, seed_of="e", number=5)))
    for counts in first:
        assert counts[0] == counts[1] and counts[0] + counts[2] + counts[3] == 3


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(1).normal(3, 1, 200)
    found = percentile_intervals(
        lambda counts: {"mean": float(counts @ values / counts.sum()), "other": 1.0, "rare": None},
        np.arange(200),
        stated={"mean": float(values.mean()), "other": 2.0, "rare": None, "absent": 0.5},
        seed_of="d",
    )
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert found == {"mean": pytest.approx((expected.low, expected.high), abs=0.02)}


def test_a_handful_of_windows_has_no_interval() -> None:
    stated = {"m": 1.0}
    values = lambda _: {"m": 1.0}  # noqa: E731
    assert percentile_intervals(values, np.arange(MIN_UNITS - 1), stated=stated, seed_of="d") == {}
    assert percentile_intervals(values, np.zeros(0, dtype=np.int64), stated=stated, seed_of="d") == {}
    assert percentile_intervals(values, np.arange(MIN_UNITS), stated=stated, seed_of="d") == {"m": (1.0, 1.0)}


def test_a_value_that_many_resamples_lack_has_no_interval() -> None:
    """Such as the recall of a class with a single window."""
    counts_of_first = lambda counts: {"m": 1.0 if counts[0] else None}  # noqa: E731
    assert percentile_intervals(counts_of_first, np.arange(20), stated={"m": 1.0}, seed_of="d") == {}


@pytest.mark.parametrize(("entries", "expected"), [(0, RESAMPLES), (200_000, 500), (10**9, MIN_RESAMPLES)])
def test_fewer_resamples_where_each_takes_long(entries: int, expected: int) -> None:
    calls = []
    values = lambda counts: calls.append(counts) or {"m": 1.0}  # type: ignore[func-returns-value]  # noqa: E731
    percentile_intervals(values, np.arange(9), stated={"m": 1.0}, seed_of="d", entries=entries)
    assert len(calls) == 1 + expected
