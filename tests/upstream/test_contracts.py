"""The private parts of rslearn and of the encoders' package that we touch are where we think they are."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from jsonargparse import ArgumentParser, _common, _typehints, _util
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn import flexi_vit
from rasterio.crs import CRS
from rslearn.config import LayerType
from rslearn.dataset import Dataset
from rslearn.models.galileo.galileo import GalileoModel, GalileoSize
from rslearn.models.olmoearth_pretrain.model import OlmoEarth
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, ModelDataset, SplitConfig
from rslearn.train.model_context import ModelContext, RasterImage, SampleMetadata
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.regression import RegressionAccuracy, RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.utils import raster_format, vector_format
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry
from rslearn.utils.raster_array import RasterArray
from torch.optim.swa_utils import AveragedModel
from upath import UPath

from rslp import upstream
from rslp.errors import CheckpointError, DataError
from rslp.helios.model import Helios
from rslp.models.joint import JointModel
from rslp.train.metric_types import WithinFactor
from rslp.train.metrics import precise_metrics
from rslp.upstream import datasets
from rslp.upstream.nodata import NodataFormat
from tests.helios import tiny_helios
from tests.helios.test_series import write_galileo
from tests.tiny import write_dataset

METADATA = SampleMetadata(
    window_group="g", window_name="w", window_bounds=(0, 0, 4, 4), crop_bounds=(0, 0, 4, 4), crop_idx=0,
    num_crops_in_window=1, time_range=None, projection=None, dataset_source=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "crops", "classify", train=5, size=16)


def inputs() -> dict[str, DataInput]:
    return {
        "image": DataInput("raster", ["image"], bands=["a", "b"], passthrough=True),
        "targets": DataInput("vector", ["label"], is_target=True),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"tags": {"split": "train"}},
        {"tags": {"split": ""}},
        {"groups": ["default"], "tags": {"split": "val"}},
        {"names": ["w001", "w004"]},
        {"num_samples": 3},
        {"tags": {"split": "nowhere"}},
    ],
)
def test_windows_are_listed_as_rslearn_lists_them(path: Path, settings: dict[str, Any]) -> None:
    config = SplitConfig(**settings)
    task = ClassificationTask(property_name="value", classes=["low", "high"])
    stock = ModelDataset(Dataset(UPath(path)), config, inputs(), task, workers=0)
    ours = upstream.list_windows(Dataset(UPath(path)), inputs(), config)
    assert [w.name for w in ours] == [w.name for w in stock.get_dataset_examples()]


def test_vector_formats_are_made_once_and_read_the_same(path: Path) -> None:
    plain, kept = Dataset(UPath(path)), upstream.keep_formats(Dataset(UPath(path)))
    (layer,) = [layer for layer in kept.layers.values() if layer.type == LayerType.VECTOR]
    assert layer.instantiate_vector_format() is layer.instantiate_vector_format()
    window = upstream.list_windows(plain, inputs(), SplitConfig(tags={"split": "train"}))[0]
    found = []
    for dataset in (plain, kept):
        raw = upstream.read_inputs(
            dataset, window, bounds=window.bounds, inputs={"targets": inputs()["targets"]}, rng=random.Random(0)
        )
        found.append([feature.to_geojson() for feature in raw["targets"]])  # type: ignore[union-attr]
    assert found[0] == found[1]
    assert len(found[0]) == 1


def test_a_dataset_that_marks_nodata_leaves_the_given_one_as_it_is(path: Path) -> None:
    dataset = Dataset(UPath(path))
    (plain,) = [band_set.instantiate_raster_format() for band_set in dataset.layers["image"].band_sets]
    marking = upstream.with_nodata_marked(dataset, inputs()["image"])
    (band_set,) = marking.layers["image"].band_sets
    assert isinstance(band_set.instantiate_raster_format(), NodataFormat)
    assert dataset.layers["image"].band_sets[0].instantiate_raster_format() is plain
    assert marking.layers["label"] is dataset.layers["label"]
    assert upstream.with_nodata_marked(dataset, inputs()["targets"]) is dataset


def test_the_parser_asks_before_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(callable(part.check_import_path) for part in (_common, _util, _typehints))
    upstream.prepare_parser()
    (tmp_path / "unheard_of.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--module", type=torch.nn.Module)
    parser.add_argument("--function", type=Callable)
    parser.add_argument("--anything", type=Any)
    for name, value in (("module", {"class_path": "unheard_of.Thing"}), ("function", "unheard_of.Thing")):
        with pytest.raises(ArgumentError, match=r"\-\-trust\+=unheard_of"):
            parser.parse_object({name: value})
    with pytest.raises(ArgumentError, match="correspond to a subclass of Module"):
        parser.parse_object({"anything": {"class_path": "upath.UPath"}})
    assert "unheard_of" not in sys.modules
    made = parser.instantiate_classes(parser.parse_object({"anything": {"class_path": "torch.nn.Identity"}}))
    assert isinstance(made.anything, torch.nn.Identity)


def test_a_crop_lies_in_the_window_or_around_it(path: Path) -> None:
    window = upstream.list_windows(Dataset(UPath(path)), inputs(), SplitConfig(names=["w002"]))[0]
    x0, y0, x1, y1 = window.bounds
    rng = random.Random(0)
    for size in ((8, 8), (16, 16), (5, 24), (40, 40)):
        for _ in range(20):
            left, top, right, bottom = upstream.draw_crop(window.bounds, size, rng)
            assert (right - left, bottom - top) == size
            assert left >= x0 and right <= x1 if size[0] <= 16 else left <= x0 and right >= x1
            assert top >= y0 and bottom <= y1 if size[1] <= 16 else top <= y0 and bottom >= y1
    assert upstream.draw_crop(window.bounds, None, rng) == window.bounds


def test_split_settings_are_read_merged(path: Path) -> None:
    module = RslearnDataModule(
        inputs=inputs(),
        task=SegmentationTask(num_classes=2),
        path=str(path),
        default_config=SplitConfig(groups=["default"], crop_size=8),
        val_config=SplitConfig(tags={"split": "val"}, load_all_crops=True),
    )
    config = upstream.split_config(module, "val")
    assert (config.groups, config.tags) == (["default"], {"split": "val"})
    window = upstream.list_windows(Dataset(UPath(path)), inputs(), config)[0]
    assert len(upstream.all_crops(window.bounds, config)) == 4


def helios(folder: Path) -> Helios:
    return Helios(str(folder), patch_size=4, random_initialization=True)


def rslearns(folder: Path) -> OlmoEarth:
    encoder = OlmoEarth(4, model_path=str(folder), random_initialization=True, use_legacy_timestamps=False)
    JointModel([encoder], {"task": [torch.nn.Identity()]})  # type: ignore[list-item]
    return encoder


@pytest.mark.parametrize("wrapped", [helios, rslearns])
@pytest.mark.parametrize("given", [["sentinel1", "sentinel2_l2a"], ["sentinel2_l2a", "sentinel1"]])
def test_tokens_lie_in_the_models_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: Any, given: list[str]
) -> None:
    """Holds for this version of the package, whose own order is that of a set."""
    assert version("olmoearth-pretrain-minimal") == "0.1.5"
    monkeypatch.setattr(flexi_vit, "get_modalities_to_process", lambda available, _: available)
    encoder = wrapped(tiny_helios.write_config(tmp_path, tiny_helios.config())).model
    assert encoder.supported_modality_names.index("sentinel2_l2a") < encoder.supported_modality_names.index("sentinel1")
    parts = {name: torch.full((1, 1, 1), float(name == "sentinel1")) for name in given}
    tokens, _ = encoder.collapse_and_combine_hwtc(parts | {f"{name}_mask": torch.zeros(1, 1) for name in given})
    assert tokens.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("kind", "options"), [("regression", {"use_accuracy_metric": True}), ("per pixel", {})])
def test_sums_are_in_double_precision(kind: str, options: dict[str, Any]) -> None:
    task: Any = (RegressionTask if kind == "regression" else PerPixelRegressionTask)(
        **({"property_name": "p"} if kind == "regression" else {}), metrics=["mse", "l1", "r2", "mape"], **options
    )
    metrics = precise_metrics(task.get_metrics())
    for name, wrapper in metrics.items():
        states = [getattr(wrapper.metric, state) for state in wrapper.metric._defaults]
        assert states, name
        assert all(value.dtype in (torch.float64, torch.int64) for value in states), name
        if name == "accuracy":
            assert isinstance(wrapper.metric, WithinFactor)


def test_a_share_within_a_factor_is_rslearns_and_adds_up() -> None:
    preds, labels = torch.tensor([1.0, 1.4, 3.0, 0.2]), torch.tensor([1.1, 1.0, 3.0, 1.0])
    stock, ours = RegressionAccuracy(0.2), WithinFactor(0.2)
    for part in (slice(0, 1), slice(1, 4)):
        stock.update(preds[part], labels[part])
        ours.update(preds[part], labels[part])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert float(ours.compute()) == float(stock.compute()) == 0.5


def test_one_metric_that_cannot_be_computed_leaves_the_others() -> None:
    """Torchmetrics refuses R2 of one sample, and its collection gives nothing then."""
    task = RegressionTask(property_name="p", metrics=["mse", "r2"])
    metrics = precise_metrics(task.get_metrics())
    metrics.update([torch.tensor(1.0)], [{"value": torch.tensor(3.0), "valid": torch.tensor(1.0)}])
    with pytest.raises(ValueError, match="at least two samples"):
        metrics.compute()
    assert upstream.scalars(metrics) == {"mse": 4.0, "r2": None}


def test_states_lie_where_a_resample_sets_them() -> None:
    """Beside the attributes that torch registers, by the names of the defaults."""
    metric = precise_metrics(RegressionTask(property_name="p", metrics=["mse"]).get_metrics())["mse"]
    states = upstream.SampleStates([metric])
    for error in (1.0, 2.0, 5.0):
        target = {"value": torch.tensor(0.0), "valid": torch.tensor(1.0)}
        states.add(lambda one, error=error, target=target: one.update([torch.tensor(error)], [target]))
    resample = states.resampler()
    for counts, expected in (([1, 1, 1], 10.0), ([2, 1, 0], 2.0), ([0, 0, 3], 25.0)):
        resample(np.array(counts))
        assert float(metric.compute()) == expected


def test_mean_average_precision_without_an_object_is_no_value() -> None:
    task = DetectionTask(property_name="p", classes=["bg", "thing"])
    metrics = precise_metrics(task.get_metrics())
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    metrics.update([nothing | {"scores": torch.zeros(0)}], [nothing | {"valid": torch.tensor(1)}])
    assert float(metrics.compute()["mAP"]) == -1
    assert upstream.scalars(metrics) == {"mAP": None}


def test_rslearns_filters_skip_nothing_and_ours_do() -> None:
    """Should rslearn mend its loop, ours is not needed any more."""
    task = ClassificationTask(property_name="value", classes=["low", "high"], filters=[("checked", "yes")])
    projection = Projection(CRS.from_epsg(32631), 10, -10)
    shape = STGeometry(projection, shapely.Point(1, 1), None)
    features = [
        Feature(shape, {"value": "low", "checked": "no"}),
        Feature(shape, {"value": "low"}),
        Feature(shape, None),
        Feature(shape, {"value": "high", "checked": "yes"}),
    ]
    raw: upstream.RawInputs = {"targets": features}
    _, stock = task.process_inputs(raw, metadata=METADATA)
    _, ours = upstream.process_inputs(task, raw, metadata=METADATA, load_targets=True)
    assert (int(stock["class"]), int(ours["class"])) == (0, 1)
    task.filters = []
    assert upstream.process_inputs(task, raw, metadata=METADATA, load_targets=True)[1] == stock
    assert upstream.process_inputs(task, raw, metadata=METADATA, load_targets=False) == ({}, {})


def test_tasks_that_are_united_read_what_rslearn_gives_them() -> None:
    one = SegmentationTask(num_classes=2)
    task = MultiTask({"a": one, "b": one}, {"a": {"label": "targets"}, "b": {"label": "targets", "absent": "x"}})
    label = RasterImage(torch.ones(1, 1, 4, 4), None)
    stock = task.process_inputs({"label": label}, metadata=METADATA)
    ours = upstream.process_inputs(task, {"label": label}, metadata=METADATA, load_targets=True)
    assert list(stock[0]) == list(ours[0]) == ["a", "b"]
    for name in ("a", "b"):
        assert torch.equal(stock[1][name]["classes"].image, ours[1][name]["classes"].image)


def test_windows_are_loaded_without_what_lies_among_them(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "data")
    group = tmp_path / "data" / "windows" / "default"
    (group / "list.csv").write_text("x")
    (group / "w999").mkdir()
    dataset = Dataset(UPath(tmp_path / "data"))
    windows, strays = upstream.load_windows(dataset)
    assert sorted(Path(name).name for name in strays) == ["list.csv", "w999"]
    stock = Dataset(UPath(path)).load_windows()
    assert {w.name: w.get_metadata() for w in windows} == {w.name: w.get_metadata() for w in stock}
    assert type(windows[0].data) is type(stock[0].data)
    assert [
        w.name for w in upstream.load_windows(dataset, groups=["default", "nowhere"], names=["w001", "w404"])[0]
    ] == ["w001"]
    for number in (1, 3):
        (group / f"w00{number}" / "metadata.json").write_text("{")
    with pytest.raises(DataError, match=r"^2 windows have no usable metadata: .*w00[13]/metadata\.json: .*; .*w00"):
        upstream.load_windows(dataset)


def test_a_checkpoint_is_handed_over_once_and_another_optimiser_is_named() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    checkpoint = {"state_dict": {}, "optimizer_states": [{"state": {}, "param_groups": []}]}
    upstream.hand_checkpoint(trainer, checkpoint, path=Path("last.ckpt"))
    parameter = torch.nn.Parameter(torch.zeros(1))
    trainer.strategy.optimizers = [torch.optim.SGD([parameter], lr=0.1)]
    taken = trainer.strategy.load_checkpoint("last.ckpt", weights_only=True)
    assert set(taken) == {"state_dict", "optimizer_states"} and checkpoint == {}
    with pytest.raises(CheckpointError, match=r"^last\.ckpt does not fit the optimiser of the config"):
        trainer.strategy.load_optimizer_state_dict(taken)


@pytest.mark.parametrize("callback", [EMAWeightAveraging(decay=0.9), WeightAveraging()], ids=["EMA", "mean"])
def test_an_average_of_weights_leaves_whole_numbers(callback: WeightAveraging) -> None:
    module = torch.nn.Linear(1, 1)
    module.register_buffer("index", torch.arange(20))
    module.register_buffer("mean", torch.zeros(()))
    upstream.average_numbers_alone([callback])
    average: Any = AveragedModel(module, use_buffers=True, **callback._kwargs)
    average.update_parameters(module)
    module.mean.fill_(1.0)
    for _ in range(10):
        average.update_parameters(module)
    assert torch.equal(average.module.index, torch.arange(20))
    assert 0 < float(average.module.mean) < 1


def test_rslearn_writes_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = raster_format.open_rasterio_upath_writer, vector_format.open_atomic
    raster, projection = (
        RasterArray(chw_array=np.arange(64, dtype=np.uint8).reshape(1, 8, 8)),
        Projection(CRS.from_epsg(32631), 10, -10),
    )
    made: dict[str, list[bytes]] = {"a.tif": [], "b.geojson": []}
    ours = datasets.write_atomic
    written: list[str] = []
    try:
        for way in ("stock", "ours"):
            if way == "ours":
                upstream.write_whole_files()
                monkeypatch.setattr(datasets, "write_atomic", lambda p, c: (written.append(str(p)), ours(p, c)))
            folder = UPath(tmp_path / way)
            raster_format.GeotiffRasterFormat().encode_raster(folder, projection, (0, 0, 8, 8), raster, fname="a.tif")
            vector_format.GeojsonVectorFormat().encode_to_file(folder / "b.geojson", [])
            for name, contents in made.items():
                contents.append((folder / name).read_bytes())
    finally:
        raster_format.open_rasterio_upath_writer, vector_format.open_atomic = stock  # type: ignore[attr-defined]
    assert all(first == second for first, second in made.values())
    assert written == [str(tmp_path / "ours" / name) for name in made]


def test_an_epoch_that_was_gone_on_with_lets_its_schedulers_step() -> None:
    trainer = Trainer(accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False)
    trainer.fit_loop.restarting = True
    assert trainer.fit_loop.restarting
    upstream.let_schedulers_step(trainer)
    assert not trainer.fit_loop.restarting


def test_a_dataset_in_sqlite_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    storage = {"class_path": "rslearn.dataset.storage.sqlite.SQLiteWindowStorageFactory"}
    (tmp_path / "config.json").write_text(json.dumps({"layers": {}, "storage": storage}))
    dataset = Dataset(UPath(tmp_path))
    connection = dataset.storage._get_connection()  # type: ignore[attr-defined]
    assert connection.execute("PRAGMA synchronous").fetchone()[0] != 0
    datasets.write_unsynced(dataset)
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 0


def test_rslearns_galileo_says_once_that_patches_are_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = logging.getLogger(GalileoModel.__module__)
    monkeypatch.setattr(own, "filters", [])
    model = GalileoModel(GalileoSize.NANO, 8, str(write_galileo(tmp_path)), autocast_dtype=None)
    pixel = {"s2": RasterImage(torch.zeros(10, 1, 1, 1))}
    counts = []
    for _ in range(2):
        caplog.clear()
        for _ in range(3):
            model(ModelContext(inputs=[pixel], metadatas=[]))
        counts.append(sum("Reducing patch size" in record.getMessage() for record in caplog.records))
        upstream.log_once(torch.nn.ModuleList([model]))
        upstream.log_once(torch.nn.ModuleList([model]))
    assert counts == [3, 1]
    assert len(own.filters) == 1
