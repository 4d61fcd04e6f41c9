"""The dataset config of a dataset: what stage 1 takes, by kind of task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rslp.datasets.config import Encoder, TaskName
from rslp.helios.encoders import ENCODERS
from rslp.io import dump_yaml

_TASKS = "rslearn.train.tasks"
_TRANSFORMS = "rslearn.train.transforms"
# The bands that an encoder takes, in its order, where that normalises by itself and knows them by position alone.
ENCODER_BANDS = {
    spec.name.lower(): {one.name: list(one.bands) for one in spec.inputs} for spec in ENCODERS if spec.normalises
}
# By what values in some units are divided to become digital numbers.
_DIVISORS = {"reflectance": 1e-4, "reflectance_8bit": 0.0255}


def ordered_bands(encoder: Encoder, name: str, bands: Sequence[str]) -> list[str]:
    """The bands of an input in the order in which an encoder takes them, if it knows them by position."""
    taken = ENCODER_BANDS.get(encoder, {}).get(name, ())
    return list(taken) if taken and set(taken) <= set(bands) else list(bands)


@dataclass(frozen=True, kw_only=True)
class InputOf:
    """One input.

    Attributes:
        layer: the layer that holds it.
        bands: its bands, in the order in which a sample has them.
        units: the unit of its values; None for inputs without known units.
        required: whether windows without it are left out.
        all_groups: whether the layer has an item group for each date, all of which are read.
    """

    layer: str
    bands: Sequence[str]
    units: str | None = None
    required: bool = True
    all_groups: bool = False


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a dataset config depends on.

    Attributes:
        path: the dataset's folder, as the config names it.
        task: the kind of task.
        name: the task's name.
        inputs: by name.
        label_layer: the layer with the labels.
        label_bands: the band of a label raster.
        column: the property with the label.
        classes: the names of the classes in order.
        nodata: the value of pixels without a label.
        spread: standard deviation of a regression's labels.
        box_size: see ``Labels``.
        size: side of the windows, px.
        splits: the splits that have windows, and the tag by which they are chosen.
        encoder: the encoder for which values are normalised.
        group: the group of windows; None for all.
    """

    path: str
    task: TaskName
    name: str
    inputs: Mapping[str, InputOf]
    label_layer: str
    label_bands: Sequence[str] = ("label",)
    column: str = "label"
    classes: Sequence[str] = ()
    nodata: float | None = None
    spread: float = 1.0
    box_size: int | None = None
    size: int = 1
    splits: Sequence[str] = ("train", "val", "test")
    encoder: Encoder = "helios"
    group: str | None = None
    header: Sequence[str] = field(default=())


def dataset_config(facts: Facts) -> str:
    """The text of a dataset config."""
    inputs: dict[str, Any] = {
        name: {
            "data_type": "raster",
            "layers": [spec.layer],
            "bands": list(spec.bands),
            "dtype": "FLOAT32",
            "passthrough": True,
            **({} if spec.required else {"required": False}),
            **({"load_all_layers": True, "load_all_item_groups": True} if spec.all_groups else {}),
        }
        for name, spec in facts.inputs.items()
    }
    dense = facts.task in ("segmentation", "per_pixel_regression")
    raster = {"bands": list(facts.label_bands), "dtype": "INT32" if facts.task == "segmentation" else "FLOAT32"}
    inputs["targets"] = {
        "data_type": "raster" if dense else "vector",
        "layers": [facts.label_layer],
        **(raster if dense else {}),
        "is_target": True,
    }
    normalise = _normalise(facts)
    extra = _image(facts) if facts.task == "detection" else []
    arguments: dict[str, Any] = {
        "path": facts.path,
        "inputs": inputs,
        "task": _class(
            f"{_TASKS}.multi_task.MultiTask",
            tasks={facts.name: _task(facts)},
            input_mapping={facts.name: {"targets": "targets"}},
        ),
        "batch_size": 8,
        "default_config": {**({"groups": [facts.group]} if facts.group else {}), "transforms": [*normalise, *extra]},
        "train_config": {"tags": {"split": "train"}, "transforms": [*normalise, *_flip(facts), *extra]},
        "val_config": {"tags": {"split": "val"}},
    }
    # Without a third split, the test is the validation.
    arguments["test_config"] = {"tags": {"split": "test" if "test" in facts.splits else "val"}}
    tree = {
        "model": _class(
            "rslp.train.JointModule", model=_class("rslp.train.JointModel", decoders={facts.name: _decoder(facts)})
        ),
        "data": _class("rslearn.train.data_module.RslearnDataModule", **arguments),
    }
    header = "".join(f"# {line}\n" for line in facts.header)
    text = dump_yaml(tree)
    # Placeholders of stage 1, whose values are numbers.
    for name in ("ENCODER_EMBEDDING_SIZE", "PATCH_SIZE"):
        text = text.replace(f"'{{{name}}}'", f"{{{name}}}")
    return header + text


def _class(path: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments} if arguments else {"class_path": path}


def _normalise(facts: Facts) -> list[dict[str, Any]]:
    """The transforms that bring values to what the encoder takes."""
    if facts.encoder == "helios":
        bands = {name: list(spec.bands) for name, spec in facts.inputs.items()}
        units = {name: spec.units or "" for name, spec in facts.inputs.items()}
        arguments: dict[str, Any] = {"band_names": bands}
        if "sentinel1" in bands:
            arguments["sentinel1_units"] = "db" if units["sentinel1"] == "db" else "linear"
        if units.get("sentinel2_l2a") in _DIVISORS:
            arguments["optical_units"] = units["sentinel2_l2a"]
        if not all(spec.required for spec in facts.inputs.values()):
            arguments["skip_missing"] = True
        return [_class("rslp.helios.norm.HeliosNormalize", **arguments)]
    # These normalise digital numbers and dB by themselves.
    raw = {name: spec.units or "" for name, spec in facts.inputs.items() if facts.encoder != "none"}
    optional = {name: {} if spec.required else {"skip_missing": True} for name, spec in facts.inputs.items()}
    converted: dict[str, tuple[str, dict[str, Any]]] = {
        name: (f"{_TRANSFORMS}.sentinel1.Sentinel1ToDecibels", {}) for name in raw if raw[name] == "linear"
    }
    converted |= {
        name: (f"{_TRANSFORMS}.normalize.Normalize", {"mean": 0, "std": _DIVISORS[unit]})
        for name, unit in raw.items()
        if unit in _DIVISORS
    }
    return [
        _class(path, **arguments, selectors=[name], **optional[name]) for name, (path, arguments) in converted.items()
    ]


def _flip(facts: Facts) -> list[dict[str, Any]]:
    if facts.size == 1:
        return []
    images = list(facts.inputs)
    if facts.task == "segmentation":
        images += [f"target/{facts.name}/classes", f"target/{facts.name}/valid"]
    if facts.task == "per_pixel_regression":
        images += [f"target/{facts.name}/values", f"target/{facts.name}/valid"]
    boxes = {"box_selectors": [f"target/{facts.name}"]} if facts.task == "detection" else {}
    return [_class("rslearn.train.transforms.flip.Flip", image_selectors=images, **boxes)]


def _image(facts: Facts) -> list[dict[str, Any]]:
    """The detector reads the size of the image from an input of this name; one band of it is enough."""
    first = next(iter(facts.inputs))
    return [
        _class("rslearn.train.transforms.concatenate.Concatenate", selections={first: [0]}, output_selector="image")
    ]


def _scale(spread: float) -> float:
    """A factor, one digit long, that brings numbers of this spread to numbers around one."""
    return float(f"{1 / spread:.0e}") if spread > 0 else 1.0


def _task(facts: Facts) -> dict[str, Any]:
    if facts.task == "classification":
        return _class(
            f"{_TASKS}.classification.ClassificationTask",
            property_name=facts.column,
            classes=list(facts.classes),
            metric_kwargs={"average": "macro"},
        )
    if facts.task == "regression":
        return _class(
            f"{_TASKS}.regression.RegressionTask",
            property_name=facts.column,
            scale_factor=_scale(facts.spread),
            metrics=["r2", "rmse"],
        )
    if facts.task == "segmentation":
        return _class(
            f"{_TASKS}.segmentation.SegmentationTask",
            num_classes=len(facts.classes),
            class_names=list(facts.classes),
            **({} if facts.nodata is None else {"nodata_value": int(facts.nodata)}),
            enable_miou_metric=True,
        )
    if facts.task == "per_pixel_regression":
        return _class(
            f"{_TASKS}.per_pixel_regression.PerPixelRegressionTask",
            scale_factor=_scale(facts.spread),
            **({} if facts.nodata is None else {"nodata_value": facts.nodata}),
            metrics=["r2", "rmse"],
        )
    return _class(
        f"{_TASKS}.detection.DetectionTask",
        property_name=facts.column,
        # The first class of a detector is the background.
        classes=["background", *facts.classes],
        **({} if facts.box_size is None else {"box_size": facts.box_size}),
        exclude_by_center=True,
        enable_map_metric=False,
        enable_f1_metric=True,
    )


def _decoder(facts: Facts) -> list[dict[str, Any]]:
    embedding = "{ENCODER_EMBEDDING_SIZE}"
    if facts.task in ("classification", "regression"):
        kind = facts.task
        pooling = _class(
            "rslearn.models.pooling_decoder.PoolingDecoder",
            in_channels=embedding,
            out_channels=len(facts.classes) if kind == "classification" else 1,
            num_fc_layers=1,
            fc_channels=128,
        )
        return [pooling, _class(f"{_TASKS}.{kind}.{kind.title()}Head")]
    if facts.task == "detection":
        anchor = 2 * facts.box_size if facts.box_size else max(4, facts.size // 4)
        conv = _class("rslearn.models.conv.Conv", in_channels=embedding, out_channels=16, kernel_size=1)
        detector = _class(
            "rslearn.models.faster_rcnn.FasterRCNN",
            downsample_factors=["{PATCH_SIZE}"],
            num_channels=16,
            num_classes=len(facts.classes) + 1,
            anchor_sizes=[[anchor]],
        )
        return [conv, detector]
    unet = _class(
        "rslearn.models.unet.UNetDecoder",
        in_channels=[["{PATCH_SIZE}", embedding]],
        out_channels=len(facts.classes) if facts.task == "segmentation" else 1,
        num_channels={4: 64, 2: 32, 1: 16},
    )
    head = (
        "segmentation.SegmentationHead"
        if facts.task == "segmentation"
        else "per_pixel_regression.PerPixelRegressionHead"
    )
    return [unet, _class(f"{_TASKS}.{head}")]
