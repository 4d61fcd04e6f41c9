"""Write windows as rslearn stores them, by rslearn's own code."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from rasterio.crs import CRS
from rslearn.data_sources.data_source import Item
from rslearn.dataset import Dataset, Window
from rslearn.dataset.window import WindowLayerData
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry
from rslearn.utils.raster_array import RasterArray, RasterMetadata
from rslearn.utils.vector_format import GeojsonVectorFormat

from rslp.example.scene import Mark, Scene, Series, Site

GROUP = "example"
LABEL = "label"
_TIFF = {
    "class_path": "rslearn.utils.raster_format.GeotiffRasterFormat",
    "init_args": {"geotiff_options": {"compress": "deflate", "zlevel": 1, "interleave": "band"}},
}
_INSTANT = timedelta(minutes=1)


def config(scene: Scene, *, unlabelled: int) -> dict[str, Any]:
    """Return the rslearn dataset config (``config.json``) for windows that look like this one."""
    layers: dict[str, Any] = {
        series.layer: _raster_layer(series.bands, series.values.dtype.name) for series in scene.series
    }
    if scene.raster is None:
        layers[LABEL] = {
            "type": "vector",
            "vector_format": {"class_path": "rslearn.utils.vector_format.GeojsonVectorFormat"},
        }
    else:
        layers[LABEL] = _raster_layer(("class",), "uint8")
        layers[LABEL]["band_sets"][0]["nodata_value"] = unlabelled
    return {"layers": layers}


def _raster_layer(bands: tuple[str, ...], dtype: str) -> dict[str, Any]:
    return {"type": "raster", "band_sets": [{"bands": list(bands), "dtype": dtype, "format": _TIFF}]}


def create(root: Path, scene: Scene, *, unlabelled: int) -> None:
    """Make a dataset's folder with its ``config.json``."""
    root.mkdir(parents=True)
    text = json.dumps(config(scene, unlabelled=unlabelled), indent=2)
    (root / "config.json").write_text(text + "\n", encoding="utf-8")


def write(dataset: Dataset, site: Site, scene: Scene, *, unlabelled: int) -> None:
    """Write one window with its images and label.

    Args:
        dataset: the dataset, whose folder and ``config.json`` exist.
        site: place and name of the window.
        scene: its content.
        unlabelled: value of a raster label's pixels without a class.
    """
    projection = Projection(CRS.from_epsg(site.epsg), site.resolution, -site.resolution)
    times = [time for series in scene.series for time in series.times]
    window = Window(
        storage=dataset.storage,
        group=GROUP,
        name=site.name,
        projection=projection,
        bounds=site.bounds,
        time_range=(min(times), max(times) + _INSTANT),
        options={"split": site.split, "block": site.block},
        data_factory=dataset.window_data_storage_factory,
    )
    window.save()
    window.save_layer_datas({series.layer: _items(window, series) for series in scene.series})
    for series in scene.series:
        _write_series(dataset, window, series)
    _write_label(dataset, window, scene, unlabelled)


def _span(time: datetime) -> tuple[datetime, datetime]:
    return time, time + _INSTANT


def _items(window: Window, series: Series) -> WindowLayerData:
    """Name the scenes that the images would have come from: one item a date."""
    square = shapely.box(*window.bounds)
    items = [
        Item(f"{series.layer}_{time:%Y%m%dT%H%M%S}", STGeometry(window.projection, square, _span(time)))
        for time in series.times
    ]
    return WindowLayerData(
        layer_name=series.layer,
        serialized_item_groups=[[item.serialize() for item in items]],
        group_time_ranges=[(series.times[0], series.times[-1] + _INSTANT)],
        materialized=True,
    )


def _write_series(dataset: Dataset, window: Window, series: Series) -> None:
    """Write a layer's whole time series as one item group: one file to open for a sample instead of a dozen."""
    bands = dataset.layers[series.layer].band_sets[0]
    raster = RasterArray(array=series.values, timestamps=[_span(time) for time in series.times])
    with window.data.open_layer_writer(series.layer) as writer:
        form = bands.instantiate_raster_format()
        writer.write_raster(bands.bands, form, window.projection, window.bounds, raster)
    window.mark_layer_completed(series.layer)


def _write_label(dataset: Dataset, window: Window, scene: Scene, unlabelled: int) -> None:
    with window.data.open_layer_writer(LABEL) as writer:
        if scene.raster is None:
            features = [_feature(window, mark) for mark in scene.marks or ()]
            writer.write_vector(GeojsonVectorFormat(), features)
        else:
            bands = dataset.layers[LABEL].band_sets[0]
            raster = RasterArray(
                chw_array=scene.raster[np.newaxis],
                time_range=window.time_range,
                metadata=RasterMetadata(nodata_value=unlabelled),
            )
            form = bands.instantiate_raster_format()
            writer.write_raster(bands.bands, form, window.projection, window.bounds, raster)
    window.mark_layer_completed(LABEL)


def _feature(window: Window, mark: Mark) -> Feature:
    """Turn a mark's window coordinates into the projection's."""
    ring = [(round(x + window.bounds[0], 2), round(y + window.bounds[1], 2)) for x, y in mark.ring]
    shape = shapely.Point(ring[0]) if len(ring) == 1 else shapely.Polygon(ring)
    return Feature(STGeometry(window.projection, shape, None), dict(mark.properties))
