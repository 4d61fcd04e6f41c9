"""Images and their layers: bands, sizes, and units that the normalisation takes, everywhere in the dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslearn.config import LayerConfig
from rslearn.dataset import Window
from rslearn.dataset.window import get_layer_and_group_from_dir_name
from rslearn.train.dataset import DataInput, SplitConfig
from rslearn.train.transforms.pad import Pad

from rslp.check.findings import Finding, listed, warning
from rslp.check.reading import (
    EIGHT_BIT,
    NO_VALUES,
    ImageStats,
    Range,
    all_offset,
    expected_units,
    offset_groups,
    units_of,
)
from rslp.check.view import SPLITS, DatasetView
from rslp.errors import KeyPath
from rslp.suggest import did_you_mean


def check_layers(view: DatasetView) -> list[Finding]:
    """Layers, their types, bands, and the bands' order against the normalisation."""
    findings = []
    for name, spec in view.module.inputs.items():
        at = (*view.at, "inputs", name)
        for option in spec.layers:
            layer = _layer_name(option, spec)
            config = view.dataset.layers.get(layer)
            if config is None:
                near = did_you_mean(layer, view.dataset.layers)
                what = f"dataset {view.name!r} has no layer {layer!r}{near}; its layers: "
                findings.append(Finding(what + listed(view.dataset.layers), (*at, "layers"), id="layer"))
            else:
                findings += _check_layer(view, layer, config, spec=spec, at=at)
    return findings + _check_order(view)


def bands_of(view: DatasetView, spec: DataInput) -> list[str]:
    """The bands of a raster input, in the order in which a sample has them."""
    if spec.bands is not None:
        return list(spec.bands)
    config = view.dataset.layers.get(_layer_name(spec.layers[0], spec))
    index = spec.use_all_bands_in_order_of_band_set_idx or 0
    sets = config.band_sets if config else []
    return list(sets[index].bands or []) if index < len(sets) else []


def _layer_name(option: str, spec: DataInput) -> str:
    return option if spec.load_all_item_groups else get_layer_and_group_from_dir_name(option)[0]


def _check_layer(view: DatasetView, layer: str, config: LayerConfig, *, spec: DataInput, at: KeyPath) -> list[Finding]:
    if config.type.value != spec.data_type:
        what = f"layer {layer!r} of dataset {view.name!r} is {config.type.value}, the input says {spec.data_type}"
        return [Finding(what, (*at, "data_type"), id="layer")]
    if spec.data_type != "raster":
        return []
    sets = [list(band_set.bands or []) for band_set in config.band_sets]
    index = spec.use_all_bands_in_order_of_band_set_idx
    if spec.bands is None:
        if index is not None and 0 <= index < len(sets):
            return []
        what = f"layer {layer!r} of dataset {view.name!r} has {len(sets)} band sets, 0 to {len(sets) - 1}; got {index}"
        return [Finding(what, (*at, "use_all_bands_in_order_of_band_set_idx"), id="band")]
    have = [band for bands in sets for band in bands]
    missing = [band for band in spec.bands if band not in have]
    if not missing:
        return []
    what = f"layer {layer!r} of dataset {view.name!r} has no band {listed(missing)}{did_you_mean(missing[0], have)}"
    return [Finding(f"{what}; its bands: {listed(have, 20)}", (*at, "bands"), id="band")]


def _check_order(view: DatasetView) -> list[Finding]:
    """A normalisation that takes the bands in another order than they come is silent, and ruins everything."""
    findings = {}
    for split in SPLITS[:2]:
        for normaliser, place in view.normalisers(split):
            for modality, said in normaliser.band_names.items():
                spec = view.module.inputs.get(modality)
                at = (*place, "band_names", modality)
                if spec is None or spec.data_type != "raster":
                    continue
                given = bands_of(view, spec)
                # Further bands may be the dates of a series, stacked.
                if given and said and given != list(said) * (len(given) // len(said)):
                    what = f"dataset {view.name!r}: the normalisation takes the bands of {modality} as "
                    what += f"{', '.join(said)}, but the input gives {', '.join(given)}"
                    findings[at] = Finding(what, at, id="band-order")
    return list(findings.values())


# These cut an image that is smaller than a patch as one patch.
_SHRINKING = (
    "rslp.helios.galileo.Galileo",
    "rslearn.models.galileo.GalileoModel",
    "rslearn.models.galileo.galileo.GalileoModel",
)
ENCODER_PATH: KeyPath = ("model", "init_args", "model", "init_args", "encoder")


@dataclass(frozen=True)
class Patch:
    """How the encoder cuts an image.

    Attributes:
        size: side of a patch, pixels.
        shrinks: whether the encoder takes smaller patches where the image is smaller.
    """

    size: int
    shrinks_when_small: bool = False

    def divides(self, width: int, height: int) -> bool:
        """Whether an image is cut without a rest."""
        size = min(self.size, width, height) if self.shrinks_when_small else self.size
        return width % size == 0 and height % size == 0


def patch_of(config: Mapping[str, Any]) -> Patch | None:
    """The encoder's patch as the run config says it; None where it does not."""
    node: Any = config
    for key in ENCODER_PATH:
        node = node.get(key) if isinstance(node, Mapping) else None
    for module in node if isinstance(node, list) else []:
        arguments = module.get("init_args") if isinstance(module, Mapping) else None
        if not isinstance(arguments, Mapping):
            continue
        among = arguments.get("forward_kwargs")
        sizes = (arguments.get("patch_size"), among.get("patch_size") if isinstance(among, Mapping) else None)
        for size in sizes:
            if isinstance(size, int) and size > 0:
                return Patch(size, shrinks_when_small=module.get("class_path") in _SHRINKING)
    return None


def check_sizes(view: DatasetView, windows: Mapping[str, Sequence[Window]], patch: Patch) -> list[Finding]:
    """Crop sizes, or window sizes where nothing is cropped, that are no multiple of the patch size."""
    findings = []
    for split, found in windows.items():
        config = view.split(split)
        padded = [transform for transform in config.transforms or [] if isinstance(transform, Pad)]
        sizes = _padded_sizes(padded[-1]) if padded else image_sizes(config, found)
        bad = {size: count for size, count in sizes.items() if not patch.divides(*size)}
        if not bad:
            continue
        (width, height), count = max(bad.items(), key=lambda item: item[1])
        source = "padded images" if padded else "crops" if config.get_crop_size() else "windows"
        of = "" if padded or config.get_crop_size() else f" ({count} of {len(found)})"
        what = f"dataset {view.name!r}, split {split!r}: {source} of {width}x{height} px{of} "
        what += f"are no multiple of the encoder's patch size {patch.size} px"
        findings.append(Finding(what, _place(view, split, cropped=config.get_crop_size() is not None), id="image-size"))
    return findings


def image_sizes(config: SplitConfig, windows: Sequence[Window]) -> Counter[tuple[int, int]]:
    """How often the images of a split have which (width, height) in pixels."""
    crop: tuple[int, int] | None = config.get_crop_size()
    if crop is not None:
        return Counter({crop: len(windows)})
    return Counter((w.bounds[2] - w.bounds[0], w.bounds[3] - w.bounds[1]) for w in windows)


def _padded_sizes(pad: Pad) -> Counter[tuple[int, int]]:
    # It draws from [low, high).
    return Counter({(size, size): 1 for size in range(*pad.size)})


def _place(view: DatasetView, split: str, *, cropped: bool) -> KeyPath:
    if not cropped:
        return (*view.at, "path")
    for where in (f"{split}_config", "default_config"):
        own = view.config.get(where)
        for key in ("crop_size", "patch_size"):
            if isinstance(own, Mapping) and own.get(key) is not None:
                return (*view.at, where, key)
    return view.at


_MUCH_NODATA, _NEARLY_ALL_NODATA = 0.3, 0.95
_SENTINEL2 = frozenset({"sentinel2_l2a", "sentinel2_l1c", "sentinel2"})


@dataclass(frozen=True)
class InputSummary:
    """One input in the windows that were read.

    Attributes:
        name: the input.
        bands: number of bands.
        dates: fewest and most dates.
        units: what the values look like; empty where nothing is known of the modality.
        values: their range.
        nodata: share of pixels without a measurement.
    """

    name: str
    bands: int
    dates: tuple[int, int]
    units: str
    values: Range
    nodata: float


def check_images(view: DatasetView, name: str, stats: Mapping[str, ImageStats]) -> tuple[InputSummary, list[Finding]]:
    """Compare the values of one input with what its normalisation takes.

    Args:
        view: the dataset.
        name: the input.
        stats: what was read, by window.

    Returns:
        A summary, and what is wrong.
    """
    at = (*view.at, "inputs", name)
    who = f"dataset {view.name!r}: input {name!r}"
    found = list(stats.values())
    whole = _joined([image.whole for image in found])
    nodata = sum(image.nodata for image in found) / len(found)
    dates = (min(image.dates for image in found), max(image.dates for image in found))
    summary = InputSummary(name, len(found[0].bands), dates, units_of(name, whole) or "", whole, nodata)
    findings = []
    if nodata > _MUCH_NODATA:
        what = f"{who}: {nodata:.0%} of the pixels in {len(found)} windows are nodata"
        findings.append(Finding(what, at, error=nodata > _NEARLY_ALL_NODATA, id="image-nodata"))
    expected, place = _expected(view, name)
    if expected is not None:
        findings += _units(view, name, stats, expected=expected, at=place)
    if name in _SENTINEL2 and not findings:
        findings += _offset(who, stats, at)
    return summary, findings


def _expected(view: DatasetView, name: str) -> tuple[str | None, KeyPath]:
    """The units that the training transforms take, and the key that says so."""
    for normaliser, place in view.normalisers("train"):
        if name in normaliser.band_names:
            stated = getattr(normaliser, "sentinel1_units", "db")
            at = (*place, "sentinel1_units") if name == "sentinel1" else (*place, "band_names", name)
            return expected_units(name, stated), at
    return None, ()


def _units(
    view: DatasetView, name: str, stats: Mapping[str, ImageStats], *, expected: str, at: KeyPath
) -> list[Finding]:
    who = f"dataset {view.name!r}: input {name!r}"
    wrong = {window: units for window, image in stats.items() if (units := units_of(name, image.whole)) != expected}
    wrong = {window: units for window, units in wrong.items() if units is not None}
    if wrong:
        units, _ = Counter(wrong.values()).most_common(1)[0]
        example = next(window for window, found in wrong.items() if found == units)
        seen = stats[example].whole
        what = f"{who} looks like {units} in {len(wrong)} of {len(stats)} windows ({seen.low:.4g} .. {seen.high:.4g} "
        return [Finding(f"{what}in {example}); the normalisation takes {expected}", at, id="units")]
    names = bands_of(view, view.module.inputs[name])
    odd: dict[str, str] = {}
    for index, band in enumerate(_by_band(list(stats.values()))):
        units_here = units_of(name, band)
        if units_here not in (None, expected):
            label = names[index] if index < len(names) else str(index)
            odd[f"{label} like {units_here} ({band.low:.4g} .. {band.high:.4g})"] = str(units_here)
    what = f"{who}: band {listed(odd)}; the normalisation takes {expected}"
    # Clear water is as dark as that in the infrared: a band alone says nothing, while others are in range.
    return [Finding(what, at, error=set(odd.values()) != {EIGHT_BIT}, id="band-units")] if odd else []


def _offset(who: str, stats: Mapping[str, ImageStats], at: KeyPath) -> list[Finding]:
    darkest = [image.whole.low for image in stats.values()]
    groups = offset_groups(darkest)
    if groups is None:
        return [warning(_bright(who, darkest), at, id="offset-all")] if all_offset(darkest) else []
    what = f"{who}: {groups[0]} of {sum(groups)} windows carry the offset of +1000 of processing baseline 04.00, "
    what += f"{groups[1]} do not; subtract it where it is (rslearn: harmonize: true)"
    return [Finding(what, at, id="offset-some")]


def _bright(who: str, darkest: Sequence[float]) -> str:
    return (
        f"{who}: no value in {len(darkest)} windows is below {min(darkest):.0f}: they seem to carry the offset of "
        "+1000 of processing baseline 04.00; subtract it (rslearn: harmonize: true), unless all is as bright as sand"
    )


def _by_band(found: Sequence[ImageStats]) -> list[Range]:
    count = min(len(image.bands) for image in found)
    return [_joined([image.bands[index] for image in found]) for index in range(count)]


def _joined(ranges: Sequence[Range]) -> Range:
    result = NO_VALUES
    for values in ranges:
        result = result.joined(values)
    return result


def remark_constant(view: DatasetView, name: str, stats: Mapping[str, ImageStats]) -> list[Finding]:
    """A band that holds one value everywhere carries nothing, and is most often a band that was not downloaded."""
    names = bands_of(view, view.module.inputs[name])
    same = [
        names[index] if index < len(names) else str(index)
        for index, band in enumerate(_by_band(list(stats.values())))
        if band.low == band.high
    ]
    what = f"dataset {view.name!r}: input {name!r}: band {listed(same)} holds a single value in all windows read"
    return [warning(what, (*view.at, "inputs", name, "bands"), id="band-constant")] if same else []
