"""Held-out ground against training ground, also between projections."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.warp import transform
from rslearn.dataset import Window
from rslearn.dataset.storage.file import FileWindowStorage
from rslearn.utils.geometry import Projection
from upath import UPath

from rslp.check.overlap import find_overlaps, is_placeless

UTM = Projection(CRS.from_epsg(32633), 10, -10)


def window(name: str, bounds: tuple[int, int, int, int], projection: Projection = UTM) -> Window:
    storage = FileWindowStorage(UPath(Path("nowhere")))
    return Window(storage=storage, group="g", name=name, projection=projection, bounds=bounds, time_range=None)


def square(x: int, y: int, size: int = 32) -> tuple[int, int, int, int]:
    return (44000 + x, -557904 + y, 44000 + x + size, -557904 + y + size)


@pytest.mark.parametrize(
    ("shift", "count"),
    [((0, 0), 1), ((16, 16), 1), ((31, 0), 1), ((32, 0), 0), ((0, -32), 0), ((32, 32), 0), ((500, 0), 0)],
)
def test_neighbours_share_an_edge_and_no_ground(shift: tuple[int, int], count: int) -> None:
    windows = {"a": {"train": [window("t", square(0, 0))], "val": []}, "b": {"val": [window("v", square(*shift))]}}
    assert sum(overlap.count for overlap in find_overlaps(windows)) == count


def test_the_same_ground_in_another_projection_is_found() -> None:
    x0, y0, _, _ = square(0, 0)
    (lon,), (lat,) = transform("EPSG:32633", "EPSG:3857", [x0 * 10.0], [y0 * -10.0])[:2]
    mercator = Projection(CRS.from_epsg(3857), 30, -30)
    column, row = int(lon / 30), int(lat / -30)
    there = window("v", (column, row, column + 16, row + 16), mercator)
    away = window("w", (column + 200, row, column + 216, row + 16), mercator)
    found = find_overlaps({"a": {"train": [window("t", square(0, 0))]}, "b": {"test": [there, away]}})
    assert [(o.dataset, o.split, o.trained, o.count, o.total, o.example) for o in found] == [
        ("b", "test", "a", 1, 2, ("g/v", "g/t"))
    ]


def test_a_dataset_is_held_against_itself_and_training_windows_against_nothing() -> None:
    train = [window("t", square(0, 0)), window("u", square(0, 0))]
    assert find_overlaps({"a": {"train": train}, "b": {"train": train}}) == []
    (own,) = find_overlaps({"a": {"train": train, "val": [window("v", square(8, 8)), window("w", square(99, 0))]}})
    assert (own.trained, own.count, own.share) == ("a", 1, 0.5)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=2, max_size=20))
def test_the_count_is_that_of_comparing_each_with_each(places: list[tuple[int, int]]) -> None:
    train, held = places[: len(places) // 2], places[len(places) // 2 :]
    windows = {
        "a": {
            "train": [window(str(i), square(*place)) for i, place in enumerate(train)],
            "val": [window(str(i), square(*place)) for i, place in enumerate(held)],
        }
    }
    # More than a hundredth of the square's ground.
    slow = sum(any(max(0, 32 - abs(x - u)) * max(0, 32 - abs(y - v)) > 11 for u, v in train) for x, y in held)
    sure = sum(any(max(0, 32 - abs(x - u)) * max(0, 32 - abs(y - v)) > 9 for u, v in train) for x, y in held)
    found = sum(overlap.count for overlap in find_overlaps(windows))
    assert slow <= found <= sure


def test_a_dataset_without_locations_is_recognised() -> None:
    nowhere = [window(str(i), (0, 0, 64, 64)) for i in range(6)]
    somewhere = [window(str(i), square(40 * i, 0)) for i in range(6)]
    assert is_placeless({"train": nowhere, "val": somewhere[:2]})
    assert not is_placeless({"train": somewhere, "val": nowhere[:2]})
    assert not is_placeless({"train": nowhere[:2], "val": []})
    assert not is_placeless({})


def test_a_window_beyond_its_projection_overlaps_nothing() -> None:
    lost = Projection(CRS.from_epsg(32633), 1e9, -1e9)
    windows = [window("t", (10, 10, 20, 20), lost), window("u", square(0, 0))]
    (own,) = find_overlaps({"a": {"train": windows, "val": windows}})
    assert (own.count, own.total, own.example) == (1, 2, ("g/u", "g/u"))


def at(name: str, lon: float, lat: float, epsg: int, size: int = 64) -> Window:
    """A window of 10 m pixels around a place."""
    (x,), (y,) = transform("EPSG:4326", f"EPSG:{epsg}", [lon], [lat])[:2]
    column, row = int(x // 10) - size // 2, int(y // -10) - size // 2
    return window(name, (column, row, column + size, row + size), Projection(CRS.from_epsg(epsg), 10, -10))


@pytest.mark.parametrize(
    ("lon", "lat", "epsg"), [(-45, -17, 32723), (0.5, -17, 32731), (179.0, -17, 32760), (10, 60, 32632)]
)
def test_a_window_across_the_180th_meridian_lies_where_it_lies(lon: float, lat: float, epsg: int) -> None:
    fiji = at("fiji", 180.0, -17.0, 32701)
    found = find_overlaps({"a": {"train": [fiji]}, "b": {"val": [at("there", lon, lat, epsg)]}})
    assert found == []


@pytest.mark.parametrize("lon", [179.999, -179.999, 180.0])
def test_what_lies_across_the_180th_meridian_is_found_from_both_sides(lon: float) -> None:
    fiji = at("fiji", 180.0, -17.0, 32701)
    (found,) = find_overlaps(
        {"a": {"train": [fiji]}, "b": {"val": [at("there", lon, -17.0, 32760 if lon > 0 else 32701)]}}
    )
    assert found.count == 1


def test_a_window_around_a_pole_is_on_no_other_ground() -> None:
    pole = at("pole", 0, -90, 3031, size=2000)
    away, near = at("away", 20, -60, 32734), at("near", 100, -89.97, 3031)
    (found,) = find_overlaps({"a": {"train": [pole]}, "b": {"val": [away, near]}})
    assert (found.count, found.example) == (1, ("g/near", "g/pole"))
