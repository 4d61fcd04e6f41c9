"""Units told from values: a table of facts, and laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rslp.check.reading import NO_VALUES, Range, all_offset, measure, offset_groups, units_of
from rslp.errors import DataError
from rslp.helios.images.units import (
    AMPLITUDE,
    DECIBEL,
    DIGITAL,
    EIGHT_BIT,
    LINEAR,
    REFLECTANCE,
    SCALED,
    OpticalUnits,
    Sentinel1Units,
    Survey,
    check_range,
    expected_units,
)


@pytest.mark.parametrize(
    ("modality", "low", "high", "whole", "units"),
    [
        ("sentinel2_l2a", 1, 9000, True, DIGITAL),
        ("sentinel2_l2a", 0.001, 1.4, False, REFLECTANCE),
        ("sentinel2_l2a", 0, 255, True, EIGHT_BIT),
        ("sentinel2_l2a", 0, 254.5, False, DIGITAL),
        ("landsat", 5000, 60000, True, DIGITAL),
        ("landsat", 0, 1, False, REFLECTANCE),
        ("sentinel1", -28, -2, False, DECIBEL),
        ("sentinel1", -28, 12, False, DECIBEL),
        ("sentinel1", 0.0002, 1.9, False, LINEAR),
        ("sentinel1", -0.01, 40, False, LINEAR),
        ("sentinel1", 30, 800, True, AMPLITUDE),
        ("sentinel1", -2500, -300, True, SCALED),
        ("worldcereal", 0, 100, True, None),
    ],
)
def test_units_are_named(modality: str, low: float, high: float, whole: bool, units: str | None) -> None:
    assert units_of(modality, Range(low, high, whole)) == units


@given(
    st.sampled_from(["sentinel2_l2a", "landsat", "sentinel1"]),
    st.sampled_from(["linear", "db"]),
    st.sampled_from(["digital_numbers", "reflectance", "reflectance_8bit"]),
    st.lists(
        st.one_of(st.floats(-200, 200), st.integers(0, 9000).map(float), st.sampled_from([-120.0, -1.0, 0.0, 3.0])),
        min_size=2,
        max_size=2,
    ),
)
def test_what_a_run_refuses_looks_like_other_units(
    modality: str, sentinel1_units: Sentinel1Units, optical_units: OpticalUnits, ends: list[float]
) -> None:
    low, high = sorted(ends)
    whole = low % 1 == 0 and high % 1 == 0
    try:
        check_range(modality, Survey(None, (True,), low, high), sentinel1_units, optical_units)
    except DataError:
        assert units_of(modality, Range(low, high, whole)) != expected_units(modality, sentinel1_units, optical_units)


def test_nothing_measured_has_no_units() -> None:
    assert units_of("sentinel1", NO_VALUES) is None


ranges = st.builds(
    lambda a, b, whole: Range(min(a, b), max(a, b), whole),
    st.floats(-1e4, 1e4),
    st.floats(-1e4, 1e4),
    st.booleans(),
)


@given(ranges, ranges)
def test_joining_ranges_is_symmetric_and_nothing_is_its_identity(one: Range, other: Range) -> None:
    assert one.joined(other) == other.joined(one)
    assert one.joined(NO_VALUES) == one
    assert one.joined(other).low <= min(one.low, other.low) <= max(one.high, other.high) <= one.joined(other).high


dark = st.lists(st.integers(0, 500), min_size=3, max_size=30)


@given(dark)
def test_an_offset_in_some_windows_is_counted_and_in_all_or_none_is_no_mixture(values: list[int]) -> None:
    assert offset_groups(values) is None
    assert offset_groups([value + 1000 for value in values]) is None
    assert offset_groups([*values, *(value + 1000 for value in values), math.nan]) == (len(values), len(values))


@pytest.mark.parametrize(
    ("darkest", "offset"),
    [
        ([1000 + 40 * i for i in range(16)], True),
        ([990.0] + [1010 + 40 * i for i in range(30)] + [math.nan], True),
        ([40 * i for i in range(16)], False),
        ([300.0] + [1010 + 40 * i for i in range(30)], False),
        ([900 + 10 * i for i in range(16)], False),
        ([1200.0] * 7, False),
        ([math.nan] * 20, False),
        ([], False),
    ],
)
def test_windows_that_are_never_dark_seem_to_carry_the_offset(darkest: list[float], offset: bool) -> None:
    assert all_offset(darkest) is offset


@given(st.lists(st.integers(0, 3000), min_size=60, max_size=80, unique=True))
def test_a_smooth_spread_of_dark_values_is_no_mixture(values: list[int]) -> None:
    ordered = sorted(values)
    if max(b - a for a, b in itertools.pairwise(ordered)) < 400:
        assert offset_groups(values) is None


def test_a_pixel_without_any_value_is_nodata_and_a_zero_in_one_band_is_not() -> None:
    image = np.full((2, 1, 2, 2), 500, dtype=np.uint16)
    image[:, 0, 0, 0] = 0
    image[0, 0, 1, 1] = 0
    stats = measure("sentinel2_l2a", image)
    assert stats.nodata == 0.25
    assert (stats.bands[0].low, stats.bands[1].low) == (0, 500)
    assert measure("elevation", image).nodata == 0
    marked = np.array([[[[np.nan, -9999.0], [-32768.0, 3.0]]]])
    assert measure("sentinel1", marked).nodata == 0.75
    assert measure("sentinel1", marked).whole == Range(3, 3, True)


@given(dark, st.lists(st.integers(1400, 4000), min_size=8, max_size=30))
def test_bright_ground_is_no_offset(values: list[int], bright: list[int]) -> None:
    # Sand or snow is not as evenly dark as what the offset lifts: it spreads far above.
    assert offset_groups([*values, *bright, 2500, *[value + 700 for value in bright]]) is None
