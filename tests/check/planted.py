"""The faults that are planted in copies of the example: what is done, and where the check must find it.

Faults of one group are planted in one copy together: each must be found beside the others, and nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.check.copies import Copy

_DECODERS = "model.init_args.model.init_args.decoders"
DATA = "data.init_args.data_modules"


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: what it is.
        group: the copy that it is planted in.
        plant: does it, before stage 1 makes the run config (``after``: afterwards).
        file: the source file that must be named.
        marker: what stands in the line that must be named.
        message: what the message must hold.
    """

    name: str
    group: str
    plant: Callable[[Copy], None]
    file: str
    marker: str
    message: str
    after: bool = False


def _edit(file: str, old: str, new: str) -> Callable[[Copy], None]:
    return lambda copy: copy.edit(file, old, new)


def _both(file: str, old: str, new: str, place: str, change: Callable[[Any], None]) -> Callable[[Copy], None]:
    """Stage 1 knows the names of classes and arguments and would refuse it: change source and run config alike."""

    def plant(copy: Copy) -> None:
        copy.edit(file, old, new)

        def at_place(config: dict[str, Any]) -> None:
            node: Any = config
            for key in place.split("."):
                node = node[int(key)] if isinstance(node, list) else node[key]
            change(node)

        copy.edit_made(at_place)

    return plant


def _renamed(file: str, place: str, old: str, new: str) -> Callable[[Copy], None]:
    return _both(file, f"{old}:", f"{new}:", place, lambda node: node.update({new: node.pop(old)}))


def _class(file: str, module: str, old: str, new: str) -> Callable[[Copy], None]:
    """Misspell the class path of a decoder's module, ``task.position``."""
    place = f"{_DECODERS}.{module}"
    return _both(file, old, new, place, lambda node: node.update(class_path=node["class_path"].replace(old, new)))


def _callback(what: str) -> Callable[[Copy], None]:
    """Put a callback, with its arguments, before those that are there."""

    def plant(copy: Copy) -> None:
        text = (copy.path / "multi_dataset.yaml").read_text()
        new = f"callbacks: [{{class_path: {what}}}" + ("]" if "callbacks: []" in text else ", ")
        copy.edit("multi_dataset.yaml", "callbacks: []" if "callbacks: []" in text else "callbacks: [", new)

    return plant


def _each(dataset: str, splits: tuple[str, ...], layer: str, change: Callable[[Any], Any]) -> Callable[[Copy], None]:
    def plant(copy: Copy) -> None:
        for split in splits:
            for window in copy.windows(dataset, split):
                copy.edit_raster(window, layer, change)

    return plant


ALL = ("train", "val", "test")


def _offset_in_half(copy: Copy) -> None:
    for window in [w for split in ALL for w in copy.windows("fuel_moisture", split)][::2]:
        copy.edit_raster(window, "sentinel2", lambda v: np.where(v > 0, v + 1000, v).astype(v.dtype))


def _five_crops(config: dict[str, Any]) -> None:
    decoder = config["model"]["init_args"]["model"]["init_args"]["decoders"]["crop_type"]
    decoder[0]["init_args"]["out_channels"] = 5


def _class_nine(copy: Copy) -> None:
    def change(values: Any) -> Any:
        values[:, :3, :3] = 9
        return values

    copy.edit_raster(copy.windows("land_cover", "train")[0], "label", change)


def _config(copy: Copy, dataset: str, change: Callable[[dict[str, Any]], None]) -> None:
    copy.edit_json(copy.path / dataset / "config.json", change)


def _drop_band(config: dict[str, Any]) -> None:
    config["layers"]["sentinel2"]["band_sets"][0]["bands"][-1] = "B10"


def _duplicate(copy: Copy, source: str, target: str, change: Callable[[dict[str, Any]], None]) -> None:
    """A training window of one dataset stands in another one as a validation window."""
    window = copy.windows(source, "train")[0]
    twin = copy.path / target / "windows" / "example" / "twin"
    shutil.copytree(window.resolve(), twin)
    copy.edit_json(twin / "metadata.json", lambda meta: meta["options"].update(split="val"))
    if source != target:
        change_path = twin / "layers" / "label" / "data.geojson"
        copy.edit_json(change_path, lambda content: change(content["features"][0]["properties"]))


def _lose_layer(copy: Copy) -> None:
    for window in copy.windows("vessel_detection", "val"):
        (copy.own(window) / "layers" / "landsat" / "completed").unlink()


def _truncate(copy: Copy) -> None:
    window = copy.own(copy.windows("crop_type", "train")[0])
    (path,) = (window / "layers" / "sentinel1").glob("*/geotiff.tif")
    path.write_bytes(path.read_bytes()[:200])


def _break_metadata(copy: Copy) -> None:
    window = copy.own(copy.windows("crop_type", "train")[0])
    (window / "metadata.json").write_text('{"projection": ')


def _plateau_alone(copy: Copy) -> None:
    text = (copy.path / "multi_dataset.yaml").read_text()
    (copy.path / "multi_dataset.yaml").write_text(
        text.replace("MultiStepScheduler", "PlateauScheduler")
        .replace("milestones: [4, 6]", "patience: 2")
        .replace("gamma: 0.5", "factor: 0.5")
        .replace("  trainer:\n", "  trainer:\n    limit_val_batches: 0\n")
    )


def _no_objects(copy: Copy) -> None:
    for split in ALL:
        for window in copy.windows("vessel_detection", split):
            path = copy.own(window) / "layers" / "label" / "data.geojson"
            path.write_text(json.dumps({**json.loads(path.read_text()), "features": []}))


_LC = f"{DATA}.land_cover.init_args.task.init_args.tasks.land_cover.init_args"
_EIGHT_BIT = _each("vessel_detection", ALL, "landsat", lambda v: (v // 256).astype(np.uint8))
_REFLECTANCE = _each("land_cover", ALL, "sentinel2", lambda v: (v / 10000).astype(np.float32))
_POWER = _each("crop_type", ALL, "sentinel1", lambda v: (10 ** (v / 10)).astype(np.float32))
_DARK_BAND = "the normalisation takes digital numbers"


def _one_band_reflectance(copy: Copy) -> None:
    def change(values: Any) -> Any:
        values = values.astype(np.float32)
        values[0] /= 50000
        return values

    _each("vessel_detection", ALL, "landsat", change)(copy)


FAULTS = [
    # What the parser refuses.
    Fault("misspelt argument of a data module", "parser",
          _renamed("crop_type.yaml", f"{DATA}.crop_type.init_args", "batch_size", "batch_siz"),
          "crop_type.yaml", "batch_siz:", "no argument 'batch_siz'; did you mean batch_size?", after=True),
    Fault("misspelt argument of a task", "parser",
          _renamed("land_cover.yaml", _LC, "enable_miou_metric", "enable_miou_metrics"),
          "land_cover.yaml", "enable_miou_metrics:", "no argument 'enable_miou_metrics'", after=True),
    Fault("misspelt argument of the trainer", "parser",
          _renamed("multi_dataset.yaml", "trainer", "gradient_clip_val", "gradient_clip_vall"),
          "multi_dataset.yaml", "gradient_clip_vall:", "did you mean gradient_clip_val", after=True),
    Fault("wrong type", "parser", _edit("vessel_detection.yaml", "box_size: 15", "box_size: fifteen"),
          "vessel_detection.yaml", "box_size:", "expected int or null; got 'fifteen'"),
    Fault("a class name that YAML takes for a truth value", "parser",
          _edit("crop_type.yaml", "classes: [winter_cereal", "classes: [no"),
          "crop_type.yaml", "classes: [", "expected str; got False; write it in quotes"),
    Fault("wrong type in an override", "parser", _edit("multi_dataset.yaml", "lr: 0.0005", "lr: fast"),
          "multi_dataset.yaml", "lr: fast", "expected float; got 'fast'"),
    Fault("no such module", "parser",
          _class("fuel_moisture.yaml", "fuel_moisture.0", "pooling_decoder", "pooling_decodr"),
          "fuel_moisture.yaml", "pooling_decodr", "No module named", after=True),
    Fault("no such class", "parser", _class("crop_type.yaml", "crop_type.1", "ClassificationHead", "ClassificationHed"),
          "crop_type.yaml", "ClassificationHed", "did you mean ClassificationHead", after=True),
    # What the classes refuse.
    Fault("checkpoint of another size", "classes",
          _edit("multi_dataset.yaml", "encoder_embedding_size: 128", "encoder_embedding_size: 192"),
          "multi_dataset.yaml", "encoder_embedding_size:", "the embedding size is 128, the config says 192"),
    Fault("band that the encoder does not know", "classes",
          _edit("fuel_moisture.yaml", "sentinel1: [vv, vh]", "sentinel1: [vv, hv]"),
          "fuel_moisture.yaml", "sentinel1: [vv, hv]", "unknown band 'hv'"),
    Fault("raster without bands", "classes",
          _edit("vessel_detection.yaml", "        bands: [B8, B1, B2, B3, B4, B5, B6, B7, B9, B10, B11]\n", ""),
          "vessel_detection.yaml", "landsat:", "one of bands and use_all_bands"),
    Fault("bands in another order", "classes",
          _edit("land_cover.yaml", "sentinel2_l2a: [B02, B03, B04, B08", "sentinel2_l2a: [B04, B03, B02, B08"),
          "land_cover.yaml", "sentinel2_l2a: [B04", "takes the bands of sentinel2_l2a as B04, B03"),
    Fault("crop that the patch size does not divide", "classes",
          _edit("crop_type.yaml", "crop_size: 16", "crop_size: 20"),
          "crop_type.yaml", "crop_size:", "20x20 px are no multiple of the encoder's patch size 8"),
    # What the data contradicts.
    Fault("class that is not in the list", "data",
          lambda copy: copy.edit_label(copy.windows("crop_type", "train")[0], lambda p: p.update(crop="quinoa")),
          "crop_type.yaml", "classes:", "1 labels are not among the classes: quinoa"),
    Fault("linear power where dB is said", "data", _POWER,
          "crop_type.yaml", "sentinel1_units:", "looks like linear power .* takes dB"),
    Fault("class beyond num_classes", "data", _class_nine,
          "land_cover.yaml", "num_classes:", "pixels hold the class 9, but num_classes is 7"),
    Fault("reflectance instead of digital numbers", "data", _REFLECTANCE,
          "land_cover.yaml", "sentinel2_l2a: [", "looks like reflectance 0-1"),
    Fault("empty split", "data", _edit("fuel_moisture.yaml", "split: val", "split: valid"),
          "fuel_moisture.yaml", "val_config:", "windows have split: 'test', 'train', 'val'"),
    Fault("offset of baseline 04.00 in some windows", "data", _offset_in_half,
          "fuel_moisture.yaml", "sentinel2_l2a:", r"carry the offset of \+1000"),
    Fault("label without the property", "data",
          lambda copy: copy.edit_label(copy.windows("fuel_moisture", "train")[0], lambda p: p.pop("lfmc")),
          "fuel_moisture.yaml", "property_name:", "have no label with the property 'lfmc'"),
    Fault("8-bit instead of digital numbers", "data", _EIGHT_BIT,
          "vessel_detection.yaml", "landsat: [", "looks like 8-bit"),
    Fault("decoder with fewer outputs than classes", "data", lambda copy: copy.edit_made(_five_crops),
          "crop_type.yaml", "out_channels:", "5 outputs, but the task 'crop_type' has 6 classes", after=True),
    Fault("no object anywhere", "data", _no_objects,
          "vessel_detection.yaml", "property_name:", "no object with the property 'category'"),
    # What is not there, or twice.
    Fault("layer that the dataset lacks", "classes",
          _edit("crop_type.yaml", "layers: [sentinel1]", "layers: [sentinel_1]"),
          "crop_type.yaml", "layers: [sentinel_1]", "no layer 'sentinel_1'; did you mean sentinel1?"),
    Fault("held-out window of the same dataset on a training window", "more",
          lambda copy: _duplicate(copy, "land_cover", "land_cover", lambda _: None),
          "land_cover.yaml", "val_config:", "'land_cover': 1 of .* lie on its own training windows"),
    Fault("held-out window on another dataset's training window", "more",
          lambda copy: _duplicate(copy, "crop_type", "fuel_moisture", lambda p: p.update(lfmc=90.0)),
          "fuel_moisture.yaml", "val_config:", "'fuel_moisture': 1 of .* lie on training windows of 'crop_type'"),
    Fault("layer that no window of a split has", "more", _lose_layer,
          "vessel_detection.yaml", "layers: [landsat]", "no windows are left: .* lack a layer of input 'landsat'"),
    Fault("label that is no number", "more",
          lambda copy: copy.edit_label(copy.windows("fuel_moisture", "train")[1], lambda p: p.update(lfmc="n/a")),
          "fuel_moisture.yaml", "property_name:", "1 labels are no finite number: n/a"),
    # What is gone.
    Fault("no checkpoint", "gone", lambda copy: (copy.path / "encoder").unlink(),
          "multi_dataset.yaml", "helios_checkpoint_path: encoder", "encoder.* does not exist", after=True),
    Fault("no config.json", "gone", lambda copy: (copy.path / "land_cover" / "config.json").unlink(),
          "land_cover.yaml", "    path: land_cover", "has no config.json", after=True),
    Fault("no folder", "gone", lambda copy: shutil.rmtree(copy.path / "vessel_detection"),
          "vessel_detection.yaml", "    path: vessel_detection", "does not exist", after=True),
    Fault("band that the dataset lacks", "gone", lambda copy: _config(copy, "fuel_moisture", _drop_band),
          "fuel_moisture.yaml", "bands: [B02", "has no band B09"),
    Fault("broken metadata", "gone", _break_metadata,
          "crop_type.yaml", "    path: crop_type", "1 windows have no usable metadata: .*/metadata.json: JSON"),
    # What can't be read, or says nothing.
    Fault("truncated raster", "unreadable", _truncate,
          "crop_type.yaml", "    path: crop_type", "1 of .* windows can't be read, e.g. example/"),
    Fault("no measurement", "unreadable", _each("fuel_moisture", ALL, "sentinel2", lambda v: v * 0),
          "fuel_moisture.yaml", "sentinel2_l2a:", "100% of the pixels"),
    Fault("raster label read as a vector", "unreadable",
          _edit("land_cover.yaml", "targets:\n        data_type: raster", "targets:\n        data_type: vector"),
          "land_cover.yaml", "data_type: vector", "is raster, the input says vector"),
    Fault("one band as reflectance", "unreadable", _one_band_reflectance,
          "vessel_detection.yaml", "landsat: [", f"band B8 like reflectance .*{_DARK_BAND}"),
    Fault("plateau without a validation", "unreadable", _plateau_alone,
          "multi_dataset.yaml", "limit_val_batches: 0", "a plateau scheduler follows .*, and there is no valid"),
    # What the first step or the first epoch would show.
    Fault("negative learning rate", "training", _edit("multi_dataset.yaml", "lr: 0.0005", "lr: -0.0005"),
          "multi_dataset.yaml", "lr: -0.0005", "the optimizer can't be made: Invalid learning rate: -0.0005"),
    Fault("value that nothing logs", "training", _callback("lightning.pytorch.callbacks.EarlyStopping, init_args: "
          "{monitor: val_los}"), "multi_dataset.yaml", "callbacks:", "nothing logs 'val_los'; did you mean val_loss"),
    Fault("module that is not there", "training", _callback("rslp.train.Freeze, init_args: {modules: model.encoder.1}"),
          "multi_dataset.yaml", "callbacks:", "the model has no module 'model.encoder.1'; did you mean model.enc"),
    Fault("batch of nothing", "training", _edit("crop_type.yaml", "batch_size: 16", "batch_size: 0"),
          "crop_type.yaml", "batch_size:", "must be a whole number of at least 1, got 0"),
    # What only shows when layers meet.
    Fault("decoder of another width", "model", _edit("crop_type.yaml", "in_channels: {ENCODER_EMBEDDING_SIZE}",
          "in_channels: 64"), "crop_type.yaml", "crop_type:", "don't go through the model: RuntimeError"),
    Fault("detector without its image", "model", _edit("vessel_detection.yaml", "output_selector: image",
          "output_selector: picture"), "vessel_detection.yaml", "vessel_detection:", "don't go through the model: Key"),
]  # fmt: skip

GROUPS = list(dict.fromkeys(fault.group for fault in FAULTS))


def pattern(copy: Copy, fault: Fault) -> re.Pattern[str]:
    """What the line about a fault must look like."""
    place = f"{re.escape(str(copy.path / fault.file))}:{copy.line(fault.file, fault.marker)}: "
    return re.compile(place + r"[\w.+-]+: .*" + fault.message)
