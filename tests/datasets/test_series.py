"""Tables and arrays of pixel series become datasets of windows of one pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet
from rslearn.utils.raster_format import NumpyRasterFormat

from rslp.errors import UserError
from tests.datasets.files import features, made, windows_of

BANDS = ["B02", "B03", "B04"]
S2 = ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]
IMAGES = {"sentinel2_l2a": {"bands": BANDS}}


def rows(pixels: int = 24) -> list[dict[str, Any]]:
    """A row for each pixel and month; a pixel lacks April."""
    table = []
    for pixel in range(pixels):
        for month in (3, 4, 5):
            values = {band: float(1000 * month + pixel + n) for n, band in enumerate(BANDS)}
            if pixel == 2 and month == 4:
                values["B03"] = None  # type: ignore[assignment]
            place = {"lon": 30.0 + pixel % 6 * 0.2, "lat": 1.0 + pixel // 6 * 0.2}
            crop = ("maize", "beans")[pixel % 2]
            table.append({"pixel": f"p{pixel}", **place, "date": f"2022-{month:02d}-15", "crop": crop, **values})
    return table


def write(path: Path, table: list[dict[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist(table), path)


def test_a_table_with_a_row_for_each_pixel_and_date(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", list(reversed(rows())))
    labels = {"table": "t.parquet", "column": "crop", "id": "pixel", "date": "date"}
    summary = made(tmp_path, task="classification", images=IMAGES, labels=labels)
    assert sum(summary.windows.values()) == 24 and set(summary.windows) == {"train", "val", "test"}
    windows = windows_of(tmp_path / "dataset")
    window = windows["p2"]
    raster = window.data.read_raster("sentinel2_l2a", BANDS, NumpyRasterFormat(), window.projection, window.bounds)
    assert raster.array[0, :, 0, 0].tolist() == [3002, 5002]
    assert [start.month for start, _ in raster.timestamps or ()] == [3, 5]
    assert features(window) == [{"crop": "maize"}]
    text = (tmp_path / "dataset.yaml").read_text()
    assert "classes: [beans, maize]" in text and "Flip" not in text
    with pytest.raises(UserError, match="pixel series are written as a whole: --overwrite true replaces it"):
        made(tmp_path, task="classification", images=IMAGES, labels=labels)
    assert made(tmp_path, task="classification", images=IMAGES, labels=labels, overwrite=True).new == 24


def test_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "lon": rng.uniform(30, 32, 40), "lat": rng.uniform(1, 2, 40), "moisture": rng.uniform(50, 150, 40),
        "sentinel2_l2a": rng.uniform(300, 4000, (40, 2, 3)), "site": np.arange(40) // 4,
        "dates": np.array(["2022-03-01", "2022-04-01"]),
    }  # fmt: skip
    np.savez(tmp_path / "t.npz", **arrays)
    labels = {"table": "t.npz", "column": "moisture"}
    split = {"by": "group", "column": "site"}
    made(tmp_path, task="regression", images=IMAGES, labels=labels, split=split)
    windows = windows_of(tmp_path / "dataset")
    assert features(windows["p000007"])[0]["moisture"] == pytest.approx(arrays["moisture"][7])
    assert len({(w.options["site"], w.options["split"]) for w in windows.values()}) == 10
    np.savez(tmp_path / "t.npz", **{**arrays, "sentinel2_l2a": np.zeros((40, 2, 4))})
    with pytest.raises(UserError, match=r"has the shape \(40, 2, 4\); wanted \(40, 2, 3\): pixels, dates, bands"):
        made(tmp_path, path="other", task="regression", images=IMAGES, labels=labels, split=split)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"date": "March"}, "t.parquet: row 6: date: 'March': Invalid isoformat string"),
        ({"crop": "beans"}, "t.parquet: row 6: has another label or place than"),
        ({"lat": 97.0}, "t.parquet: row 6: its latitude 97 is not between -90 and 90"),
    ],
)
def test_mistakes(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    table = rows()
    table[5] = {**table[5], "crop": "beans", **change}
    if "crop" in change:
        table[5]["crop"] = "maize"
    write(tmp_path / "t.parquet", table)
    labels = {"table": "t.parquet", "column": "crop", "id": "pixel", "date": "date"}
    with pytest.raises(UserError) as error:
        made(tmp_path, task="classification", images=IMAGES, labels=labels)
    assert message in str(error.value)
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("encoder", ["galileo", "presto"])
def test_bands_in_the_order_of_an_encoder_that_knows_them_by_position(tmp_path: Path, encoder: str) -> None:
    rng = np.random.default_rng(0)
    bands = {"s2": S2[::-1], "s1": ["vh", "vv"], "era5": ["total_precipitation", "temperature_2m"]}
    arrays = {
        "lon": rng.uniform(30, 32, 40), "lat": rng.uniform(1, 2, 40), "moisture": rng.uniform(50, 150, 40),
        "s2": rng.uniform(0.01, 0.4, (40, 2, 10)), "s1": rng.uniform(0.001, 0.5, (40, 2, 2)),
        "era5": rng.uniform(0, 0.2, (40, 2, 2)), "dates": np.array(["2022-03-01", "2022-04-01"]),
    }  # fmt: skip
    np.savez(tmp_path / "t.npz", **arrays)
    images = {name: {"bands": names} for name, names in bands.items()}
    labels = {"table": "t.npz", "column": "moisture"}
    made(tmp_path, task="regression", images=images, labels=labels, encoder=encoder)
    config = yaml.safe_load((tmp_path / "dataset.yaml").read_text().replace("{ENCODER_EMBEDDING_SIZE}", "128"))
    data = config["data"]["init_args"]
    assert {name: data["inputs"][name]["bands"] for name in bands} == {
        name: names[::-1] for name, names in bands.items()
    }
    transforms = data["train_config"]["transforms"]
    converted = {one["class_path"].split(".")[-1]: one["init_args"]["selectors"] for one in transforms}
    assert converted == {"Sentinel1ToDecibels": ["s1"], "Normalize": ["s2"]}
