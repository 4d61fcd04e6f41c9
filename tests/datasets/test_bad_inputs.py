"""Mistakes in a user's files: each is one clear line with file and row, and nothing is written."""

# ruff: noqa: E501 (a table)

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fiona
import numpy as np
import pytest
import rasterio
import yaml

from rslp.errors import DiskError, UserError
from tests import children
from tests.datasets.files import (
    BANDS,
    corner,
    lon_lat,
    made,
    spec_of,
    square,
    windows_of,
    write_chips,
    write_geojson,
    write_tiff,
)

IMAGE, LABEL = "chips/c03_image.tif", "chips/c03_label.tif"
CSV = {"labels": {"table": "t.csv", "column": "crop"}, "task": "classification", "window": {"size": 4}}
FIELDS = {"labels": {"table": "t.geojson", "column": "crop"}}


@dataclass(frozen=True)
class Bad:
    """A mistake.

    Attributes:
        name: what it is.
        message: what must be said, a part of the one line.
        change: what is done to the folder that ``write_chips`` wrote.
        spec: what is changed in the file.
    """

    name: str
    message: str
    change: Callable[[Path], object] = lambda _: None
    spec: dict[str, Any] = field(default_factory=dict)


def image(folder: Path, **changes: Any) -> None:
    """Write another image of chip c03."""
    left, top = corner(3)
    values = changes.pop("values", np.ones((6, 16, 16), np.uint16))
    write_tiff(folder / IMAGE, values, **{"left": left, "top": top, "bands": BANDS, **changes})


def label(folder: Path, **changes: Any) -> None:
    left, top = corner(3)
    values = changes.pop("values", np.ones((1, 16, 16), np.uint8))
    write_tiff(folder / LABEL, values, **{"left": left, "top": top, **changes})


def table(*lines: str, name: str = "t.csv") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(*extra: str) -> list[str]:
    """Lines of a CSV with a point in each of two chips, and more."""
    lines = ["lon,lat,crop"]
    for number in range(6):
        lon, lat = lon_lat(corner(number)[0] + 75, corner(number)[1] - 75)
        lines.append(f"{lon},{lat},{('wheat', 'maize')[number % 2]}")
    return [*lines, *extra]


def fields(*extra: tuple[dict[str, Any] | None, dict[str, Any]], epsg: int = 32643) -> Callable[[Path], object]:
    pairs = [(square(corner(n)[0] + 20, corner(n)[1] - 20, 60), {"crop": ("wheat", "maize")[n % 2]}) for n in range(6)]
    return lambda folder: write_geojson(folder / "t.geojson", [*pairs, *extra], epsg=epsg)


def line(folder: Path) -> None:
    shape = {"type": "LineString", "coordinates": [[corner(3)[0], corner(3)[1]], [corner(3)[0] + 9, corner(3)[1] - 9]]}
    fields((shape, {"crop": "wheat"}))(folder)


def bow_tie(folder: Path) -> None:
    x, y = corner(3)
    ring = [[x, y], [x + 40, y - 40], [x + 40, y], [x, y - 40], [x, y]]
    fields(({"type": "Polygon", "coordinates": [ring]}, {"crop": "wheat"}))(folder)


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def swapped(folder: Path) -> None:
    lines = [line.split(",") for line in rows()[1:]]
    table("lon,lat,crop", *(f"{lat},{lon},{crop}" for lon, lat, crop in lines))(folder)


def no_prj(folder: Path) -> None:
    schema = {"geometry": "Point", "properties": {"crop": "str"}}
    with fiona.open(folder / "t.shp", "w", driver="ESRI Shapefile", schema=schema) as file:
        file.write({"geometry": {"type": "Point", "coordinates": (1.0, 2.0)}, "properties": {"crop": "wheat"}})


def layers(folder: Path) -> None:
    schema = {"geometry": "Point", "properties": {"crop": "str"}}
    for name in ("a", "b"):
        with fiona.open(folder / "t.gpkg", "w", driver="GPKG", schema=schema, layer=name, crs="EPSG:4326") as file:
            file.write({"geometry": {"type": "Point", "coordinates": (1.0, 2.0)}, "properties": {"crop": "wheat"}})


def rotated(folder: Path) -> None:
    with rasterio.open(folder / IMAGE, "r+") as file:
        file.transform = rasterio.Affine(10, 2, corner(3)[0], 2, -10, corner(3)[1])


def occupied(folder: Path) -> None:
    (folder / "dataset").write_text("a file")


def other_layers(folder: Path) -> None:
    made(folder)
    for number in range(12):
        left, top = corner(number)
        values = np.ones((3, 16, 16), np.uint16)
        write_tiff(folder / f"chips/c{number:02d}_image.tif", values, left=left, top=top, bands=BANDS[:3])


def damaged(folder: Path) -> None:
    """An image whose header is sound and whose last pixels are missing."""
    image(folder, bands=())
    os.truncate(folder / IMAGE, (folder / IMAGE).stat().st_size - 20)


def two_zones(folder: Path) -> None:
    left, top = corner(3)
    for day, epsg in (("20220101", 32643), ("20220201", 32644)):
        values = np.ones((6, 16, 16), np.uint16)
        write_tiff(folder / f"dates/c03_{day}.tif", values, left=left, top=top, epsg=epsg, bands=BANDS)


def other_zone(folder: Path) -> None:
    [x], [y] = rasterio.warp.transform("EPSG:32643", "EPSG:32642", [corner(3)[0]], [corner(3)[1]])
    label(folder, left=x, top=y, epsg=32642)


def objects(folder: Path) -> None:
    (folder / "chips/c03_field.tif").unlink()


S2 = {"files": "chips/{chip}_image.tif", "date": "2022-01-01"}


def images(**changes: Any) -> dict[str, Any]:
    return {"images": {"sentinel2_l2a": {**S2, **changes}}}


BAD = [
    # The file itself.
    Bad("unknown key", "pth: unknown key; did you mean path?", spec={"path": None, "pth": "x"}),
    *(Bad(f"the path {path!r}", f"path {path!r} has no name", spec={"path": path, "config": "x.yaml"})
      for path in (".", "..", "", "/")),
    Bad("a pattern in place of a mapping", "images: must be a mapping; got 'chips/{chip}_image.tif'",
        spec={"images": "chips/{chip}_image.tif"}),
    Bad("unknown key below", "images.sentinel2_l2a.filez: unknown key; did you mean files?", spec=images(filez="x")),
    Bad("unknown task", "task: must be 'classification', 'regression'", spec={"task": "segment"}),
    Bad("dates in the wrong order", "ends (2022-01-01) before it starts (2022-02-01)",
        spec=images(date=["2022-02-01", "2022-01-01"])),
    Bad("no date", "images.sentinel2_l2a: when were they taken? Set date:", spec=images(date=None)),
    Bad("shares", "split: shares must be positive numbers whose sum is 1", spec={"split": {"shares": {"train": 1, "val": 1}}}),
    Bad("raster labels of a detection", "label rasters make a segmentation or a per_pixel_regression; detection needs",
        spec={"task": "detection"}),
    Bad("unknown input", "the encoder helios has no such input; did you mean sentinel2_l2a?",
        spec={"images": {"sentinel2_l2": S2}}),
    Bad("unknown directive of a date", "{date:%Q}: %Q is not known in dates", spec=images(files="chips/{date:%Q}.tif")),
    # Images.
    Bad("no such files", "no file has a path of this pattern", spec=images(files="chip/{chip}_image.tif")),
    Bad("0 bytes", f"{IMAGE}: is empty (0 bytes)", lambda folder: (folder / IMAGE).write_bytes(b"")),
    Bad("no raster", f"{IMAGE}: can't be read as a raster", lambda folder: (folder / IMAGE).write_text("hello")),
    Bad("truncated", f"{IMAGE}: can't be read as a raster", truncate(IMAGE)),
    Bad("damaged pixels", f"{IMAGE}: its pixels can't be read", damaged),
    Bad("no CRS", f"{IMAGE}: has no CRS", lambda folder: image(folder, epsg=None)),
    Bad("rotated", f"{IMAGE}: is rotated", rotated),
    Bad("band missing in one file", f"{IMAGE}: has no band B12; did you mean B11?; its bands: B02", lambda folder: image(
        folder, values=np.ones((5, 16, 16), np.uint16), bands=BANDS[:5])),
    Bad("other number of bands", f"{IMAGE}: has 4 bands without names that fit", lambda folder: image(
        folder, values=np.ones((4, 16, 16), np.uint16), bands=())),
    Bad("band that the encoder lacks", "the encoder helios has no band B99", spec=images(bands=["B02", "B99"])),
    Bad("complex values", "its values are complex", lambda folder: image(folder, values=np.ones((6, 16, 16), np.complex64))),
    Bad("two files for one chip", "has the same keys and date as", lambda folder: shutil.copy(
        folder / IMAGE, folder / "chips/c03_image2.tif"), images(files="chips/{chip}_image*.tif")),
    Bad("two labels for one chip", "labels the same chip as", lambda folder: shutil.copy(
        folder / LABEL, folder / "chips/c03_label2.tif"), {"labels": {"files": "chips/{chip}_label*.tif"}}),
    Bad("different nodata values", "its files declare different nodata values: None, 7.0", lambda folder: image(folder, nodata=7)),
    Bad("dates in two CRS", "c03_20220201.tif: has the CRS EPSG:32644, but", two_zones,
        {"images": {"sentinel2_l2a": {"files": "dates/{chip}_{date:%Y%m%d}.tif"}}}),
    # Label rasters.
    Bad("label without an image", f"{LABEL}: there is no image with chip c03", lambda folder: (folder / IMAGE).unlink()),
    Bad("label elsewhere", f"{LABEL}: lies nowhere on its image", lambda folder: label(folder, left=900_000)),
    Bad("labels in another CRS", f"{LABEL}: has the CRS EPSG:32642, its images EPSG:32643", other_zone),
    Bad("label of another pixel size", f"{LABEL}: has pixels of 20 m, its images of 10 m", lambda folder: label(folder, size=20)),
    Bad("label half a pixel off", f"{LABEL}: lies half a pixel beside", lambda folder: label(folder, left=corner(3)[0] + 5)),
    Bad("label of two bands", f"{LABEL}: has 2 bands; a raster of labels has one", lambda folder: label(
        folder, values=np.ones((2, 16, 16), np.uint8))),
    Bad("unknown class", f"{LABEL}: has the class 9, which labels.classes lacks (1, 2, 3)", lambda folder: label(
        folder, values=np.full((1, 16, 16), 9, np.uint8))),
    Bad("too many classes", "; at most 255 are possible. Is the label a number?", lambda folder: [label(
        folder, values=np.arange(256, dtype=np.uint16).reshape(1, 16, 16) + 300)], {"labels": {"files": "chips/{chip}_label.tif"}}),
    Bad("truncated label", f"{LABEL}: its pixels can't be read", lambda folder: os.truncate(folder / LABEL, (folder / LABEL).stat().st_size - 20)),
    Bad("no raster of objects", f"{LABEL}: has no raster of objects", objects, {
        "task": "classification", "window": {"size": 4}, "labels": {**spec_of()["labels"], "objects": "chips/{chip}_field.tif"}}),
    Bad("objects without a size", "window.size: is missing", spec={
        "task": "classification", "labels": {**spec_of()["labels"], "objects": "chips/{chip}_field.tif"}}),
    # Tables.
    Bad("no table", "t.csv: no such file", spec=CSV),
    Bad("empty table", "t.csv: has no rows", table("lon,lat,crop"), CSV),
    Bad("0 bytes of a table", "t.csv: is empty (0 bytes)", lambda folder: (folder / "t.csv").write_bytes(b""), CSV),
    Bad("unknown ending", "tables end in .csv", table("x", name="t.xlsx"), {**CSV, "labels": {"table": "t.xlsx", "column": "crop"}}),
    Bad("missing column", "t.csv: has no column 'crop'; did you mean crops?", table(*rows()[:0], "lon,lat,crops", "76,37,x"), CSV),
    Bad("no latitude", "t.csv: has no column 'lat'; did you mean latt?", table("lon,latt,crop", "76,37,x"), CSV),
    Bad("no coordinates", "t.csv: has no coordinates (columns lon, lat), and no column that is a key", table("x,crop", "1,x"), CSV),
    Bad("points without a size", "window.size: is missing: the side of the window around each row", table(*rows()), {**CSV, "window": {}}),
    Bad("no number", "t.csv:8: lon, lat: 'east', '37' are no numbers", table(*rows("east,37,wheat")), CSV),
    Bad("a value too few", "t.csv:8: does not have 3 values", table(*rows("76,37")), CSV),
    Bad("no label", "t.csv:8: has no value in the column 'crop'", table(*rows("76,37,")), CSV),
    Bad("not finite", "t.csv:8: its coordinates are no finite numbers", table(*rows("nan,37,wheat")), CSV),
    Bad("latitude beyond the pole", "t.csv:8: its latitude 97 is not between -90 and 90", table(*rows("37,97,wheat")), CSV),
    Bad("lon and lat swapped", "none of its 6 rows lies in an image, e.g. ", swapped, CSV),
    Bad("not UTF-8", "t.csv: can't be read", lambda folder: (folder / "t.csv").write_bytes(b"lon,lat,crop\n76,37,bl\xe9\n"), CSV),
    Bad("labels outside of images", "t.csv: none of its 1 rows lies in an image, e.g. ", table("lon,lat,crop", "10,50,wheat"), CSV),
    Bad("no number for a regression", "t.csv:2: its label 'wheat' is no number", table(*rows()), {**CSV, "task": "regression"}),
    Bad("one class", "a classification needs two classes; there is wheat", table(*rows()[:2]), CSV),
    Bad("null geometry", "t.geojson: row 7: has no geometry (null)", fields((None, {"crop": "wheat"})), FIELDS),
    Bad("a line", "t.geojson: row 7: is a line", line, FIELDS),
    Bad("a bow-tie", "t.geojson: row 7: its polygon is not valid: Self-intersection", bow_tie, FIELDS),
    Bad("antimeridian", "t.geojson: row 1: it crosses the antimeridian", lambda folder: write_geojson(
        folder / "t.geojson", [({"type": "Polygon", "coordinates": [[[-179, 50], [179, 50], [179, 49], [-179, 50]]]}, {"crop": "wheat"})], epsg=4326), FIELDS),
    Bad("broken GeoJSON", "t.geojson: can't be read", table("{", name="t.geojson"), FIELDS),
    Bad("shapefile without CRS", "t.shp: has no CRS; say which with labels.crs", no_prj, {"labels": {"table": "t.shp", "column": "crop"}}),
    Bad("no CRS by name", "labels.crs: 'EPSG:99' is no CRS", fields(), {"labels": {**FIELDS["labels"], "crs": "EPSG:99"}}),
    Bad("several layers", "t.gpkg: has several layers, ", layers, {"labels": {"table": "t.gpkg", "column": "crop"}}),
    Bad("points of a detection", "t.csv:2: is a point; set labels.box_size", table(*rows()), {**CSV, "task": "detection", "window": {}}),
    # Splits, and the target.
    Bad("unknown split", "its split 'training' is none of train, val, test", table(
        "chip,part", *(f"c{n:02d},training" for n in range(12)), name="s.csv"), {"split": {"by": "column", "table": "s.csv", "column": "part"}}),
    Bad("no split for a chip", "c11_label.tif: has no value of split.column 'part'", table(
        "chip,part", *(f"c{n:02d},train" for n in range(11)), name="s.csv"), {"split": {"by": "column", "table": "s.csv", "column": "part"}}),
    Bad("one block only", "split: no window is in val, test: too few blocks or groups", spec={"split": {"size_m": 10_000_000}}),
    Bad("a file in place of the dataset", "dataset: exists and was not made by make_dataset", occupied),
    Bad("the dataset config is this file", "mine.yaml: exists and was not made by make_dataset; name another", spec={"path": "mine"}),
    Bad("a folder that can't be made", "can't be written", lambda folder: (folder / "out").write_text(""), {"path": "out/dataset"}),
    Bad("other bands than before", "dataset: is a dataset with other inputs, bands or types of values", other_layers),
]  # fmt: skip


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_mistake_is_one_clear_line(tmp_path: Path, bad: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    write_chips(tmp_path)
    bad.change(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError) as error:
        made(tmp_path, **bad.spec)
    lines = str(error.value).splitlines()
    assert [text for text in lines if bad.message in text], str(error.value)
    assert error.value.exit_code == 2
    after = tree(tmp_path)
    before.pop("mine.yaml"), after.pop("mine.yaml")
    assert after == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("room", [1_000, 1_500, 3_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, room: int) -> None:
    """A limit on the size of files; GDAL says nothing when it can't write the end of one."""
    write_chips(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    before, limits = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(DiskError, match="can't be written: File too large") as error:
            made(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(error.value) and error.value.exit_code == 1
    assert tree(tmp_path).keys() == before.keys() and not list(tmp_path.glob(".*"))


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    write_chips(tmp_path)
    image(tmp_path, epsg=None)
    (tmp_path / "chips/c05_image.tif").write_bytes(b"")
    write_tiff(tmp_path / "chips/c07_image.tif", np.ones((5, 16, 16), np.uint16), bands=BANDS[:5])
    with pytest.raises(UserError) as error:
        made(tmp_path)
    assert [text.split(":")[0].rpartition("/")[2] for text in str(error.value).splitlines()] == [
        "c03_image.tif", "c05_image.tif", "c07_image.tif"
    ]  # fmt: skip


def test_on_the_command_line_it_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    write_chips(tmp_path)
    image(tmp_path, epsg=None)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec_of()))
    done = children.rslp("helios", "make_dataset", "--cfg", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: chips/c03_image.tif: has no CRS")


def test_what_is_no_mistake(tmp_path: Path) -> None:
    """Names with spaces and other letters, polygons with heights and holes, high latitudes, a value of 1.0 for 1."""
    write_chips(tmp_path / "a")
    folder = tmp_path / "größe und ü"
    (tmp_path / "a").rename(folder)
    for path in sorted((folder / "chips").iterdir()):
        path.rename(path.with_name(path.name.replace("c0", "Feld ü ")))
    x, y = corner(3)
    ring = [[x + 20, y - 20, 310.5], [x + 90, y - 20, 311.0], [x + 90, y - 90, 312.0], [x + 20, y - 20, 310.5]]
    fields(({"type": "Polygon", "coordinates": [ring]}, {"crop": "wheat"}))(folder)
    made(folder, **FIELDS)
    assert "Feld-ü-3" in windows_of(folder / "dataset")


def test_polar_chips(tmp_path: Path) -> None:
    for number in range(12):
        left = 100_000 + 3000 * number
        values = np.full((6, 16, 16), 500 + number, np.uint16)
        write_tiff(tmp_path / f"chips/p{number}_image.tif", values, left=left, top=-50_000, epsg=3031, bands=BANDS)
        ice = np.full((1, 16, 16), 1 + number % 2, np.uint8)
        write_tiff(tmp_path / f"chips/p{number}_label.tif", ice, left=left, top=-50_000, epsg=3031)
    made(tmp_path)
    config = json.loads((tmp_path / "dataset" / "windows" / "default" / "p3" / "metadata.json").read_text())
    assert config["projection"]["crs"] == "EPSG:3031"
