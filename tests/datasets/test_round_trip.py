"""A law: plain files become a dataset with the same pixels at the same places, with the same labels and dates."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rslearn.dataset import Dataset
from upath import UPath

from rslp.example import windows as example
from tests.datasets.files import made, pixels, windows_of, write_tiff

# A corner, in whole pixels from the origin, for each CRS and its pixel sizes.
GRIDS = (
    (32643, (10.0, 20.0, 0.5), (500_000.0, 2_800_000.0)),
    (32733, (10.0, 30.0), (300_000.0, 7_000_000.0)),
    (4326, (0.0001, 8.983152841195215e-05), (76.5, 24.75)),
    (3857, (9.554628535634155, 10.0), (-8_000_000.0, -4_000_000.0)),
)
DTYPES = ("uint8", "int16", "uint16", "int32", "float32")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    epsg, sizes, corner = draw(st.sampled_from(GRIDS))
    return {
        "epsg": epsg,
        "size": draw(st.sampled_from(sizes)),
        "corner": corner,
        "width": draw(st.integers(1, 19)),
        "height": draw(st.integers(1, 19)),
        "south_up": draw(st.booleans()),
        "label_south_up": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "nodata": draw(st.sampled_from([None, 0, 77])),
        "off": draw(st.sampled_from([0.0, 0.3, -0.49])),
        "seed": draw(st.integers(0, 99)),
        "dates": draw(st.integers(1, 3)),
    }


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_pixels_places_and_labels_stay(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    with tempfile.TemporaryDirectory(prefix="round_trip") as name:
        folder = Path(name)
        images, labels = {}, {}
        shape = (case["height"], case["width"])
        for number in range(6):
            step = 1000 * number
            left = (round(case["corner"][0] / case["size"]) + step + case["off"]) * case["size"]
            top = (round(case["corner"][1] / case["size"]) - case["off"]) * case["size"]
            series = rng.integers(1, 100, (case["dates"], 2, *shape)).astype(case["dtype"])
            label = rng.integers(1, 4, (1, *shape)).astype(np.uint8)
            # Every class somewhere, and a pixel without a label where there is room.
            label.ravel()[: min(2, label.size)] = [2, 1][: label.size]
            place = {"left": left, "top": top, "size": case["size"], "epsg": case["epsg"]}
            for date, image in enumerate(series):
                path = folder / f"im/c{number}_2022{date + 3:02d}15.tif"
                write_tiff(path, image, **place, bands=("B03", "B04"), nodata=case["nodata"], south_up=case["south_up"])
            write_tiff(folder / f"lb/c{number}.tif", label, **place, nodata=3, south_up=case["label_south_up"])
            images[f"c{number}"], labels[f"c{number}"] = (left, top, series), label[0]
        summary = made(
            folder,
            images={"sentinel2_l2a": {"files": "im/{chip}_{date:%Y%m%d}.tif", "units": "digital_numbers"}},
            labels={"files": "lb/{chip}.tif", "classes": {1: "a", 2: "b"}},
        )
        windows = windows_of(folder / "dataset")
        assert set(windows) == set(images)
        metre = case["size"] * (111_320 if case["epsg"] == 4326 else 1)
        assert summary.shift <= abs(case["off"]) * 2**0.5 * metre + 1e-3
        for name, window in windows.items():
            left, top, series = images[name]
            assert window.projection.crs == rasterio.crs.CRS.from_epsg(case["epsg"])
            size = window.projection.x_resolution
            assert size == pytest.approx(case["size"], rel=1e-9) and window.projection.y_resolution == -size
            assert abs(window.bounds[0] - left / case["size"]) < 0.5
            assert abs(window.bounds[1] + top / case["size"]) < 0.5
            stored = pixels(window, "sentinel2_l2a", ["B03", "B04"])
            expected = series.swapaxes(0, 1)
            if case["nodata"]:
                expected = np.where(expected == 77, np.nan, expected).astype(np.float32)
            assert stored.dtype == expected.dtype and np.array_equal(stored, expected, equal_nan=True)
            label = pixels(window, "label", ["label"])[0, 0]
            assert np.array_equal(label, np.where(labels[name] == 3, 255, labels[name].astype(int) - 1))
            start = datetime(2022, 3, 15, tzinfo=UTC)
            assert window.time_range is not None and window.time_range[0] == start
            assert window.time_range[1] == datetime(2022, case["dates"] + 2, 15, tzinfo=UTC) + timedelta(days=1)


def test_the_example_survives_the_way_through_plain_files(tmp_path: Path) -> None:
    """The land cover of the built-in example, written as plain GeoTIFFs, becomes the same dataset again."""
    for portion in example.create(tmp_path / "example", size=0.05, seed=0):
        if portion[0].dataset == "land_cover":
            example.write_portion(tmp_path / "example", 0, portion)
    source = {w.name: w for w in Dataset(UPath(tmp_path / "example" / "land_cover")).load_windows()}
    bands = ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09"]
    rows = ["chip,split"]
    for name, window in source.items():
        size = window.projection.x_resolution
        place = {"left": window.bounds[0] * size, "top": -window.bounds[1] * size, "size": size}
        place["epsg"] = window.projection.crs.to_epsg()
        folder = Path(str(window.window_root)) / "layers"
        [note] = folder.glob("sentinel2/*/metadata.json")
        spans = json.loads(note.read_text())["timestamps"]
        for image, span in zip(pixels(window, "sentinel2", bands).swapaxes(0, 1), spans, strict=True):
            write_tiff(tmp_path / f"plain/{name}/{span[0][:10]}.tif", image, bands=bands, **place)
        write_tiff(tmp_path / f"plain/{name}/label.tif", pixels(window, "label", ["class"])[:, 0], nodata=255, **place)
        rows.append(f"{name},{window.options['split']}")
    (tmp_path / "splits.csv").write_text("\n".join(rows))
    made(
        tmp_path,
        images={"sentinel2_l2a": {"files": "plain/{chip}/{date:%Y-%m-%d}.tif"}},
        labels={"files": "plain/{chip}/label.tif", "classes": [f"c{number}" for number in range(7)]},
        split={"by": "column", "table": "splits.csv", "column": "split"},
    )
    written = windows_of(tmp_path / "dataset")
    assert written.keys() == source.keys()
    for name, window in written.items():
        assert (window.bounds, window.projection) == (source[name].bounds, source[name].projection)
        assert window.options["split"] == source[name].options["split"]
        assert np.array_equal(pixels(window, "sentinel2_l2a", bands), pixels(source[name], "sentinel2", bands))
        assert np.array_equal(pixels(window, "label", ["label"]), pixels(source[name], "label", ["class"]))
