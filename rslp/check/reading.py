"""Read a sample of windows: ranges of the images, and the labels as they stand."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from rslearn.dataset import Dataset, Window
from rslearn.dataset.window import get_layer_and_group_from_dir_name
from rslearn.train.dataset import DataInput
from rslearn.train.model_context import RasterImage
from rslearn.utils.geometry import PixelBounds

from rslp.check.labels import Label
from rslp.check.units import NODATA_BELOW, NOTHING, OPTICAL, RADAR, Range
from rslp.check.view import View
from rslp.errors import DataError
from rslp.train import adapters
from rslp.train.nodata import DECLARED, UnusableLabel, with_labels
from rslp.train.slow_reads import read_within
from rslp.train.vectors import AllFeatures, PlainGeojson

# A part of this size from the middle of a window tells enough, px.
_PART = 256
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RasterioError)


@dataclass(frozen=True)
class ImageStats:
    """What one window's image of one input holds.

    Attributes:
        dates: number of dates.
        bands: per band the range of its measurements.
        nodata: share of pixels without a measurement.
        darkest: the lowest measurement of all.
    """

    dates: int
    bands: tuple[Range, ...]
    nodata: float

    @property
    def whole(self) -> Range:
        """The range over all bands."""
        result = NOTHING
        for band in self.bands:
            result = result.joined(band)
        return result


@dataclass(frozen=True)
class Reading:
    """What was read of one window.

    Attributes:
        window: ``group/name``.
        images: by input; empty where only labels were asked for.
        labels: by input; pixels without a label are marked, see ``rslp.train.nodata``.
        outside: features of vector labels that do not touch the window, by input.
        declared: the nodata value of the files of label rasters in which some pixels are, by input.
        fault: why it could not be read; empty if it could.
        of_nodata: whether the fault is a nodata value of the label that can mean two things.
    """

    window: str
    images: Mapping[str, ImageStats] = field(default_factory=dict)
    labels: Mapping[str, Label] = field(default_factory=dict)
    outside: Mapping[str, int] = field(default_factory=dict)
    declared: Mapping[str, float | None] = field(default_factory=dict)
    fault: str = ""
    of_nodata: bool = False


def read_window(view: View, window: Window, *, images: bool, read_timeout: float | None = None) -> Reading:
    """Read the labels of a window, and its images if they are asked for."""
    name = f"{window.group}/{window.name}"
    inputs = with_labels(view.module.inputs, view.module.task)
    wanted = {key: spec for key, spec in inputs.items() if spec.is_target or images}
    reading = partial(
        adapters.read_inputs,
        view.dataset,
        window,
        bounds=_middle(window),
        inputs=wanted,
        rng=random.Random(window.name),
    )
    layers = ", ".join(dict.fromkeys(layer for spec in wanted.values() for layer in spec.layers))
    try:
        raw = read_within(read_timeout, reading, what=f"{view.name}/{name}: layer {layers}")
        outside = {
            key: count - len(value)
            for key, value in raw.items()
            if isinstance(value, list) and _reads_all(wanted[key])
            if (count := _count_features(view.dataset, window, wanted[key])) is not None
        }
    except UnusableLabel as error:
        return Reading(name, fault=str(error), of_nodata=True)
    except DataError as error:
        return Reading(name, fault=str(error))
    except _UNREADABLE as error:
        return Reading(name, fault=f"{type(error).__name__}: {' '.join(str(error).split())}")
    targets = {key for key, spec in wanted.items() if spec.is_target}
    stats = {
        key: measure(key, value.image.numpy())
        for key, value in raw.items()
        if key not in targets and isinstance(value, RasterImage)
    }
    labels = {key: value for key, value in raw.items() if key in targets}
    declared = {
        key: _declared(view.dataset, window, wanted[key])
        for key, value in labels.items()
        if isinstance(value, RasterImage) and bool((value.image == DECLARED).any())
    }
    return Reading(name, stats, labels, outside, declared)


def _reads_all(spec: DataInput) -> bool:
    """Whether a sample has the features of all of an input's layers, and not of one that is drawn."""
    return not spec.load_all_item_groups and (spec.load_all_layers or len(spec.layers) == 1)


def measure(modality: str, image: NDArray[np.generic]) -> ImageStats:
    """Ranges and nodata share of an image ``C T H W``."""
    values = image.astype(np.float32)
    valid = np.isfinite(values) & (values > NODATA_BELOW)
    if modality in OPTICAL | RADAR:
        valid &= ~(values == 0).all(axis=0)
    bands = tuple(_range(band[mask]) for band, mask in zip(values, valid, strict=True))
    return ImageStats(image.shape[1], bands, 1 - float(valid.mean()) if valid.size else 1.0)


def _range(values: NDArray[np.float32]) -> Range:
    if values.size == 0:
        return NOTHING
    return Range(float(values.min()), float(values.max()), bool((values == np.round(values)).all()))


def _middle(window: Window) -> PixelBounds:
    x0, y0, x1, y1 = window.bounds
    left, top = x0 + max(0, x1 - x0 - _PART) // 2, y0 + max(0, y1 - y0 - _PART) // 2
    return (left, top, min(x1, left + _PART), min(y1, top + _PART))


def _declared(dataset: Dataset, window: Window, data_input: DataInput) -> float | None:
    """The nodata value that the file of a window's first raster of an input declares."""
    for layer, group in map(get_layer_and_group_from_dir_name, data_input.layers):
        for band_set in dataset.layers[layer].band_sets:
            if window.is_layer_completed(layer, group) and set(band_set.bands) & set(
                data_input.bands or band_set.bands
            ):
                made = band_set.instantiate_raster_format()
                (raster,) = window.data.read_rasters(
                    layer, band_set.bands, [group], made, projection=window.projection, bounds=window.bounds
                )
                declared: float | None = raster.metadata.nodata_value
                return declared
    return None


def _count_features(dataset: Dataset, window: Window, data_input: DataInput) -> int | None:
    """How many features the GeoJSON files of a vector input hold, wherever they lie; None for another format."""
    total = 0
    for layer, group in map(get_layer_and_group_from_dir_name, data_input.layers):
        if not isinstance(dataset.layers[layer].instantiate_vector_format(), PlainGeojson):
            return None
        if window.is_layer_completed(layer, group):
            found = window.data.read_vector(layer, AllFeatures(), group_idx=group)
            total += sum(not feature.geometry.shp.is_empty for feature in found)
    return total
