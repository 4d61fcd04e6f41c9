"""Tables of labels: CSV, GeoJSON, GeoPackage, shapefile and GeoParquet become rows with a geometry and properties."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiona
import shapely
from fiona.errors import FionaError, FionaValueError
from rasterio.crs import CRS
from rasterio.errors import CRSError
from shapely.errors import ShapelyError

from rslp.datasets.config import Labels
from rslp.datasets.grids import WGS84
from rslp.datasets.sources import Problems
from rslp.errors import UserError
from rslp.suggest import did_you_mean

_VECTOR = (".geojson", ".json", ".gpkg", ".shp")
_PARQUET = (".parquet", ".geoparquet")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        where: file and number of the row, for messages.
        number: the row's number: the line of a CSV, the position of a feature from 1 on.
        shape: its geometry, in the table's CRS and without height; None in a table without coordinates.
        values: its columns.
    """

    where: str
    number: int
    shape: shapely.Geometry | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """The rows of a table, and the CRS of their geometries."""

    rows: tuple[Row, ...]
    crs: CRS


def read_table(path: Path, labels: Labels, problems: Problems) -> Table:
    """Read a table; rows that can't be used become problems.

    Args:
        path: the file.
        labels: which columns hold coordinates and label.
        problems: takes what is wrong, with file and row.
    """
    empty = Table((), WGS84)
    if not path.is_file():
        problems.add(path, "no such file")
        return empty
    if path.stat().st_size == 0:
        problems.add(path, "is empty (0 bytes)")
        return empty
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            raw, crs = _csv(path, labels, problems)
        elif suffix in _VECTOR:
            raw, crs = _features(path, labels.layer, problems)
        elif suffix in _PARQUET:
            raw, crs = _parquet(path, labels, problems)
        else:
            problems.add(path, f"tables end in .csv, {', '.join((*_VECTOR, *_PARQUET))}; got {suffix or 'no ending'}")
            return empty
        chosen = CRS.from_user_input(labels.crs) if labels.crs else crs
    except CRSError:
        problems.add("labels.crs", f"{labels.crs!r} is no CRS; write EPSG:32643 or the like")
        return empty
    except (FionaError, FionaValueError, ShapelyError, UnicodeDecodeError, csv.Error, ValueError, OSError) as error:
        problems.add(path, f"can't be read: {' '.join(str(error).split())}")
        return empty
    if not raw and not problems.lines:
        problems.add(path, "has no rows")
    if chosen is None:
        problems.add(path, "has no CRS; say which with labels.crs (EPSG:4326 for longitude and latitude)")
        return empty
    return Table(tuple(_checked(raw, chosen, problems)), chosen)


def _checked(raw: Sequence[Row], crs: CRS, problems: Problems) -> Iterator[Row]:
    """The rows whose geometry can be used."""
    for row in raw:
        shape = row.shape
        if shape is None:
            yield row
            continue
        flaw = _flaw(shape, crs)
        if flaw:
            problems.add(row.where, flaw)
        else:
            yield Row(row.where, row.number, shapely.force_2d(shape), row.values)


def _flaw(shape: shapely.Geometry, crs: CRS) -> str:
    """What is wrong with a geometry; empty if nothing is."""
    if shape.is_empty:
        return "its geometry is empty"
    left, bottom, right, top = shape.bounds
    if not all(map(math.isfinite, (left, bottom, right, top))):
        return "its coordinates are no finite numbers"
    if crs.is_geographic:
        if max(abs(bottom), abs(top)) > 90:
            swapped = "; are longitude and latitude swapped?" if max(abs(left), abs(right)) <= 90 else ""
            return f"its latitude {top if abs(top) > 90 else bottom:g} is not between -90 and 90{swapped}"
        if max(abs(left), abs(right)) > 180:
            return f"its longitude {right if abs(right) > 180 else left:g} is not between -180 and 180"
        if right - left > 180:
            return "it crosses the antimeridian (180 degrees); cut it there into two rows"
    if shape.geom_type == "GeometryCollection":
        return "is a collection of geometries; a row has points, or polygons"
    if "Line" in shape.geom_type:
        return "is a line; labels are points or polygons (buffer lines first)"
    if not shape.is_valid:
        return f"its polygon is not valid: {shapely.is_valid_reason(shape)}"
    return ""


def _csv(path: Path, labels: Labels, problems: Problems) -> tuple[list[Row], CRS]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        first = stream.readline()
        stream.seek(0)
        # Spreadsheets of many countries write semicolons, since their numbers have decimal commas.
        reader = csv.DictReader(stream, delimiter=max(",;\t", key=first.count))
        header = list(reader.fieldnames or ())
        lines = [(reader.line_num, dict(values)) for values in reader]
    has_place = labels.lon in header or labels.lat in header
    if has_place and (missing := [name for name in (labels.lon, labels.lat) if name not in header]):
        problems.add(path, f"has no column {missing[0]!r}{did_you_mean(missing[0], header, otherwise='its columns')}")
        return [], WGS84
    rows = []
    for number, values in lines:
        where = f"{path}:{number}"
        if None in values or None in values.values():
            problems.add(where, f"does not have {len(header)} values, one for each column of the first line")
            continue
        shape = None
        if has_place:
            texts = values[labels.lon], values[labels.lat]
            try:
                shape = shapely.Point(float(texts[0]), float(texts[1]))
            except ValueError:
                problems.add(where, f"{labels.lon}, {labels.lat}: {texts[0]!r}, {texts[1]!r} are no numbers")
                continue
        rows.append(Row(where, number, shape, values))
    return rows, WGS84


def _features(path: Path, layer: str | None, problems: Problems) -> tuple[list[Row], CRS | None]:
    rows = []
    layers = fiona.listlayers(path)
    if layer is None and len(layers) > 1:
        problems.add(path, f"has several layers, {', '.join(layers)}; choose with labels.layer")
        return [], WGS84
    if layer is not None and layer not in layers:
        problems.add(path, f"has no layer {layer!r}{did_you_mean(layer, layers, otherwise='its layers')}")
        return [], WGS84
    with fiona.open(path, layer=layer) as collection:
        crs = CRS.from_wkt(collection.crs_wkt) if collection.crs_wkt else None
        for number, feature in enumerate(collection, 1):
            where = f"{path}: row {number}"
            if feature.geometry is None:
                problems.add(where, "has no geometry (null)")
                continue
            shape = shapely.geometry.shape(feature.geometry.__geo_interface__)
            rows.append(Row(where, number, shape, dict(feature.properties)))
    return rows, crs


def _parquet(path: Path, labels: Labels, problems: Problems) -> tuple[list[Row], CRS | None]:
    table = read_parquet(path)
    columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in table.column_names}
    geo = json.loads((table.schema.metadata or {}).get(b"geo", b"null"))
    crs: CRS | None = WGS84
    shapes: Sequence[Any] = [None] * table.num_rows
    if geo is not None:
        name = geo["primary_column"]
        raw = columns.pop(name)
        shapes = shapely.from_wkb(raw)
        # GeoParquet: without the key, longitude and latitude; null means that nobody knows.
        stated = geo["columns"][name].get("crs", "OGC:CRS84")
        crs = CRS.from_user_input(stated) if stated else None
        for number in [number for number, wkb in enumerate(raw, 1) if wkb is None]:
            problems.add(f"{path}: row {number}", "has no geometry (null)")
    elif {labels.lon, labels.lat} <= columns.keys():
        pairs = zip(columns[labels.lon], columns[labels.lat], strict=True)
        shapes = [shapely.Point(math.nan if x is None else x, math.nan if y is None else y) for x, y in pairs]
    rows = [
        Row(f"{path}: row {number}", number, shape, dict(zip(columns, values, strict=True)))
        for number, (shape, *values) in enumerate(zip(shapes, *columns.values(), strict=True), 1)
        if shape is not None or geo is None
    ]
    return rows, crs


def read_parquet(path: Path) -> Any:
    """A Parquet file as a table of pyarrow.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'rslp[datasets]'") from None
    return parquet.read_table(path)


def column_of(rows: Sequence[Row], column: str, path: Path, problems: Problems) -> list[Any]:
    """The values of a column; a missing column, and rows without a value in it, become problems."""
    if rows and column not in rows[0].values:
        hint = did_you_mean(column, rows[0].values, otherwise="its columns")
        problems.add(path, f"has no column {column!r}{hint}")
        return []
    values = []
    for row in rows:
        value = row.values.get(column)
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            problems.add(row.where, f"has no value in the column {column!r}")
        values.append(value)
    return values
