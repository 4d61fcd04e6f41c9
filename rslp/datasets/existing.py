"""The dataset config of an rslearn dataset that exists already."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rslearn.config import LayerConfig, LayerType
from rslearn.dataset import Dataset, Window
from rslearn.utils.raster_format import RasterFormat
from upath import UPath

from rslp.datasets.config import SPLITS, DatasetSpec
from rslp.datasets.dataset_config import Facts, InputOf, ordered_bands
from rslp.datasets.plan import guessed_units
from rslp.datasets.sources import Problems
from rslp.suggest import did_you_mean
from rslp.upstream.vectors import AllFeatures

# Windows whose images are read to guess units, and whose labels are read for classes.
_IMAGES, _LABELS = 8, 5000


def existing_facts(spec: DatasetSpec, folder: Path, config: Path, header: Sequence[str]) -> tuple[Facts, Counter[str]]:
    """What a dataset config says of an existing dataset, and the number of windows by split.

    Args:
        spec: the configuration, with ``dataset: true``.
        folder: the folder that paths are relative to.
        config: where the dataset config will be.
        header: the lines of its first comment.

    Raises:
        DataError: there is no such dataset, layer, band, property or split; all problems at once.
    """
    path, problems = folder / spec.path, Problems()
    if not (path / "config.json").is_file():
        problems.add(path, "is no rslearn dataset: it has no config.json")
        problems.raise_any()
    dataset = Dataset(UPath(path))
    windows = dataset.load_windows()
    counts = Counter(str(window.options.get("split")) for window in windows)
    if not counts["train"] or not counts["val"]:
        options = sorted({f"{key}: {value}" for window in windows for key, value in window.options.items()})
        message = f"its windows need the option split: train, val, test; of {len(windows)} windows there are "
        problems.add(path, f"{message}{', '.join(options[:8]) or 'no options'}")
    inputs = {name: _input(spec, name, dataset, windows, problems) for name in spec.images}
    dense = spec.task in ("segmentation", "per_pixel_regression")
    label = _layer(dataset, spec.labels.layer or "label", "labels.layer", dense, problems)
    column = spec.labels.column or "label"
    classes, spread = _named(spec), 1.0
    if label is not None and not dense:
        values = _values(windows, spec.labels.layer or "label", column, path, problems)
        if spec.task == "regression":
            spread = float(np.std([float(value) for value in values])) if values else 1.0
        classes = classes or sorted(map(str, dict.fromkeys(values)))
    elif spec.task == "segmentation" and not classes:
        problems.add("labels.classes", "is missing: the names of the classes 0, 1, 2, … of the label rasters")
    problems.raise_any()
    assert label is not None
    sizes = [max(w.bounds[2] - w.bounds[0], w.bounds[3] - w.bounds[1]) for w in windows]
    facts = Facts(
        path=os.path.relpath(path, config.parent), task=spec.task, name=spec.task_name, inputs=inputs,
        label_layer=spec.labels.layer or "label", label_bands=label.band_sets[0].bands if dense else (), column=column,
        classes=classes, nodata=spec.labels.nodata, spread=spread, box_size=spec.labels.box_size, size=max(sizes),
        splits=[split for split in SPLITS if counts[split]], encoder=spec.encoder, header=header,
    )  # fmt: skip
    return facts, counts


def _named(spec: DatasetSpec) -> list[str]:
    classes = spec.labels.classes
    return list(classes.values()) if isinstance(classes, dict) else list(classes or [])


def _layer(dataset: Dataset, name: str, key: str, raster: bool, problems: Problems) -> LayerConfig | None:
    layer = dataset.layers.get(name)
    if layer is None:
        problems.add(
            key, f"the dataset has no layer {name!r}{did_you_mean(name, dataset.layers, otherwise='its layers')}"
        )
    elif (layer.type == LayerType.RASTER) != raster:
        problems.add(
            key, f"the layer {name!r} is {layer.type.value}; the task needs {'a raster' if raster else 'vectors'}"
        )
    else:
        return layer
    return None


def _input(spec: DatasetSpec, name: str, dataset: Dataset, windows: Sequence[Window], problems: Problems) -> InputOf:
    images = spec.images[name]
    layer_name = images.layer or name
    layer = _layer(dataset, layer_name, f"images.{name}.layer", True, problems)
    if layer is None:
        return InputOf(layer=layer_name, bands=())
    stored = [band for band_set in layer.band_sets for band in band_set.bands]
    bands = images.bands or ordered_bands(spec.encoder, name, stored)
    if missing := [band for band in bands if band not in stored]:
        hint = did_you_mean(missing[0], stored, otherwise="its bands")
        problems.add(f"images.{name}.bands", f"the layer {layer_name!r} has no band {', '.join(missing)}{hint}")
    groups = {
        (window.name, group) for window in windows for of, group in window.list_completed_layers() if of == layer_name
    }
    with_layer = {window for window, _ in groups}
    if not groups:
        problems.add(f"images.{name}.layer", f"no window has the layer {layer_name!r}")
    some = [window for window in windows if (window.name, 0) in groups]
    some = some[:: max(1, len(some) // _IMAGES)]
    samples = []
    for band_set in layer.band_sets if images.units is None else []:
        form: RasterFormat = band_set.instantiate_raster_format()
        for window in some:
            raster = window.data.read_raster(layer_name, band_set.bands, form, window.projection, window.bounds)
            samples.append(raster.array)
    return InputOf(
        layer=layer_name,
        bands=bands,
        units=images.units or guessed_units(name, samples),
        required=len(with_layer) == len({window.name for window in windows}),
        all_groups=len(groups) > len(with_layer),
    )


def _values(windows: Sequence[Window], layer: str, column: str, path: Path, problems: Problems) -> list[Any]:
    """The labels of some windows; problems if there are none, or numbers that are not finite."""
    values, names = [], set[str]()
    for window in windows[:: max(1, len(windows) // _LABELS)]:
        if not window.is_layer_completed(layer):
            continue
        for feature in window.data.read_vector(layer, AllFeatures()):
            names.update(feature.properties or {})
            value = (feature.properties or {}).get(column)
            if value is not None and not (isinstance(value, float) and math.isnan(value)):
                values.append(value)
    if not values:
        message = f"no label has the property {column!r}{did_you_mean(column, names, otherwise='there are')}"
        problems.add(path, f"{message}; name it with labels.column")
    return values
