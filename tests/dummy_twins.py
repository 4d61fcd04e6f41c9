"""A tiny twin on disk of any dataset config: an rslearn dataset with the layers, bands, labels and splits it expects.

The images are noise of plausible size, the labels take each class in turn: enough to train a step, not to learn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from rasterio.crs import CRS
from rslearn.dataset import Dataset, Window
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import GeotiffRasterFormat
from rslearn.utils.vector_format import GeojsonVectorFormat
from upath import UPath

GROUPS = 2  # item groups of a layer of which all are read: two months
WINDOWS = {"train": 1, "val": 2, "test": 2}  # two, since R2 is not defined for one
_START = datetime(2023, 4, 1, tzinfo=UTC)
_MONTH = timedelta(days=30)
# Plausible raw values by modality: mean and spread.
_VALUES = {
    "sentinel2_l2a": (1500, 400),
    "landsat": (9000, 1500),
    "sentinel1/linear": (0.08, 0.02),
    "sentinel1/db": (-12, 3),
    "srtm": (400, 80),
}


@dataclass(frozen=True)
class Layer:
    """One layer of a twin: `kind` says what fills it."""

    name: str
    groups: int
    kind: str
    bands: tuple[str, ...] = ()
    highest: int = 1


def write_twin(root: Path, data: Mapping[str, Any], *, size: int, zone: int) -> None:
    """Write the dataset that a config's `data` reads, with windows of `size` px in a UTM zone of its own."""
    arguments = data["init_args"]
    path = Path(arguments["path"].replace("${RSLP_DATASETS}", str(root)))
    path.mkdir(parents=True)
    layers = layers_of(arguments)
    (path / "config.json").write_text(json.dumps({"layers": {layer.name: _described(layer) for layer in layers}}))
    dataset = Dataset(UPath(path))
    features = _features(arguments)
    rng = np.random.default_rng(zone)
    index = 0
    for split, groups, tags in _splits(arguments):
        for _ in range(WINDOWS[split]):
            window = Window(
                storage=dataset.storage,
                group=groups[-1],
                name=f"w{index}",
                projection=Projection(CRS.from_epsg(32600 + zone), 10, -10),
                bounds=(index * 4 * size, 0, index * 4 * size + size, size),
                time_range=(_START, _START + GROUPS * _MONTH),
                options=tags,
                data_factory=dataset.window_data_storage_factory,
            )
            window.save()
            for layer in layers:
                _fill(window, layer, features=features, rng=rng, index=index)
            index += 1


def _splits(arguments: Mapping[str, Any]) -> list[tuple[str, list[str], dict[str, Any]]]:
    """The splits with the groups and tags that select their windows; a test that is the validation is left out."""
    found: list[tuple[str, list[str], dict[str, Any]]] = []
    for split in WINDOWS:
        settings = {**arguments["default_config"], **arguments[f"{split}_config"]}
        groups, tags = settings.get("groups", ["default"]), settings.get("tags", {})
        if all((groups, tags) != known[1:] for known in found):
            found.append((split, groups, tags))
    return found


def layers_of(arguments: Mapping[str, Any]) -> list[Layer]:
    """The layers that the inputs of a data module read."""
    units = {
        transform["init_args"]["sentinel1_units"]
        for transform in arguments["default_config"]["transforms"]
        if "sentinel1_units" in transform.get("init_args", {})
    }
    found: dict[str, Layer] = {}
    for name, given in arguments["inputs"].items():
        kind = "vector" if given["data_type"] == "vector" else name
        kind = f"sentinel1/{next(iter(units))}" if name == "sentinel1" else kind
        for specifier in given["layers"]:
            layer, _, group = specifier.partition(".")
            groups = GROUPS if given.get("load_all_item_groups") else int(group or 0) + 1
            groups = max(groups, found[layer].groups) if layer in found else groups
            bands, highest = tuple(given.get("bands", ())), _classes(arguments) - 1
            found[layer] = Layer(layer, groups, kind, bands, highest)
    return list(found.values())


def _classes(arguments: Mapping[str, Any]) -> int:
    task = _task(arguments)
    return int(task.get("num_classes") or len(task.get("classes", ())) or 1)


def _task(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    (task,) = arguments["task"]["init_args"]["tasks"].values()
    arguments_of_task: Mapping[str, Any] = task["init_args"]
    return arguments_of_task


def _described(layer: Layer) -> dict[str, Any]:
    if layer.kind == "vector":
        return {"type": "vector"}
    dtype = "float32" if layer.kind.startswith("sentinel1") else "uint16"
    return {"type": "raster", "band_sets": [{"bands": list(layer.bands), "dtype": dtype}]}


def _features(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the labelled features say: every class once, or some values."""
    task = _task(arguments)
    classes = [name for name in task.get("classes", ()) if name != "unknown"]
    values: list[Any] = classes or [80.0, 120.0, 95.0]
    return [{task["property_name"]: value} for value in values] if "property_name" in task else []


def _fill(
    window: Window, layer: Layer, *, features: list[dict[str, Any]], rng: np.random.Generator, index: int
) -> None:
    with window.data.open_layer_writer(layer.name) as writer:
        if layer.kind == "vector":
            marks = [_mark(window, features[index % len(features)], rng) for _ in range(2)]
            writer.write_vector(GeojsonVectorFormat(), marks)
        for group in range(0 if layer.kind == "vector" else layer.groups):
            start = _START + group * _MONTH
            raster = RasterArray(chw_array=_image(window, layer, rng), time_range=(start, start + _MONTH))
            form = GeotiffRasterFormat()
            writer.write_raster(list(layer.bands), form, window.projection, window.bounds, raster, group_idx=group)
    for group in range(layer.groups):
        window.mark_layer_completed(layer.name, group)


def _image(window: Window, layer: Layer, rng: np.random.Generator) -> np.ndarray:
    shape = (len(layer.bands), window.bounds[3] - window.bounds[1], window.bounds[2] - window.bounds[0])
    if layer.kind == "mask":
        mask = np.ones(shape, dtype=np.uint16)
        mask[:, :2] = 0
        return mask
    if layer.kind == "targets":
        return rng.integers(0, layer.highest, shape, endpoint=True, dtype=np.uint16)
    mean, spread = _VALUES[layer.kind]
    dtype = np.float32 if layer.kind.startswith("sentinel1") else np.uint16
    return rng.normal(mean, spread, shape).astype(dtype)


def _mark(window: Window, properties: dict[str, Any], rng: np.random.Generator) -> Feature:
    x0, y0, x1, y1 = window.bounds
    x, y = rng.uniform(0.3, 0.7, 2)
    return Feature(
        STGeometry(window.projection, shapely.Point(x0 + x * (x1 - x0), y0 + y * (y1 - y0)), None), properties
    )
