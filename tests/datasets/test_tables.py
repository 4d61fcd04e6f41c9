"""Images with a table of labels become datasets: points, polygons, whole chips; in every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import fiona
import numpy as np
import pyarrow as pa
import pytest
import shapely
from pyarrow import parquet

from tests.datasets.files import (
    BANDS,
    corner,
    features,
    lon_lat,
    made,
    pixels,
    square,
    windows_of,
    write_chips,
    write_geojson,
    write_tiff,
)

CROPS = ("wheat", "maize")


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def points(count: int = 24) -> list[dict[str, Any]]:
    """Points in the chips of ``write_chips``, two in each, in degrees."""
    rows = []
    for number in range(count):
        left, top = corner(number // 2)
        lon, lat = lon_lat(left + 45 + 50 * (number % 2), top - 85)
        crop, height = CROPS[number % 2], 1.5 * number
        rows.append({"id": f"p{number}", "lon": lon, "lat": lat, "crop": crop, "height": height, "farm": number // 4})
    return rows


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_points_of_a_csv_become_windows_around_them(tmp_path: Path, delimiter: str) -> None:
    write_chips(tmp_path)
    write_csv(tmp_path / "points.csv", points(), delimiter)
    labels = {"table": "points.csv", "column": "crop", "id": "id"}
    summary = made(tmp_path, task="classification", labels=labels, window={"size": 5})
    windows = windows_of(tmp_path / "dataset")
    assert sum(summary.windows.values()) == len(windows) == 24
    left, top = corner(1)
    # The point lies in column 4, row 8 of its chip, in the middle of its window.
    assert windows["p2"].bounds == (left / 10 + 2, -top / 10 + 6, left / 10 + 7, -top / 10 + 11)
    assert features(windows["p2"]) == [{"crop": "wheat", "id": "p2"}]
    assert summary.counts["wheat"]["train"] + summary.counts["wheat"]["val"] + summary.counts["wheat"]["test"] == 12


def test_numbers_become_a_regression_and_groups_stay_together(tmp_path: Path) -> None:
    write_chips(tmp_path)
    write_csv(tmp_path / "points.csv", points())
    labels = {"table": "points.csv", "column": "height", "id": "id"}
    split = {"by": "group", "column": "farm"}
    made(tmp_path, task="regression", labels=labels, window={"size": 4}, split=split)
    windows = windows_of(tmp_path / "dataset")
    assert features(windows["p3"]) == [{"height": 4.5, "id": "p3"}]
    assert len({(int(name[1:]) // 4, window.options["split"]) for name, window in windows.items()}) == 6
    assert "scale_factor: 0.1" in (tmp_path / "dataset.yaml").read_text()


def test_windows_that_overlap_are_in_one_split(tmp_path: Path) -> None:
    write_chips(tmp_path)
    write_csv(tmp_path / "points.csv", points())
    labels = {"table": "points.csv", "column": "crop", "id": "id"}
    # Blocks of 40 m part the two points of a chip; windows of 9 px around them overlap.
    made(tmp_path, path="a.b", task="classification", labels=labels, window={"size": 9}, split={"size_m": 40})
    windows = windows_of(tmp_path / "a.b")
    assert len({(int(name[1:]) // 2, window.options["split"]) for name, window in windows.items()}) == 12
    # A name that torch can give to a module.
    assert "a_b:" in (tmp_path / "a.b.yaml").read_text()


def test_a_column_may_name_the_split(tmp_path: Path) -> None:
    write_chips(tmp_path)
    write_csv(tmp_path / "chips.csv", [{"chip": f"c{n:02d}", "part": ("train", "val")[n % 2]} for n in range(12)])
    made(tmp_path, split={"by": "column", "table": "chips.csv", "column": "part"})
    windows = windows_of(tmp_path / "dataset")
    assert all(window.options["split"] == ("train", "val")[int(name[1:]) % 2] for name, window in windows.items())
    assert "split: test" not in (tmp_path / "dataset.yaml").read_text()


def test_rows_without_coordinates_label_whole_chips(tmp_path: Path) -> None:
    write_chips(tmp_path)
    write_csv(tmp_path / "chips.csv", [{"chip": f"c{n:02d}", "crop": CROPS[n % 2]} for n in range(12)])
    made(tmp_path, task="classification", labels={"table": "chips.csv", "column": "crop"})
    window = windows_of(tmp_path / "dataset")["c05"]
    assert features(window) == [{"crop": "maize"}]
    assert window.bounds[2] - window.bounds[0] == 16


def polygons() -> list[tuple[dict[str, Any] | None, dict[str, Any]]]:
    rows = []
    for number in range(12):
        left, top = corner(number)
        rows.append((square(left + 20, top - 30, 40), {"crop": "wheat", "id": number}))
        rows.append((square(left + 80, top - 80, 60), {"crop": "maize", "id": 100 + number}))
    return rows


def test_polygons_are_burnt_to_masks(tmp_path: Path) -> None:
    write_chips(tmp_path)
    rows = polygons()
    # A hole has no label.
    rows[0][0]["coordinates"].append(square(corner(0)[0] + 30, corner(0)[1] - 40, 20)["coordinates"][0])  # type: ignore[index]
    write_geojson(tmp_path / "fields.geojson", rows)
    made(tmp_path, labels={"table": "fields.geojson", "column": "crop", "id": "id", "classes": list(CROPS)})
    windows = windows_of(tmp_path / "dataset")
    expected = np.full((16, 16), 255)
    expected[3:7, 2:6], expected[8:14, 8:14] = 0, 1
    assert np.array_equal(pixels(windows["c05"], "label", ["label"])[0, 0], expected)
    expected[4:6, 3:5] = 255
    assert np.array_equal(pixels(windows["c00"], "label", ["label"])[0, 0], expected)


def test_the_ground_outside_of_polygons_may_be_a_class(tmp_path: Path) -> None:
    write_chips(tmp_path)
    write_geojson(tmp_path / "fields.geojson", polygons()[:20])
    labels = {"table": "fields.geojson", "column": "crop", "background": "other"}
    summary = made(tmp_path, labels=labels)
    assert list(summary.counts) == ["other", "maize", "wheat"]
    assert sum(summary.windows.values()) == 12
    assert (pixels(windows_of(tmp_path / "dataset")["c11"], "label", ["label"]) == 0).all()


@pytest.mark.parametrize("box_size", [None, 3])
def test_boxes_and_points_become_a_detection(tmp_path: Path, box_size: int | None) -> None:
    write_chips(tmp_path)
    rows = polygons()[:20]
    if box_size:
        rows = [({"type": "Point", "coordinates": shape["coordinates"][0][0]}, facts) for shape, facts in rows if shape]
    write_geojson(tmp_path / "ships.geojson", rows)
    labels = {"table": "ships.geojson", "column": "crop", "box_size": box_size}
    summary = made(tmp_path, task="detection", labels={k: v for k, v in labels.items() if v is not None})
    windows = windows_of(tmp_path / "dataset")
    # Images without an object are kept: they show what is none.
    assert sum(summary.windows.values()) == 12 and features(windows["c11"]) == []
    assert [facts["crop"] for facts in features(windows["c03"])] == ["wheat", "maize"]
    text = (tmp_path / "dataset.yaml").read_text()
    assert "classes: [background, maize, wheat]" in text and ("box_size: 3" in text) == (box_size == 3)


def test_a_field_in_several_chips_is_in_one_split(tmp_path: Path) -> None:
    write_chips(tmp_path)
    left, top = corner(0)
    whole = {
        "type": "Polygon",
        "coordinates": [[[left, top], [left + 20_000, top], [left + 20_000, top - 90], [left, top]]],
    }
    write_geojson(tmp_path / "fields.geojson", [(whole, {"crop": "wheat"}), *polygons()[20:]])
    labels = {"table": "fields.geojson", "column": "crop"}
    made(tmp_path, labels=labels, split={"size_m": 500, "shares": {"train": 0.6, "val": 0.4}})
    windows = windows_of(tmp_path / "dataset")
    assert len({windows[f"c{number:02d}"].options["split"] for number in range(6)}) == 1


def as_shapefile(path: Path, rows: list[dict[str, Any]], driver: str = "ESRI Shapefile") -> Path:
    schema = {"geometry": "Point", "properties": {"id": "str", "crop": "str"}}
    with fiona.open(path, "w", driver=driver, crs="EPSG:4326", schema=schema) as file:
        for row in rows:
            geometry = {"type": "Point", "coordinates": (row["lon"], row["lat"])}
            file.write({"geometry": geometry, "properties": {"id": row["id"], "crop": row["crop"]}})
    return path


def as_geoparquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    shapes = [shapely.to_wkb(shapely.Point(row["lon"], row["lat"])) for row in rows]
    table = pa.table({"id": [r["id"] for r in rows], "crop": [r["crop"] for r in rows], "geometry": shapes})
    geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB"}}}
    parquet.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)
    return path


def as_geojson(path: Path, rows: list[dict[str, Any]]) -> Path:
    pairs = [({"type": "Point", "coordinates": [r["lon"], r["lat"]]}, {"id": r["id"], "crop": r["crop"]}) for r in rows]
    return write_geojson(path, pairs, epsg=4326)


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


FORMATS = {
    "p.csv": write_csv,
    "p.geojson": as_geojson,
    "p.shp": as_shapefile,
    "p.gpkg": lambda path, rows: as_shapefile(path, rows, "GPKG"),
    "p.parquet": as_geoparquet,
    "plain.parquet": as_parquet,
}


def test_all_formats_say_the_same(tmp_path: Path) -> None:
    write_chips(tmp_path)
    results = []
    for name, write in FORMATS.items():
        write(tmp_path / name, points(12))
        labels = {"table": name, "column": "crop", "id": "id"}
        made(tmp_path, path=f"as_{name}", task="classification", labels=labels, window={"size": 4})
        windows = windows_of(tmp_path / f"as_{name}")
        results.append({(n, w.bounds, str(features(w)), w.options["split"]) for n, w in windows.items()})
    assert len(results[0]) == 12
    assert all(result == results[0] for result in results)


def test_all_dates_of_a_place_are_one_series(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scenes = {
        day: rng.integers(1, 4000, (6, 300, 300)).astype(np.uint16) for day in ("20220310", "20220412", "20220601")
    }
    for day, values in scenes.items():
        write_tiff(tmp_path / f"scenes/T43_{day}.tif", values, bands=BANDS)
    rows = []
    for number in range(24):
        lon, lat = lon_lat(500_000 + 120 * number + 55, 4_200_000 - 100 * number - 55)
        rows.append({"lon": lon, "lat": lat, "crop": CROPS[number % 2]})
    write_csv(tmp_path / "points.csv", rows)
    images = {"sentinel2_l2a": {"files": "scenes/{tile}_{date:%Y%m%d}.tif"}}
    made(
        tmp_path, images=images, task="classification", labels={"table": "points.csv", "column": "crop"},
        window={"size": 3},
    )  # fmt: skip
    windows = windows_of(tmp_path / "dataset")
    # The line of the file: the third point.
    values = pixels(windows["row000004"], "sentinel2_l2a", BANDS)
    assert values.shape == (6, 3, 3, 3)
    assert np.array_equal(values[:, 1], scenes["20220412"][:, 24:27, 28:31])
