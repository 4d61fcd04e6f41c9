"""Does the dataset on disk have the layers and bands that the config asks for, in the order that it says?"""

from __future__ import annotations

from rslearn.config import LayerConfig
from rslearn.dataset.window import get_layer_and_group_from_dir_name
from rslearn.train.dataset import DataInput

from rslp.check.findings import Finding, KeyPath, listed
from rslp.check.view import SPLITS, View
from rslp.suggest import did_you_mean


def check_layers(view: View) -> list[Finding]:
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


def bands_of(view: View, spec: DataInput) -> list[str]:
    """The bands of a raster input, in the order in which a sample has them."""
    if spec.bands is not None:
        return list(spec.bands)
    config = view.dataset.layers.get(_layer_name(spec.layers[0], spec))
    index = spec.use_all_bands_in_order_of_band_set_idx or 0
    sets = config.band_sets if config else []
    return list(sets[index].bands or []) if index < len(sets) else []


def _layer_name(option: str, spec: DataInput) -> str:
    return option if spec.load_all_item_groups else get_layer_and_group_from_dir_name(option)[0]


def _check_layer(view: View, layer: str, config: LayerConfig, *, spec: DataInput, at: KeyPath) -> list[Finding]:
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


def _check_order(view: View) -> list[Finding]:
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
