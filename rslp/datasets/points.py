"""Pixel time series, of tables or arrays, become a dataset that rslearn reads: a window of one pixel for each point."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio.warp
import shapely
from rslearn.dataset import Dataset, Window
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry
from rslearn.utils.get_utm_ups_crs import get_utm_ups_crs
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import NumpyRasterFormat
from rslearn.utils.vector_format import GeojsonVectorFormat
from upath import UPath

from rslp.datasets.chips import window_name
from rslp.datasets.config import DatasetSpec, Span, span_of
from rslp.datasets.grids import WGS84, transformed
from rslp.datasets.sources import Problems
from rslp.datasets.tables import Row, read_table
from rslp.errors import DataError
from rslp.suggest import did_you_mean
from rslp.upstream.datasets import write_unsynced

GROUP = "points"
LABEL = "label"
RESOLUTION = 10  # metres a pixel

# The places and states of all windows lie in one file, in place of several small ones for each window.
_STORAGE = {"class_path": "rslearn.dataset.storage.sqlite.SQLiteWindowStorageFactory"}
# Made for rasters as small as these: a sensor's whole series is one .npy file.
_FORMAT = {"class_path": "rslearn.utils.raster_format.NumpyRasterFormat"}


@dataclass(frozen=True, kw_only=True)
class SensorSeries:
    """What one sensor saw at a pixel.

    Attributes:
        bands: names of the bands.
        spans: when each image was taken, as (start, end) with time zones; its middle is what encoders see.
        values: ``T C``, one row a date. A row with a NaN is a missing date: it is left out of the dataset.
    """

    bands: tuple[str, ...]
    spans: tuple[Span, ...]
    values: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class PixelSeries:
    """One labelled pixel.

    Attributes:
        name: unique in the dataset; becomes the window's name.
        lon: degrees east.
        lat: degrees north.
        split: ``train``, ``val`` or ``test``.
        label: properties of the label, for example ``{"crop": "maize"}``; a task names the one it learns.
        sensors: the series, by the name of the layer that they become.
        tags: further facts to keep with the window, for example its site.
    """

    name: str
    lon: float
    lat: float
    split: str
    label: Mapping[str, Any]
    sensors: Mapping[str, SensorSeries]
    tags: Mapping[str, Any] = field(default_factory=dict)


def write_points_dataset(path: Path, points: Iterable[PixelSeries]) -> int:
    """Write a dataset with a window of 1 x 1 px (10 m, the UTM zone of the point) for each point.

    A layer is stored as float32 ``C T 1 1`` with its dates; a sensor without any date leaves its layer out.

    Args:
        path: the dataset's folder; one that is there is replaced if it is a dataset of this function.
        points: the points; all with the same sensors and bands.

    Returns:
        The number of windows.

    Raises:
        DataError: there is no point, two share a name, one does not fit the others, or the folder is something else.
    """
    dataset: Dataset | None = None
    bands: dict[str, tuple[str, ...]] = {}
    names: set[str] = set()
    for point in points:
        _check(point, bands=bands, names=names)
        if dataset is None:
            bands = {layer: series.bands for layer, series in point.sensors.items()}
            dataset = _create(path, bands)
        names.add(point.name)
        _write(dataset, point)
    if not names:
        raise DataError(f"{path}: there is no point to write")
    return len(names)


def _create(path: Path, bands: Mapping[str, tuple[str, ...]]) -> Dataset:
    if path.exists():
        if any(path.iterdir()) and not (path / "windows.sqlite3").is_file():
            raise DataError(f"{path}: exists and is no dataset of pixels; name another folder")
        shutil.rmtree(path)
    path.mkdir(parents=True)
    layers: dict[str, Any] = {
        layer: {"type": "raster", "band_sets": [{"bands": list(names), "dtype": "float32", "format": _FORMAT}]}
        for layer, names in bands.items()
    }
    layers[LABEL] = {"type": "vector"}
    text = json.dumps({"layers": layers, "storage": _STORAGE}, indent=2)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")
    dataset = Dataset(UPath(path))
    # Waiting for the disk at each of ten thousand small writes is most of the time; a half-written dataset is written
    # anew anyway.
    write_unsynced(dataset)
    return dataset


def _check(point: PixelSeries, *, bands: Mapping[str, tuple[str, ...]], names: set[str]) -> None:
    """Refuse what would only fail later, in training."""
    if point.name in names:
        raise DataError(f"{point.name}: two points have this name")
    if not (-180 <= point.lon <= 180 and -80 <= point.lat <= 84):
        raise DataError(f"{point.name}: longitude {point.lon}, latitude {point.lat} lie in no UTM zone")
    if bands and bands != {layer: series.bands for layer, series in point.sensors.items()}:
        raise DataError(f"{point.name}: its sensors and bands are not those of the first point: {dict(bands)}")
    for layer, series in point.sensors.items():
        shape = (len(series.spans), len(series.bands))
        if series.values.shape != shape:
            raise DataError(
                f"{point.name}: {layer}: {shape} dates and bands, but values of shape {series.values.shape}"
            )
        if any(span[0].tzinfo is None or span[0] > span[1] for span in series.spans):
            raise DataError(f"{point.name}: {layer}: a date has no time zone, or ends before it starts")


def _write(dataset: Dataset, point: PixelSeries) -> None:
    projection, column, row = _pixel(point.lon, point.lat)
    spans = [span for series in point.sensors.values() for span in series.spans]
    window = Window(
        storage=dataset.storage,
        group=GROUP,
        name=point.name,
        projection=projection,
        bounds=(column, row, column + 1, row + 1),
        time_range=(min(start for start, _ in spans), max(end for _, end in spans)),
        options={"split": point.split, **point.tags},
        data_factory=dataset.window_data_storage_factory,
    )
    window.save()
    for layer, series in point.sensors.items():
        _write_series(window, layer, series)
    with window.data.open_layer_writer(LABEL) as writer:
        place = STGeometry(projection, shapely.Point(column + 0.5, row + 0.5), None)
        writer.write_vector(GeojsonVectorFormat(), [Feature(place, dict(point.label))])
    window.mark_layer_completed(LABEL)


def _write_series(window: Window, layer: str, series: SensorSeries) -> None:
    seen = ~np.isnan(series.values).any(axis=1)
    if not seen.any():
        return
    values = series.values[seen].T.astype(np.float32)[:, :, np.newaxis, np.newaxis]
    raster = RasterArray(array=values, timestamps=[s for s, valid in zip(series.spans, seen, strict=True) if valid])
    with window.data.open_layer_writer(layer) as writer:
        writer.write_raster(list(series.bands), NumpyRasterFormat(), window.projection, window.bounds, raster)
    window.mark_layer_completed(layer)


def _pixel(lon: float, lat: float) -> tuple[Projection, int, int]:
    """The pixel grid of the point's UTM zone, and the column and row of the pixel that holds it."""
    projection = _zone(math.floor((lon + 180) / 6), lat >= 0)
    [east], [north] = rasterio.warp.transform(WGS84, projection.crs, [lon], [lat])
    return projection, math.floor(east / RESOLUTION), math.floor(-north / RESOLUTION)


@cache
def _zone(number: int, northern: bool) -> Projection:
    crs = get_utm_ups_crs(min(number * 6 - 177, 179), 1 if northern else -1)
    return Projection(crs, RESOLUTION, -RESOLUTION)


def read_series(spec: DatasetSpec, folder: Path, problems: Problems) -> list[PixelSeries]:
    """Read pixel series: a table with a row for each pixel and date, or arrays (``.npz``); without splits.

    Args:
        spec: the configuration; inputs have no files, and their bands are columns of the table.
        folder: the folder that paths are relative to.
        problems: takes what is wrong, with file and row.
    """
    path = folder / str(spec.labels.table)
    if path.suffix == ".npz":
        return list(_series_of_arrays(spec, path, problems))
    table = read_table(path, spec.labels, problems)
    if spec.labels.id is None:
        problems.add("labels.id", "is missing: the column that says which rows are of one pixel")
    columns = [str(spec.labels.id), str(spec.labels.column), str(spec.labels.date)]
    columns += [band for images in spec.images.values() for band in images.bands or []]
    for column in columns if table.rows else []:
        if column not in table.rows[0].values:
            hint = did_you_mean(column, table.rows[0].values, otherwise="its columns")
            problems.add(path, f"has no column {column!r}{hint}")
    if problems.lines:
        return []
    groups: dict[str, list[tuple[Row, Span]]] = {}
    for row in table.rows:
        try:
            span = span_of(row.values[columns[2]])
        except ValueError as error:
            problems.add(row.where, f"{columns[2]}: {row.values[columns[2]]!r}: {error}")
            continue
        groups.setdefault(str(row.values[columns[0]]), []).append((row, span))
    series = (_series_of_rows(spec, name, rows, table.crs, problems) for name, rows in groups.items())
    return [pixel for pixel in series if pixel is not None]


def _series_of_rows(
    spec: DatasetSpec, name: str, rows: list[tuple[Row, Span]], crs: Any, problems: Problems
) -> PixelSeries | None:
    first, column = rows[0][0], str(spec.labels.column)
    if first.shape is None:
        problems.add(first.where, f"has no coordinates (columns {spec.labels.lon}, {spec.labels.lat})")
        return None
    for row, _ in rows:
        if row.values[column] != first.values[column] or row.shape != first.shape:
            problems.add(
                row.where, f"has another label or place than {first.where}, of the same {spec.labels.id}: {name}"
            )
            return None
    ordered = sorted(rows, key=lambda pair: pair[1])
    sensors = {}
    for sensor, images in spec.images.items():
        bands = tuple(images.bands or ())
        values = np.array([[_number(row, band, problems) for band in bands] for row, _ in ordered])
        sensors[sensor] = SensorSeries(bands=bands, spans=tuple(span for _, span in ordered), values=values)
    place = transformed(first.shape.centroid, crs, WGS84)
    return PixelSeries(
        name=window_name(name), lon=float(place.x), lat=float(place.y), split="", label={column: first.values[column]},
        sensors=sensors, tags={key: value for key, value in first.values.items() if key == spec.split.column},
    )  # fmt: skip


def _number(row: Row, band: str, problems: Problems) -> float:
    """A value of a table; NaN where there is none."""
    value = row.values[band]
    try:
        return math.nan if value in (None, "") else float(value)
    except (TypeError, ValueError):
        problems.add(row.where, f"{band}: {value!r} is no number")
        return math.nan


def _series_of_arrays(spec: DatasetSpec, path: Path, problems: Problems) -> Iterable[PixelSeries]:
    """Pixels of a ``.npz`` file: ``lon``, ``lat``, ``dates`` (T or N T), the label's array, ``N T C`` of each input."""
    labels, column = spec.labels, str(spec.labels.column)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        problems.add(path, f"can't be read: {error}")
        return
    names = [labels.lon, labels.lat, "dates", column, *spec.images, *([labels.id] if labels.id else [])]
    if missing := [name for name in names if name not in arrays]:
        hint = did_you_mean(missing[0], arrays, otherwise="its arrays")
        problems.add(path, f"has no array {', '.join(missing)}{hint}")
        return
    count = len(arrays[column])
    for name, images in spec.images.items():
        wanted = (count, arrays["dates"].shape[-1], len(images.bands or ()))
        if arrays[name].shape != wanted:
            problems.add(path, f"{name} has the shape {arrays[name].shape}; wanted {wanted}: pixels, dates, bands")
            return
    dates = np.broadcast_to(arrays["dates"], (count, arrays["dates"].shape[-1])).astype("datetime64[D]").astype(str)
    for index in range(count):
        spans = tuple(span_of(str(date)) for date in dates[index])
        sensors = {
            name: SensorSeries(
                bands=tuple(images.bands or ()), spans=spans, values=arrays[name][index].astype(np.float64)
            )
            for name, images in spec.images.items()
        }
        yield PixelSeries(
            name=window_name(arrays[labels.id][index]) if labels.id else f"p{index:06d}",
            lon=float(arrays[labels.lon][index]), lat=float(arrays[labels.lat][index]), split="",
            label={column: arrays[column][index].item()}, sensors=sensors,
            tags={key: arrays[key][index].item() for key in [str(spec.split.column)] if key in arrays},
        )  # fmt: skip
