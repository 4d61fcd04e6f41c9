"""Checks of image inputs: layers, bands and their order, sizes against the patch size, units, nodata, offsets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rslearn.config import LayerConfig
from rslearn.dataset import Window
from rslearn.dataset.window import get_layer_and_group_from_dir_name
from rslearn.train.dataset import DataInput, SplitConfig
from rslearn.train.transforms.pad import Pad

from rslp.check.encoder import Patch
from rslp.check.findings import Finding, listed, warning
from rslp.check.reading import ImageStats, Range, all_offset, joined, offset_groups, units_of
from rslp.check.view import SPLITS, DatasetView
from rslp.config import pick
from rslp.errors import KeyPath
from rslp.helios.encoders import same_band
from rslp.helios.images.units import DIGITAL, EIGHT_BIT, REFLECTANCE, expected_units
from rslp.suggest import did_you_mean

# Shares of nodata pixels: a warning above the first, an error above the second.
_MUCH_NODATA, _NEARLY_ALL_NODATA = 0.3, 0.95
# Names of the inputs that hold Sentinel-2.
_SENTINEL2 = frozenset({"sentinel2_l2a", "sentinel2_l1c", "sentinel2", "s2"})


def check_layers(view: DatasetView) -> list[Finding]:
    """Check for each input that its layers exist, have its type and its bands, and the bands the normalisation's order.

    The values are not read.
    """
    findings = []
    for name, spec in view.module.inputs.items():
        key_path = (*view.at, "inputs", name)
        for entry in spec.layers:
            layer = _layer_name(entry, spec)
            config = view.dataset.layers.get(layer)
            if config is None:
                hint = did_you_mean(layer, view.dataset.layers)
                message = f"dataset {view.name!r} has no layer {layer!r}{hint}; its layers: "
                findings.append(Finding(message + listed(view.dataset.layers), (*key_path, "layers"), id="layer"))
            else:
                findings += _check_layer(view, layer, config, spec=spec, key_path=key_path)
    return [*findings, *_check_band_order(view), *_check_encoder_bands(view)]


def bands_of(view: DatasetView, spec: DataInput) -> list[str]:
    """The bands of a raster input, in the order in which a sample has them; empty if the dataset has no such layer."""
    if spec.bands is not None:
        return list(spec.bands)
    config = view.dataset.layers.get(_layer_name(spec.layers[0], spec))
    index = spec.use_all_bands_in_order_of_band_set_idx or 0
    sets = config.band_sets if config else []
    return list(sets[index].bands or []) if index < len(sets) else []


def _layer_name(entry: str, spec: DataInput) -> str:
    """The layer of an entry of an input's ``layers``.

    An entry names a layer, or one of its item groups, each of which rslearn stores as one image: ``layer.1`` is the
    second. An input that loads all item groups names layers alone.
    """
    return entry if spec.load_all_item_groups else get_layer_and_group_from_dir_name(entry)[0]


def _check_layer(
    view: DatasetView, layer: str, config: LayerConfig, *, spec: DataInput, key_path: KeyPath
) -> list[Finding]:
    """Check the type and the bands of one layer of an input.

    Args:
        view: the dataset.
        layer: the layer's name.
        config: the layer in the dataset's ``config.json``.
        spec: the input.
        key_path: key path of the input in the run config.
    """
    subject = f"layer {layer!r} of dataset {view.name!r}"
    if config.type.value != spec.data_type:
        message = f"{subject} is {config.type.value}, the input says {spec.data_type}"
        return [Finding(message, (*key_path, "data_type"), id="layer")]
    if spec.data_type != "raster":
        return []
    sets = [list(band_set.bands or []) for band_set in config.band_sets]
    if spec.bands is None:
        index = spec.use_all_bands_in_order_of_band_set_idx
        if index is not None and 0 <= index < len(sets):
            return []
        message = f"{subject} has {len(sets)} band sets, 0 to {len(sets) - 1}; got {index}"
        return [Finding(message, (*key_path, "use_all_bands_in_order_of_band_set_idx"), id="band")]
    known = [band for bands in sets for band in bands]
    missing = [band for band in spec.bands if band not in known]
    if not missing:
        return []
    hint = did_you_mean(missing[0], known)
    message = f"{subject} has no band {listed(missing)}{hint}; its bands: {listed(known, 20)}"
    return [Finding(message, (*key_path, "bands"), id="band")]


def _check_band_order(view: DatasetView) -> list[Finding]:
    """Compare the order of bands in the inputs with that in the normalisation.

    With another order each band is normalised by the numbers of another one, and nothing fails.
    """
    findings = {}
    # A config need not have a test split.
    for split in SPLITS[:2]:
        for normaliser, arguments_path in view.normalisers(split):
            for modality, expected in normaliser.band_names.items():
                spec = view.module.inputs.get(modality)
                key_path = (*arguments_path, "band_names", modality)
                if spec is None or spec.data_type != "raster":
                    continue
                given = bands_of(view, spec)
                # A time series may be stacked along the bands: these then repeat, once for each date.
                if given and expected and given != list(expected) * (len(given) // len(expected)):
                    message = f"dataset {view.name!r}: the normalisation takes the bands of {modality} as "
                    message += f"{', '.join(expected)}, but the input gives {', '.join(given)}"
                    findings[key_path] = Finding(message, key_path, id="band-order")
    return list(findings.values())


def _check_encoder_bands(view: DatasetView) -> list[Finding]:
    """Compare the bands of inputs with those that an encoder which knows them by position takes, in its order.

    Names that the encoder does not have (``temperature`` for ``temperature_2m``) may be in any place.
    """
    findings = []
    for name, taken in view.encoder.bands_by_position().items() if view.encoder else ():
        spec = view.module.inputs.get(name)
        given = bands_of(view, spec) if spec is not None and spec.data_type == "raster" else []
        if not given or view.changes_values(name):
            continue
        places = [next((i for i, band in enumerate(taken) if same_band(band, own)), None) for own in given]
        if len(given) == len(taken) and all(place in (None, i) for i, place in enumerate(places)):
            continue
        message = f"dataset {view.name!r}: the encoder takes the bands of {name} as {', '.join(taken)}, but the input "
        message += f"gives {', '.join(given)}; its argument `bands` names those that all datasets have"
        findings.append(Finding(message, (*view.at, "inputs", name, "bands"), id="band-order"))
    return findings


def check_sizes(view: DatasetView, windows: Mapping[str, Sequence[Window]], patch: Patch) -> list[Finding]:
    """Find sizes of padded images, crops or windows that are no multiple of the patch size.

    Args:
        view: the dataset.
        windows: its windows by split.
        patch: how the encoder cuts images.
    """
    findings = []
    for split, of_split in windows.items():
        config = view.split(split)
        pads = [transform for transform in config.transforms or [] if isinstance(transform, Pad)]
        sizes = _padded_sizes(pads[-1]) if pads else image_sizes(config, of_split)
        bad = {size: count for size, count in sizes.items() if not patch.divides(*size)}
        if not bad:
            continue
        (width, height), count = max(bad.items(), key=lambda item: item[1])
        cropped = config.get_crop_size() is not None
        source = "padded images" if pads else "crops" if cropped else "windows"
        how_many = "" if pads or cropped else f" ({count} of {len(of_split)})"
        message = f"dataset {view.name!r}, split {split!r}: {source} of {width}x{height} px{how_many} "
        message += f"are no multiple of the encoder's patch size {patch.size} px"
        findings.append(Finding(message, _size_key_path(view, split, cropped=cropped), id="image-size"))
    return findings


def image_sizes(config: SplitConfig, windows: Sequence[Window]) -> Counter[tuple[int, int]]:
    """Count the windows of a split by the (width, height) in px of their images: that of a crop, or of the window."""
    crop: tuple[int, int] | None = config.get_crop_size()
    if crop is not None:
        return Counter({crop: len(windows)})
    return Counter((w.bounds[2] - w.bounds[0], w.bounds[3] - w.bounds[1]) for w in windows)


def _padded_sizes(pad: Pad) -> Counter[tuple[int, int]]:
    """The sizes (width, height) in px to which images are padded: the side is drawn from ``range(*pad.size)``."""
    return Counter({(size, size): 1 for size in range(*pad.size)})


def _size_key_path(view: DatasetView, split: str, *, cropped: bool) -> KeyPath:
    """Where the config sets the crop size of a split; the dataset's path where nothing is cropped."""
    if not cropped:
        return (*view.at, "path")
    settings = (f"{split}_config", "default_config")
    # `patch_size` is the former name of `crop_size` in rslearn.
    for key_path in ((part, key) for part in settings for key in ("crop_size", "patch_size")):
        if pick(view.config, key_path) is not None:
            return (*view.at, *key_path)
    return view.at


@dataclass(frozen=True)
class InputSummary:
    """One image input in the windows that were read.

    Attributes:
        name: the input.
        bands: number of bands.
        dates: fewest and most dates of an image.
        units: the units that the values look like; empty for modalities without known units.
        values: range of the values.
        nodata: share of pixels without a measurement.
    """

    name: str
    bands: int
    dates: tuple[int, int]
    units: str
    values: Range
    nodata: float


def check_images(view: DatasetView, name: str, stats: Mapping[str, ImageStats]) -> tuple[InputSummary, list[Finding]]:
    """Compare the values of one input with the units that its normalisation expects.

    Args:
        view: the dataset.
        name: the input.
        stats: statistics of its images, by window (``group/name``); at least one.

    Returns:
        A summary, and what is wrong.
    """
    key_path = (*view.at, "inputs", name)
    subject = f"dataset {view.name!r}: input {name!r}"
    images = list(stats.values())
    values = joined(image.whole for image in images)
    nodata = sum(image.nodata for image in images) / len(images)
    dates = (min(image.dates for image in images), max(image.dates for image in images))
    summary = InputSummary(name, len(images[0].bands), dates, units_of(name, values) or "", values, nodata)
    findings = []
    if nodata > _MUCH_NODATA:
        message = f"{subject}: {nodata:.0%} of the pixels in {len(images)} windows are nodata"
        findings.append(Finding(message, key_path, error=nodata > _NEARLY_ALL_NODATA, id="image-nodata"))
    expected, expected_by = _expected_units(view, name)
    if expected is not None:
        findings += _check_units(view, name, stats, expected=expected, key_path=expected_by)
    if name in _SENTINEL2 and expected in (None, DIGITAL) and not findings:
        findings += _check_offset(subject, stats, key_path)
    findings += _check_quantities(view, name, stats)
    if constant := [label for label, band in _by_band(view, name, stats) if band.low == band.high]:
        # Most often a band that was not downloaded.
        message = f"{subject}: band {listed(constant)} holds a single value in all windows read"
        findings.append(warning(message, (*key_path, "bands"), id="band-constant"))
    return summary, findings


def _expected_units(view: DatasetView, name: str) -> tuple[str | None, KeyPath]:
    """The units that the training split's normalisation, or the encoder, expects of an input; and where that is set."""
    for normaliser, arguments_path in view.normalisers("train"):
        if name in normaliser.band_names:
            sentinel1_units = getattr(normaliser, "sentinel1_units", "db")
            optical_units = getattr(normaliser, "optical_units", "digital_numbers")
            key = ("sentinel1_units",) if name == "sentinel1" else ("band_names", name)
            return expected_units(name, sentinel1_units, optical_units), (*arguments_path, *key)
    kind = view.encoder.kind_of(name) if view.encoder and not view.changes_values(name) else None
    if kind is not None:
        return expected_units(name, "db"), (*view.at, "inputs", name)
    return None, ()


def _check_units(
    view: DatasetView, name: str, stats: Mapping[str, ImageStats], *, expected: str, key_path: KeyPath
) -> list[Finding]:
    """Compare the units that whole images look like with the expected ones; if they agree, those of each band."""
    subject = f"dataset {view.name!r}: input {name!r}"
    wrong = {window: units for window, image in stats.items() if (units := _other_units(name, image.whole, expected))}
    if wrong:
        units, _ = Counter(wrong.values()).most_common(1)[0]
        example = next(window for window in wrong if wrong[window] == units)
        values = stats[example].whole
        message = f"{subject} looks like {units} in {len(wrong)} of {len(stats)} windows ({values.low:.4g} .. "
        message += f"{values.high:.4g} in {example}); {_taker(view, name)} takes {expected}"
        if name == "sentinel2_l2a" and units in (REFLECTANCE, EIGHT_BIT):
            message += (
                f" (optical_units: {'reflectance' if units == REFLECTANCE else 'reflectance_8bit'} converts them)"
            )
        return [Finding(message, key_path, id="units")]
    bands = {
        f"{label} like {looks_like} ({band.low:.4g} .. {band.high:.4g})": looks_like
        for label, band in _by_band(view, name, stats)
        if (looks_like := _other_units(name, band, expected))
    }
    message = f"{subject}: band {listed(bands)}; {_taker(view, name)} takes {expected}"
    # Over clear water, digital numbers in the infrared are below 255 as well: bands like 8-bit are a warning alone.
    return [Finding(message, key_path, error=set(bands.values()) != {EIGHT_BIT}, id="band-units")] if bands else []


def _taker(view: DatasetView, name: str) -> str:
    normalised = any(name in normaliser.band_names for normaliser, _ in view.normalisers("train"))
    return "the normalisation" if normalised else "the encoder"


def _check_quantities(view: DatasetView, name: str, stats: Mapping[str, ImageStats]) -> list[Finding]:
    """Find bands with values that do not occur in the units that the encoder takes, such as a temperature of 20 K."""
    if view.encoder is None or view.changes_values(name) or view.encoder.kind_of(name) is not None:
        return []
    wrong = []
    for position, (label, band) in enumerate(_by_band(view, name, stats)):
        quantity = view.encoder.quantity(name, position)
        if quantity is None or band.empty:
            continue
        low, high = (bound if bound is not None else math.nan for bound in (quantity.low, quantity.high))
        if band.low < low or band.high > high:
            wrong.append(f"{label} ({band.low:.4g} .. {band.high:.4g}; the encoder takes {quantity.units})")
    if not wrong:
        return []
    message = f"dataset {view.name!r}: input {name!r} has values that do not occur in the encoder's units: band "
    return [Finding(message + listed(wrong), (*view.at, "inputs", name), id="units")]


def _other_units(name: str, values: Range, expected: str) -> str | None:
    """The units that a range looks like, if not the expected ones; dark 8-bit images look like reflectance."""
    units = units_of(name, values)
    dark = expected == EIGHT_BIT and values.whole and values.low >= 0 and values.high <= 255
    return None if dark or units == expected else units


def _check_offset(subject: str, stats: Mapping[str, ImageStats], key_path: KeyPath) -> list[Finding]:
    """Look for the offset of +1000 that Sentinel-2's digital numbers have since processing baseline 04.00 (2022).

    Windows with and without it are an error; the offset in all windows is a warning.
    """
    darkest = [image.whole.low for image in stats.values()]
    groups = offset_groups(darkest)
    if groups is not None:
        message = f"{subject}: {groups[0]} of {sum(groups)} windows carry the offset of +1000 of processing baseline "
        message += f"04.00, {groups[1]} do not; subtract it where it is (rslearn: harmonize: true)"
        return [Finding(message, key_path, id="offset-some")]
    if not all_offset(darkest):
        return []
    message = (
        f"{subject}: no value in {len(darkest)} windows is below {min(darkest):.0f}: they seem to carry the offset "
    )
    message += "of +1000 of processing baseline 04.00; subtract it (rslearn: harmonize: true), unless all is as bright "
    return [warning(f"{message}as sand", key_path, id="offset-all")]


def _by_band(view: DatasetView, name: str, stats: Mapping[str, ImageStats]) -> list[tuple[str, Range]]:
    """Name (or position) and range over all windows of each band that every image has."""
    names = bands_of(view, view.module.inputs[name])
    count = min(len(image.bands) for image in stats.values())
    ranges = [joined(image.bands[index] for image in stats.values()) for index in range(count)]
    return [(names[index] if index < len(names) else str(index), band) for index, band in enumerate(ranges)]
