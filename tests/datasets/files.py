"""Plain files as a person might have them: GeoTIFF chips, label rasters and tables, all made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from affine import Affine
from rslearn.dataset import Dataset, Window
from rslearn.utils.raster_format import GeotiffRasterFormat
from upath import UPath

from rslp.datasets.config import parse_spec
from rslp.datasets.make import Summary, make
from rslp.io import read_yaml

BANDS = ("B02", "B03", "B04", "B08", "B11", "B12")
# Chips stand this far apart, m.
PITCH = 2000
ORIGIN = (500_000.0, 4_200_000.0)


def write_tiff(
    path: Path, values: np.ndarray[Any, Any], *, left: float = ORIGIN[0], top: float = ORIGIN[1], size: float = 10.0,
    epsg: int | None = 32643, bands: Sequence[str] = (), nodata: float | None = None, south_up: bool = False,
) -> Path:  # fmt: skip
    """Write ``C H W`` (north to south) as a GeoTIFF; ``south_up`` stores rows from south to north."""
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = Affine(size, 0, left, 0, -size, top)
    if south_up:
        values = values[:, ::-1]
        transform = Affine(size, 0, left, 0, size, top - size * values.shape[1])
    profile = {"driver": "GTiff", "count": len(values), "height": values.shape[1], "width": values.shape[2]}
    crs = None if epsg is None else f"EPSG:{epsg}"
    with rasterio.open(
        path, "w", dtype=values.dtype.name, crs=crs, transform=transform, nodata=nodata, **profile
    ) as file:
        file.write(values)
        for number, band in enumerate(bands, 1):
            file.set_band_description(number, band)
    return path


def corner(number: int) -> tuple[float, float]:
    """Left and top of a chip, in a row of ten."""
    return ORIGIN[0] + number % 10 * PITCH, ORIGIN[1] - number // 10 * PITCH


def write_chips(folder: Path, count: int = 12, *, size: int = 16, classes: int = 3, seed: int = 0) -> Path:
    """Write ``chips/cNN_image.tif`` (digital numbers), ``_label.tif`` (1 to ``classes``, 0 none) and ``_field.tif``."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        left, top = corner(number)
        label = rng.integers(0, classes + 1, (1, size // 4, size // 4)).repeat(4, axis=1).repeat(4, axis=2)
        image = (label * 800 + 300 + rng.integers(0, 200, (len(BANDS), size, size))).astype(np.uint16)
        field = np.where(label > 0, number * 10 + label, 0).astype(np.uint16)
        name = f"chips/c{number:02d}"
        write_tiff(folder / f"{name}_image.tif", image, left=left, top=top, bands=BANDS)
        write_tiff(folder / f"{name}_label.tif", label.astype(np.uint8), left=left, top=top)
        write_tiff(folder / f"{name}_field.tif", field, left=left, top=top)
    return folder


def spec_of(**changes: Any) -> dict[str, Any]:
    """The file of a segmentation of ``write_chips``, with changes; None removes a key."""
    spec: dict[str, Any] = {
        "path": "dataset",
        "task": "segmentation",
        "images": {"sentinel2_l2a": {"files": "chips/{chip}_image.tif", "date": ["2022-01-01", "2022-05-31"]}},
        "labels": {"files": "chips/{chip}_label.tif", "classes": {1: "wheat", 2: "maize", 3: "fallow"}, "ignore": [0]},
    }
    spec.update(changes)
    return {key: value for key, value in spec.items() if value is not None}


def made(folder: Path, *, overwrite: bool = False, **changes: Any) -> Summary:
    """Write ``mine.yaml`` and make its dataset."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(spec_of(**changes), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return make(parse_spec(read_yaml(path, name="mine.yaml")), folder, command="test", overwrite=overwrite)


def windows_of(path: Path) -> dict[str, Window]:
    """The windows of a dataset, by name."""
    return {window.name: window for window in Dataset(UPath(path)).load_windows()}


def pixels(window: Window, layer: str, bands: Sequence[str]) -> np.ndarray[Any, Any]:
    """``C T H W`` of a layer of a window, read through rslearn."""
    raster = window.data.read_raster(layer, list(bands), GeotiffRasterFormat(), window.projection, window.bounds)
    return raster.array


def features(window: Window) -> list[dict[str, Any]]:
    """The properties of a window's vector labels."""
    text = (Path(str(window.window_root)) / "layers" / "label" / "data.geojson").read_text()
    return [feature["properties"] for feature in json.loads(text)["features"]]


def lon_lat(x: float, y: float, epsg: int = 32643) -> tuple[float, float]:
    """A place in degrees."""
    [lon], [lat] = rasterio.warp.transform(f"EPSG:{epsg}", "EPSG:4326", [x], [y])
    return lon, lat


def write_geojson(path: Path, rows: Sequence[tuple[dict[str, Any] | None, dict[str, Any]]], epsg: int = 32643) -> Path:
    """Write pairs of a GeoJSON geometry and properties."""
    parts = [{"type": "Feature", "geometry": geometry, "properties": facts} for geometry, facts in rows]
    crs = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{epsg}"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": parts}))
    return path


def square(left: float, top: float, side: float) -> dict[str, Any]:
    """A square polygon."""
    ring = [[left, top], [left + side, top], [left + side, top - side], [left, top - side], [left, top]]
    return {"type": "Polygon", "coordinates": [ring]}
