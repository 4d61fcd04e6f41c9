"""Two sets of real pixels, as they were published, turned into datasets: live fuel moisture and crop type.

    python examples/real_points/convert.py

The two readers are models for one of your own: yield a ``PixelSeries`` for each point, call ``write_points_dataset``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from rslp.datasets.config import Span
from rslp.datasets.points import PixelSeries, SensorSeries, write_points_dataset
from rslp.datasets.splits import split_units
from rslp.errors import DataError, UserError

HERE = Path(__file__).resolve().parent
# An optional folder of test data beside the checkout.
DATA = HERE.parents[1] / "../shared/data"

S1 = ("vv", "vh")
# In the order that Galileo wants.
S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")

WEATHER = ("temperature", "precipitation")
TERRAIN = ("elevation", "slope")

# Columns of the fuel moisture array, by sensor (B09 and NDVI are left out: Galileo has no use for them).
FUEL_COLUMNS = {"s2": (2, 3, 4, 5, 6, 7, 8, 9, 11, 12), "s1": (0, 1), "weather": (13, 14), "terrain": (15, 16)}
# Precipitation is the mean of a day there; Galileo wants the sum of a month, in m.
FUEL_DAYS = 30
FUEL_STEP = timedelta(days=30)
FUEL_VAL_SHARE = 0.2

MISSING = 65535
CROPS_MIN_POINTS = 20
# A block of 0.1 degrees is about 11 km wide at the equator, where these points lie.
CROPS_BLOCK = 0.1
CROPS_SHARES: Mapping[str, float] = {"train": 0.5, "val": 0.2, "test": 0.3}


def fuel_moisture(folder: Path) -> Iterator[PixelSeries]:
    """Read the live fuel moisture pixels: three composites of 30 days before each field measurement.

    The test split is the published one, disjoint by site. Validation is a fifth of the other sites, drawn by the hash
    of their names.

    Raises:
        DataError: a file is missing, or two files contradict each other.
    """
    load = {name: _array(folder, name) for name in ("s1_s2_era5_srtm", "latlon", "month", "target", "is_test", "site")}
    measured = _measurements(folder / "single_file_labels.geojson")
    for number, values in enumerate(load["s1_s2_era5_srtm"]):
        values[:, 14] *= FUEL_DAYS
        site, lfmc = str(load["site"][number]), float(load["target"][number])
        months = tuple(int(month) + 1 for month in load["month"][number])
        possible = [spans for spans in measured.get((site, round(lfmc, 2)), ()) if _months(spans) == months]
        if not possible:
            raise DataError(f"{folder}: row {number}: no measurement of {lfmc} at {site!r} fits its months {months}")
        # Where a site had the same value in two years, the year is unknown; encoders look at the months alone.
        spans = possible[0]
        split = "test" if load["is_test"][number] else "val" if _hash(site) < FUEL_VAL_SHARE else "train"
        lat, lon = map(float, load["latlon"][number])
        yield PixelSeries(
            name=f"p{number:05d}",
            lon=lon,
            lat=lat,
            split=split,
            label={"lfmc": lfmc},
            sensors=_sensors(spans, {sensor: values[:, columns] for sensor, columns in FUEL_COLUMNS.items()}),
            tags={"site": site},
        )


def crop_type(folder: Path) -> Iterator[PixelSeries]:
    """Read the WorldCereal points: twelve monthly composites; classes with at least ``CROPS_MIN_POINTS`` points.

    Missing months (65535) are left out. Sentinel-1 is turned into dB. Splits by blocks of ``CROPS_BLOCK`` degrees.

    Raises:
        DataError: the table is missing.
    """
    path = folder / "test_public_extractions.parquet"
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    table = pd.read_parquet(path)
    counts = table["sampling_label"].value_counts()
    table = table[table["sampling_label"].map(counts) >= CROPS_MIN_POINTS].reset_index(drop=True)
    blocks = [
        f"{lon // CROPS_BLOCK:.0f}_{lat // CROPS_BLOCK:.0f}" for lon, lat in zip(table.lon, table.lat, strict=True)
    ]
    classes = table["sampling_label"].tolist()
    splits = split_units([(b, c, 1) for b, c in zip(blocks, classes, strict=True)], shares=CROPS_SHARES)
    weather = _columns(table, ("METEO-temperature_mean", "METEO-precipitation_flux"))
    terrain = table[["DEM-alt-20m", "DEM-slo-20m"]].to_numpy(dtype=np.float64)
    series = {
        "s2": _columns(table, [f"OPTICAL-{band}" for band in S2]),
        "s1": 20 * np.log10(_columns(table, ("SAR-VV", "SAR-VH"))) - 83,
        # Hundredths of a kelvin, and hundredths of a millimetre in a month.
        "weather": weather / (100, 100_000),
        "terrain": np.where(terrain == MISSING, np.nan, terrain)[:, np.newaxis],
    }
    for number, (_, row) in enumerate(table.iterrows()):
        months = pd.date_range(row["start_date"], periods=13, freq="MS", tz="UTC").to_pydatetime()
        spans: tuple[Span, ...] = tuple(pairwise(months))
        yield PixelSeries(
            name=f"p{number:05d}",
            lon=float(row["lon"]),
            lat=float(row["lat"]),
            split=splits[blocks[number]],
            label={"crop": row["sampling_label"]},
            sensors=_sensors(spans, {sensor: values[number] for sensor, values in series.items()}),
            tags={"block": blocks[number], "source": row["sample_id"]},
        )


def _array(folder: Path, name: str) -> np.ndarray:
    path = folder / f"{name}.npy"
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return np.load(path, allow_pickle=False)


def _measurements(path: Path) -> dict[tuple[str, float], list[tuple[Span, ...]]]:
    """The 30-day spans before each field measurement, by site and measured value: the arrays have no dates.

    The published months of the images are those in which these spans begin.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found: dict[tuple[str, float], list[tuple[Span, ...]]] = {}
    for feature in json.loads(path.read_text(encoding="utf-8"))["features"]:
        fact = feature["properties"]
        end = datetime.fromisoformat(fact["date"]).replace(tzinfo=UTC)
        spans = tuple((end - FUEL_STEP * k, end - FUEL_STEP * (k - 1)) for k in (3, 2, 1))
        found.setdefault((fact["site"], round(fact["percent(t)"], 2)), []).append(spans)
    return found


def _months(spans: Sequence[Span]) -> tuple[int, ...]:
    return tuple(start.month for start, _ in spans)


def _sensors(spans: tuple[Span, ...], values: Mapping[str, np.ndarray]) -> dict[str, SensorSeries]:
    """Put the arrays of one point, ``T C`` by sensor, beside their bands and dates; terrain has one row for all."""
    bands = {"s2": S2, "s1": S1, "weather": WEATHER, "terrain": TERRAIN}
    always = ((spans[0][0], spans[-1][1]),)
    return {
        sensor: SensorSeries(bands=bands[sensor], spans=always, values=rows[:1])
        if sensor == "terrain"
        else SensorSeries(bands=bands[sensor], spans=spans, values=rows)
        for sensor, rows in values.items()
    }


def _columns(table: pd.DataFrame, bands: Sequence[str]) -> np.ndarray:
    """Values ``N T C`` of bands whose columns are called ``NAME-ts0-10m`` and so on; NaN where missing."""
    stems = {column.rsplit("-", 1)[0]: column for column in table.columns}
    series = [[table[stems[f"{stem}-ts{step}"]] for stem in bands] for step in range(12)]
    values = np.array(series, dtype=np.float64).transpose(2, 0, 1)
    return np.where(values == MISSING, np.nan, values)


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert what was asked for; a missing folder is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuel_moisture", type=Path, default=DATA / "fuel-moisture", help="folder with the arrays")
    parser.add_argument("--crop_type", type=Path, default=DATA / "worldcereal-points", help="folder with the table")
    parser.add_argument("--output", type=Path, default=HERE / "datasets", help="where the two datasets are written")
    options = parser.parse_args(arguments)
    sources = {"fuel_moisture": (fuel_moisture, options.fuel_moisture), "crop_type": (crop_type, options.crop_type)}
    try:
        for name, (_, folder) in sources.items():
            if not folder.is_dir():
                raise DataError(f"--{name}: {folder.resolve()}: no such folder")
        for name, (read, folder) in sources.items():
            start = time.perf_counter()
            count = write_points_dataset(options.output / name, read(folder))
            print(f"{options.output / name}: {count} windows, {time.perf_counter() - start:.0f} s")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
