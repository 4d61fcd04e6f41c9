"""Read some windows of a dataset: raw labels, the range of each band, and the units that the ranges look like."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
from rslp.helios.images.units import NODATA_BELOW, OPTICAL, RADAR, likely_units
from rslp.runtime.slow_reads import read_with_notice
from rslp.upstream.nodata import DECLARED, UnusableLabel, with_labels
from rslp.upstream.vectors import AllFeatures, PlainGeojson

# Since baseline 04.00 (25 January 2022) Sentinel-2's digital numbers carry an offset of 1000.
# Source: ESA, Sentinel-2 Products Specification Document, RADIO_ADD_OFFSET.
_OFFSET = 1000.0
# Fewer windows than these may all be bright by chance.
_FEW = 8
# Only the middle of a window is read, at most this wide and high, px.
_MIDDLE = 256
_READ_ERRORS = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, RasterioError)


@dataclass(frozen=True)
class Range:
    """The range of the measurements of some pixels.

    Attributes:
        low: the lowest measurement, NaN if there is none.
        high: the highest.
        whole: whether all of them are whole numbers.
    """

    low: float
    high: float
    whole: bool

    def joined(self, other: Range) -> Range:
        """The range of the pixels of both."""
        low, high = float(np.fmin(self.low, other.low)), float(np.fmax(self.high, other.high))
        return Range(low, high, self.whole and other.whole)

    @property
    def empty(self) -> bool:
        """Whether there is no measurement."""
        return bool(np.isnan(self.low))


NO_VALUES = Range(float("nan"), float("nan"), True)


def units_of(modality: str, values: Range) -> str | None:
    """Name the units that a range of values looks like; None for an empty range, or a modality without known units.

    Args:
        modality: the modality's name.
        values: range of an image, or of one band over several images.
    """
    return None if values.empty else likely_units(modality, values.low, values.high, whole=values.whole)


def offset_groups(darkest: Sequence[float]) -> tuple[int, int] | None:
    """Count windows with and without Sentinel-2's offset of 1000, if there are both.

    The darkest pixel of a window (over all dates and bands) is at 0 to a few hundred, and with the offset at 1000 to
    a few hundred more. There are both kinds of windows if these values form two groups, with a gap of at least 400
    around 1000 and medians that differ by about 1000, and if the brighter group is as narrow as the other.

    Args:
        darkest: per window its darkest digital number; NaN where it has none.

    Returns:
        (windows with the offset, windows without), or None where they are not mixed.
    """
    values = np.sort(np.array([value for value in darkest if np.isfinite(value)], dtype=np.float64))
    low, high = values[values < _OFFSET], values[values >= _OFFSET]
    if min(len(low), len(high)) < max(2, 0.05 * len(values)):
        return None
    apart = high[0] - low[-1] >= 400 and abs(float(np.median(high) - np.median(low)) - _OFFSET) < 400
    # Less the offset, the brighter windows are as dark as the others; bright ground (sand, snow, salt) is not.
    as_dark = float(np.mean(high - _OFFSET <= low[-1] + 200)) >= 0.9
    return (len(high), len(low)) if apart and as_dark else None


def all_offset(darkest: Sequence[float]) -> bool:
    """Whether all windows may carry Sentinel-2's offset of 1000: hardly any has a darker pixel.

    Without the offset, water, shadow, dense vegetation in the red and snow in the short-wave infrared are below 1000;
    only ground that is bright in every band on every date (a sand desert) is not.

    Args:
        darkest: per window its darkest digital number, over all dates and bands; NaN where it has none.
    """
    values = np.array([value for value in darkest if np.isfinite(value)], dtype=np.float64)
    if len(values) < _FEW:
        return False
    # Noise takes a few pixels without reflectance a little below the offset.
    return float(np.quantile(values, 0.05)) >= 0.97 * _OFFSET and float(values.min()) > 0.8 * _OFFSET


@dataclass(frozen=True)
class ImageStats:
    """Statistics of one window's image of one input.

    Attributes:
        dates: number of dates.
        bands: for each band the range of its measurements.
        nodata: share of pixels without a measurement.
    """

    dates: int
    bands: tuple[Range, ...]
    nodata: float

    @property
    def whole(self) -> Range:
        """The range over all bands."""
        return joined(self.bands)


def joined(ranges: Iterable[Range]) -> Range:
    """The range of the pixels of all ranges."""
    return functools.reduce(Range.joined, ranges, NO_VALUES)


@dataclass(frozen=True)
class Reading:
    """Contents of one window.

    Attributes:
        window: ``group/name``.
        images: statistics of each image input; empty if only labels were to be read.
        labels: by input; pixels without a label are marked, see ``rslp.upstream.nodata``.
        outside: for each input with vector labels, the number of features that do not touch the window.
        declared: for each input with pixels of a nodata value that the file declares, that value.
        fault: why the window can't be read; empty if it can.
        of_nodata: whether the reason is an ambiguous nodata value of a label file.
    """

    window: str
    images: Mapping[str, ImageStats] = field(default_factory=dict)
    labels: Mapping[str, Label] = field(default_factory=dict)
    outside: Mapping[str, int] = field(default_factory=dict)
    declared: Mapping[str, float | None] = field(default_factory=dict)
    fault: str = ""
    of_nodata: bool = False


def read_window(view: DatasetView, window: Window, *, images: bool, read_timeout: float | None = None) -> Reading:
    """Read the labels of a window, and if ``images`` its images too; an error becomes the reading's ``fault``.

    Args:
        view: the dataset.
        window: the window; of a large one only the middle is read.
        images: whether images are read.
        read_timeout: seconds that one window may take; None waits for ever.
    """
    name = f"{window.group}/{window.name}"
    inputs = with_labels(view.module.inputs, view.module.task)
    wanted = {key: spec for key, spec in inputs.items() if spec.is_target or images}
    rng, bounds = random.Random(window.name), _middle(window)
    read = functools.partial(upstream.read_inputs, view.dataset, window, bounds=bounds, inputs=wanted, rng=rng)
    layers = ", ".join(dict.fromkeys(layer for spec in wanted.values() for layer in spec.layers))
    try:
        raw = read_with_notice(read_timeout, read, what=f"{view.name}/{name}: layer {layers}")
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
    except _READ_ERRORS as error:
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
    """Whether a sample has the features of all layers of an input, not those of one layer drawn at random."""
    return not spec.load_all_item_groups and (spec.load_all_layers or len(spec.layers) == 1)


def measure(modality: str, image: NDArray[np.generic]) -> ImageStats:
    """Measure the range of each band and the share of nodata of an image ``C T H W``."""
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
    left, top = x0 + max(0, x1 - x0 - _MIDDLE) // 2, y0 + max(0, y1 - y0 - _MIDDLE) // 2
    return (left, top, min(x1, left + _MIDDLE), min(y1, top + _MIDDLE))


def _declared(dataset: Dataset, window: Window, data_input: DataInput) -> float | None:
    """The nodata value that the first file of an input declares in a window; None if there is none."""
    for layer, group in map(get_layer_and_group_from_dir_name, data_input.layers):
        for band_set in dataset.layers[layer].band_sets:
            wanted = set(band_set.bands) & set(data_input.bands or band_set.bands)
            if wanted and window.is_layer_completed(layer, group):
                raster_format = band_set.instantiate_raster_format()
                (raster,) = window.data.read_rasters(
                    layer, band_set.bands, [group], raster_format, projection=window.projection, bounds=window.bounds
                )
                declared: float | None = raster.metadata.nodata_value
                return declared
    return None


def _count_features(dataset: Dataset, window: Window, data_input: DataInput) -> int | None:
    """Count the features in the GeoJSON files of a vector input, inside and outside the window; None if not GeoJSON."""
    total = 0
    for layer, group in map(get_layer_and_group_from_dir_name, data_input.layers):
        if not isinstance(dataset.layers[layer].instantiate_vector_format(), PlainGeojson):
            return None
        if window.is_layer_completed(layer, group):
            features = window.data.read_vector(layer, AllFeatures(), group_idx=group)
            total += sum(not feature.geometry.shp.is_empty for feature in features)
    return total
