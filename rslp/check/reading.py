"""Read a sample of windows: the labels as they stand, ranges of the images, and the units that these tell of."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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

from rslp import upstream
from rslp.check.labels import Label
from rslp.check.view import DatasetView
from rslp.errors import DataError
from rslp.runtime.slow_reads import read_with_notice
from rslp.upstream.nodata import DECLARED, UnusableLabel, with_labels
from rslp.upstream.vectors import AllFeatures, PlainGeojson

DIGITAL = "digital numbers"
REFLECTANCE = "reflectance 0-1"
EIGHT_BIT = "8-bit"
LINEAR = "linear power"
DECIBEL = "dB"
AMPLITUDE = "amplitude or digital numbers"
SCALED = "scaled integers"

OPTICAL = frozenset({"sentinel2_l2a", "sentinel2", "sentinel2_l1c", "landsat", "naip", "naip_10"})
RADAR = frozenset({"sentinel1"})
# Nodata markers of the usual products; no value of these sensors comes near.
NODATA_BELOW = -9999.0

# Since baseline 04.00 (25 January 2022) Sentinel-2's digital numbers carry an offset of 1000.
# Source: ESA, Sentinel-2 Products Specification Document, RADIO_ADD_OFFSET.
OFFSET = 1000.0
# Fewer windows than these may all be bright by chance.
FEW = 8


@dataclass(frozen=True)
class Range:
    """The measurements of some pixels.

    Attributes:
        low: the lowest, NaN if there is none.
        high: the highest.
        whole: whether all of them are whole numbers.
    """

    low: float
    high: float
    whole: bool

    def joined(self, other: Range) -> Range:
        """The range of both."""
        low, high = float(np.fmin(self.low, other.low)), float(np.fmax(self.high, other.high))
        return Range(low, high, self.whole and other.whole)

    @property
    def empty(self) -> bool:
        """Whether nothing was measured."""
        return bool(np.isnan(self.low))


NO_VALUES = Range(float("nan"), float("nan"), True)


def expected_units(modality: str, sentinel1_units: str) -> str | None:
    """What the normalisation of a modality takes; None where nothing is known."""
    if modality in RADAR:
        return DECIBEL if sentinel1_units == "db" else LINEAR
    return DIGITAL if modality in OPTICAL else None


def units_of(modality: str, values: Range) -> str | None:
    """Name the units that a range of values looks like.

    Optical: reflectance never exceeds 3, 8-bit numbers are whole and never exceed 255. Radar: power is never negative
    (apart from what noise removal leaves, down to -1), dB always is somewhere, and not below -120.

    Args:
        modality: the modality's name.
        values: what was measured in an image, or in one band of many.

    Returns:
        The name, or None where there is nothing to go by.
    """
    if values.empty:
        return None
    if modality in RADAR:
        return _radar(values)
    if modality not in OPTICAL:
        return None
    if values.high <= 3:
        return REFLECTANCE
    return EIGHT_BIT if values.whole and values.high <= 255 else DIGITAL


def _radar(values: Range) -> str:
    if values.low > 3:
        return AMPLITUDE
    if values.low < -120:
        return SCALED
    return DECIBEL if values.low < -1 else LINEAR


def offset_groups(darkest: Sequence[float]) -> tuple[int, int] | None:
    """Tell whether some windows carry Sentinel-2's offset of 1000 and others do not.

    The darkest pixel of a window (over all dates and bands) is near 0 to a few hundred, with the offset as much above
    1000. Two groups, apart by a gap of at least 400 around 1000, whose medians differ by about 1000, are a mixture,
    if the brighter one is as narrow as the other.

    Args:
        darkest: per window its darkest digital number; NaN where it has none.

    Returns:
        (windows with the offset, windows without), or None where there is no mixture.
    """
    values = np.sort(np.array([value for value in darkest if np.isfinite(value)], dtype=np.float64))
    low, high = values[values < OFFSET], values[values >= OFFSET]
    if min(len(low), len(high)) < max(2, 0.05 * len(values)):
        return None
    apart = high[0] - low[-1] >= 400 and abs(float(np.median(high) - np.median(low)) - OFFSET) < 400
    # Without the offset the brighter windows are like the others; bright ground (sand, snow, salt) is not.
    alike = float(np.mean(high - OFFSET <= low[-1] + 200)) >= 0.9
    return (len(high), len(low)) if apart and alike else None


def all_offset(darkest: Sequence[float]) -> bool:
    """Tell whether all windows may carry Sentinel-2's offset of 1000: none is ever darker.

    Water, shadow, dense green in the red, snow in the short-wave infrared are below 1000 without it; only ground that
    is bright in every band on every date (a sand desert) is not.

    Args:
        darkest: per window its darkest digital number, over all dates and bands; NaN where it has none.
    """
    values = np.array([value for value in darkest if np.isfinite(value)], dtype=np.float64)
    # Noise takes a few pixels of no reflectance a little below the offset.
    return (
        len(values) >= FEW and float(np.quantile(values, 0.05)) >= 0.97 * OFFSET and float(values.min()) > 0.8 * OFFSET
    )


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
        result = NO_VALUES
        for band in self.bands:
            result = result.joined(band)
        return result


@dataclass(frozen=True)
class Reading:
    """What was read of one window.

    Attributes:
        window: ``group/name``.
        images: by input; empty where only labels were asked for.
        labels: by input; pixels without a label are marked, see ``rslp.upstream.nodata``.
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


def read_window(view: DatasetView, window: Window, *, images: bool, read_timeout: float | None = None) -> Reading:
    """Read the labels of a window, and its images if they are asked for."""
    name = f"{window.group}/{window.name}"
    inputs = with_labels(view.module.inputs, view.module.task)
    wanted = {key: spec for key, spec in inputs.items() if spec.is_target or images}
    reading = partial(
        upstream.read_inputs,
        view.dataset,
        window,
        bounds=_middle(window),
        inputs=wanted,
        rng=random.Random(window.name),
    )
    layers = ", ".join(dict.fromkeys(layer for spec in wanted.values() for layer in spec.layers))
    try:
        raw = read_with_notice(read_timeout, reading, what=f"{view.name}/{name}: layer {layers}")
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
        return NO_VALUES
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
