"""Each argument of rslearn's data module, splits and inputs changes what samples hold, with a sample cache and without.

The sample cache is filled with the unchanged arguments first: what an argument changes must not be answered from there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rslearn.dataset import Dataset
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import GeotiffRasterFormat
from upath import UPath

from rslp.config import without_effect
from rslp.data import samples
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import ConfigError, DataError
from tests.arguments.effects import Effects, cases, made, outcome, pair
from tests.tiny import SIZE, data_module_config, write_dataset

pytestmark = pytest.mark.filterwarnings("ignore")
_D = "rslearn.train.dataset"
_FLIP = {"class_path": "rslearn.train.transforms.flip.Flip"}
_CROPS = {"crop_size": 4, "load_all_crops": True}
EFFECTS = {
    "rslearn.train.data_module.RslearnDataModule": Effects(
        data_module_config("DATA", {"d": "classify"})["init_args"] | {"default_config": {"tags": {"split": "train"}}},
        {
            "inputs": {"image": {"data_type": "raster", "layers": ["image"], "bands": ["b"], "passthrough": True}},
            "task": {
                "class_path": "rslearn.train.tasks.classification.ClassificationTask",
                "init_args": {"property_name": "value", "classes": ["high", "low"]},
            },
            "path": "OTHER",
            "batch_size": 3,
            "default_config": {"tags": {"split": "train"}, "crop_size": 4},
            "train_config": {"tags": {"split": "val"}},
            "val_config": {"tags": {"split": "test"}},
            "test_config": {"tags": {"split": "val"}},
            "predict_config": {"tags": {"split": "val"}},
        },
    ),
    f"{_D}.SplitConfig": Effects(
        {"tags": {"split": "train"}},
        {
            "groups": ["default"],
            "names": ["w001"],
            "tags": {"split": "val"},
            "num_samples": 2,
            "transforms": [_FLIP],
            "crop_size": 4,
            "overlap_pixels": 2,
            "load_all_crops": True,
            "patch_size": 4,
            "overlap_ratio": 0.5,
            "load_all_patches": True,
        },
        {
            "overlap_pixels": _CROPS,
            "overlap_ratio": _CROPS,
            "load_all_crops": {"crop_size": 4},
            "load_all_patches": {"crop_size": 4},
        },
    ),
    f"{_D}.DataInput": Effects(
        {"data_type": "raster", "layers": ["image"], "bands": ["a", "b"], "passthrough": True},
        {
            "data_type": "vector",
            "layers": ["image.1"],
            "bands": ["b"],
            "use_all_bands_in_order_of_band_set_idx": 0,
            "required": False,
            "passthrough": False,
            "is_target": True,
            "dtype": "INT32",
            "load_all_layers": True,
            "load_all_item_groups": True,
            "resolution_factor": "1/2",
        },
        {
            "use_all_bands_in_order_of_band_set_idx": {"bands": None},
            "required": {"layers": ["image.2"]},
            "load_all_layers": {"layers": ["image", "image.1"]},
            "load_all_item_groups": {"load_all_layers": True},
        },
    ),
}
# Arguments of which nothing is seen, with a value that asks for something.
NOTED: dict[str, dict[str, Any]] = {
    "RslearnDataModule": {
        "num_workers": 3,
        "init_workers": 2,
        "name": "else",
        "use_in_memory_dataset": True,
        "use_in_memory_all_crops_dataset": True,
        "use_map_all_crops_dataset": True,
        "index_mode": "USE",
    },
    "SplitConfig": {
        "num_patches": 1,
        "output_layer_name_skip_inference_if_exists": "label",
    },
    "DataInput": {"resampling": "bilinear"},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Two datasets; the windows of one have two item groups of images, and one window lies in a group of its own."""
    folder = tmp_path_factory.mktemp("data")
    found = {name: write_dataset(folder / name, "classify", train=3, val=2, test=1) for name in ("DATA", "OTHER")}
    draw = np.random.default_rng(0)
    for window in Dataset(UPath(found["DATA"])).load_windows():
        with window.data.open_layer_writer("image") as writer:
            for group in (0, 1):
                image = draw.normal(3 * group, 1, (2, SIZE, SIZE)).astype(np.float32)
                raster = RasterArray(chw_array=image, time_range=window.time_range)
                form = GeotiffRasterFormat()
                writer.write_raster(["a", "b"], form, window.projection, window.bounds, raster, group_idx=group)
        window.mark_layer_completed("image", group_idx=1)
    (found["DATA"] / "windows" / "elsewhere").mkdir()
    lone = (found["DATA"] / "windows" / "default" / "w000").rename(found["DATA"] / "windows" / "elsewhere" / "w900")
    metadata = json.loads((lone / "metadata.json").read_text()) | {"group": "elsewhere", "name": "w900"}
    (lone / "metadata.json").write_text(json.dumps(metadata))
    return found


def described(cls: str, arguments: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The data module's arguments in which those of a class stand at their place."""
    module = copy.deepcopy(dict(EFFECTS["rslearn.train.data_module.RslearnDataModule"].base))
    if cls == "RslearnDataModule":
        module |= copy.deepcopy(dict(arguments))
        if "label_d" not in module["inputs"]:
            module["inputs"]["label_d"] = {"data_type": "vector", "layers": ["label"], "is_target": True}
        if "tasks" not in module["task"]["init_args"]:
            tasks = {"tasks": {"d": module["task"]}, "input_mapping": {"d": {"label_d": "targets"}}}
            module["task"] = {"class_path": "rslearn.train.tasks.multi_task.MultiTask", "init_args": tasks}
    elif cls == "SplitConfig":
        module |= {"default_config": {}, "train_config": dict(arguments)}
    else:
        module["inputs"]["image"] = dict(arguments)
    return module | {"path": str(paths[module["path"]])}


def seen(module: Mapping[str, Any], store: str) -> Any:
    """Everything that a run sees of a dataset: its batch size, and all samples of all splits."""

    key = json.dumps([module, store])
    if store != "off" or key not in _SEEN:
        _SEEN[key] = outcome(lambda: _look(module, store))
    return _SEEN[key]


# What was seen without a sample cache.
_SEEN: dict[str, Any] = {}


def _look(module: Mapping[str, Any], store: str) -> dict[str, Any]:
    described = made("rslearn.train.data_module.RslearnDataModule", module)
    data = MultiDatasetDataModule({"d": described}, num_workers=0, store=store)
    found: dict[str, Any] = {"batch": data.batch_sizes}
    for split in ("train", "val", "test", "predict"):
        found[split] = outcome(lambda split=split: _samples(data, split))  # type: ignore[misc]
    return found


def _samples(data: MultiDatasetDataModule, split: str) -> list[Any]:
    source = data.sources(split)["d"]
    draws = [outcome(lambda i=i, draw=draw: source.sample(i, draw=draw)) for i in range(len(source)) for draw in (0, 1)]  # type: ignore[misc]
    return [source.identity(i) for i in range(len(source))] + draws


@pytest.mark.parametrize("case", cases(EFFECTS))
def test_effect(case: str, paths: Mapping[str, Path], tmp_path: Path) -> None:
    cls = case.partition(".")[0]
    _, base, changed = pair(EFFECTS, case)
    one, other = (described(cls, arguments, paths) for arguments in (base, changed))
    without = seen(one, "off")
    assert without != seen(other, "off")
    assert seen(one, str(tmp_path)) == without
    assert seen(other, str(tmp_path)) == seen(other, "off")


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in NOTED.items() for name in names])
def test_what_is_noted_has_no_effect(cls: str, name: str, paths: Mapping[str, Path]) -> None:
    path = next(path for path in EFFECTS if path.endswith(cls))
    base = EFFECTS[path].base
    changed = {**base, name: NOTED[cls][name]}
    one, other = (described(cls, arguments, paths) for arguments in (base, changed))
    assert seen(one, "off") == seen(other, "off")
    config = {"data": {"init_args": {"data_modules": {"d": {"init_args": other}}}}}
    ((rule, (at,)),) = without_effect(config)
    assert (rule.name, at[-1]) == (name, name)


class _Flaky:
    """A reader whose file system fails a number of times."""

    def __init__(self, read: Any, failures: int) -> None:
        self.read, self.failures, self.calls = read, failures, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if options["inputs"].keys() == {"image"} and self.failures > 0:
            self.failures -= 1
            options["rng"].random()
            raise OSError("the file system is away")
        return self.read(*args, **options)


def test_a_read_that_fails_is_tried_again_as_often_as_retries_says(
    paths: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(samples.time, "sleep", pauses.append)
    described_ = described("DataInput", {**EFFECTS[f"{_D}.DataInput"].base, "layers": ["image", "image.1"]}, paths)
    found = []
    for retries, failures in ((0, 0), (2, 2), (2, 3)):
        module = made("rslearn.train.data_module.RslearnDataModule", {**described_, "retries": retries})
        source = MultiDatasetDataModule({"d": module}, num_workers=0, store="off").sources("train")["d"]
        monkeypatch.setattr(source._windows, "read", _Flaky(source._windows.read, failures), raising=False)
        if failures > retries:
            with pytest.raises(DataError, match="the file system is away"):
                source.sample(0)
        else:
            # The same item group is drawn, however often it was tried.
            found.append([outcome(lambda draw=draw, s=source: s.sample(0, draw=draw)) for draw in range(4)])  # type: ignore[misc]
    assert found[0] == found[1]
    assert pauses == [samples.RETRY_SECONDS] * 4


@pytest.mark.parametrize(
    ("split", "changed", "message"),
    [
        ("train", {"skip_targets": True}, "skip_targets: is not supported"),
        ("val", {"skip_targets": True}, "skip_targets: is not supported"),
        ("val", {"load_all_crops": True}, "load_all_crops: needs crop_size"),
        ("train", {"crop_size": 0}, "crop_size: must be at least 1 pixel; got 0"),
        ("test", {**_CROPS, "overlap_pixels": 4}, "overlap_pixels: must be less than crop_size; got 4 of 4 pixels"),
    ],
)
def test_a_split_without_labels_or_pixels_is_refused(
    split: str, changed: dict[str, Any], message: str, paths: Mapping[str, Path]
) -> None:
    module = described("RslearnDataModule", {"path": "DATA"}, paths) | {f"{split}_config": changed}
    with pytest.raises(ConfigError, match=rf"data_modules\.d\.init_args\.{split}_config: {message}"):
        MultiDatasetDataModule({"d": made("rslearn.train.data_module.RslearnDataModule", module)}, num_workers=0)
    sound = described("DataInput", EFFECTS[f"{_D}.DataInput"].base, paths)
    both = {
        name: made("rslearn.train.data_module.RslearnDataModule", one) for name, one in (("d", module), ("e", sound))
    }
    assert MultiDatasetDataModule(both, disabled_datasets=["d"], num_workers=0).data_modules.keys() == {"e"}


def test_a_test_split_without_labels_is_predicted_and_not_evaluated(paths: Mapping[str, Path]) -> None:
    module = described("RslearnDataModule", {"path": "DATA"}, paths) | {"test_config": {"skip_targets": True}}
    data = MultiDatasetDataModule({"d": made("rslearn.train.data_module.RslearnDataModule", module)}, store="off")
    with pytest.raises(DataError, match="split 'test': skip_targets is not supported"):
        data.sources("test")
    data.predict_test_split(["d"])
    _, targets, _ = data.sources("predict")["d"].sample(0)
    assert targets == {"d": {}}


def test_options_of_the_path_reach_the_file_system() -> None:
    path = UPath("memory://arguments/config.json")
    path.parent.mkdir()
    path.write_text('{"layers": {}}')
    described_ = described("RslearnDataModule", {"path": "DATA"}, {"DATA": Path("x")})
    options = {"path": "memory://arguments", "path_options": {"skip_instance_cache": True}}
    module = made("rslearn.train.data_module.RslearnDataModule", described_ | options)
    assert samples.open_dataset("d", module).path.storage_options == options["path_options"]
