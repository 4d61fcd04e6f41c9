"""Dates of several sensors on one row of time steps."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rslp.helios.images.dates import Interval, align, legacy

TOLERANCE = timedelta(days=15)
NEW_YEAR = datetime(2023, 1, 1, tzinfo=UTC)


def on(*days: float) -> list[Interval]:
    """Intervals whose middles are so many days after New Year."""
    return [(NEW_YEAR + timedelta(days=day - 1), NEW_YEAR + timedelta(days=day + 1)) for day in days]


@pytest.mark.parametrize(
    ("a", "b", "steps", "in_a", "in_b"),
    [
        ((0, 31), (0, 31), 2, (0, 1), (0, 1)),
        ((0, 31), (5, 40), 2, (0, 1), (0, 1)),  # near ones share a step
        ((0, 31), (31,), 2, (0, 1), (1,)),  # one missing in the middle
        ((0,), (20,), 2, (0,), (1,)),  # too far apart
        ((20,), (0,), 2, (1,), (0,)),  # steps are in the order of time, not of modalities
        ((31, 0), (0, 31), 2, (1, 0), (0, 1)),  # and not of images
        ((0,), (14.9,), 1, (0,), (0,)),
        ((0,), (15,), 2, (0,), (1,)),  # the tolerance itself is too far
        ((10,), (9, 11.5), 2, (0,), (0, 1)),  # a step takes one image of a modality
        ((3, 3), (), 2, (0, 1), ()),  # two images of one day are two steps
        ((), (), 0, (), ()),
    ],
)
def test_table(
    a: tuple[float, ...], b: tuple[float, ...], steps: int, in_a: tuple[int, ...], in_b: tuple[int, ...]
) -> None:
    timeline = align({"a": on(*a), "b": on(*b)}, TOLERANCE)
    assert len(timeline.steps) == steps
    assert timeline.position == {"a": in_a, "b": in_b}


def test_a_step_is_day_month_from_zero_year() -> None:
    assert align({"a": on(0, 31 + 28 + 4)}, TOLERANCE).steps == ((1, 0, 2023), (5, 2, 2023))


def test_legacy_months() -> None:
    timeline = legacy({"a": 3, "b": 1})
    assert timeline.steps == ((1, 0, 2024), (1, 1, 2024), (1, 2, 2024))
    assert timeline.position == {"a": (0, 1, 2), "b": (0,)}


DAYS = st.lists(st.integers(0, 400), max_size=14)


@given(DAYS, DAYS, DAYS)
def test_laws(a: list[int], b: list[int], c: list[int]) -> None:
    days = {"a": a, "b": b, "c": c}
    timeline = align({name: on(*values) for name, values in days.items()}, TOLERANCE)
    used = {step for steps in timeline.position.values() for step in steps}
    assert used == set(range(len(timeline.steps)))
    when = [datetime(year, month + 1, day, tzinfo=UTC) for day, month, year in timeline.steps]
    assert when == sorted(when)
    for name, values in days.items():
        steps = timeline.position[name]
        assert len(set(steps)) == len(steps) == len(values)
        for day, step in zip(values, steps, strict=True):
            assert abs(when[step] - (NEW_YEAR + timedelta(days=day))) < TOLERANCE
