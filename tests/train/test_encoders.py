"""Every encoder of rslearn that builds without a download takes joint steps, frozen and thawed, and resumes."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rslearn.models
import shapely
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from rasterio.crs import CRS
from rslearn.dataset import Dataset, Window
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import NumpyRasterFormat
from rslearn.utils.vector_format import GeojsonVectorFormat
from upath import UPath

from rslp.cli.main import main
from rslp.helios.checkpoint import published
from rslp.rundir import RunDir
from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests.helios import tiny_helios
from tests.helios.published import IDS, architecture, small
from tests.helios.test_series import write_galileo, write_presto

BANDS = [f"b{index:02d}" for index in range(13)]
MODELS = Path(rslearn.models.__file__).parent
_CONV = {
    "class_path": "rslearn.models.conv.Conv",
    "init_args": {"in_channels": 3, "out_channels": 8, "kernel_size": 1},
}
_WRAPPED = {"class_path": "rslearn.models.module_wrapper.EncoderModuleWrapper", "init_args": {"module": _CONV}}
_OPTICAL, _SERIES = {"sentinel2_l2a": (12, True)}, {"s1": (2, True), "s2": (10, True)}
_OLMOEARTH: dict[str, Any] = {
    "patch_size": 4,
    "model_path": "{olmoearth}",
    "autocast_dtype": None,
    "embedding_size": 32,
}


@dataclass(frozen=True)
class Encoder:
    """How an encoder is built, and what it takes.

    Attributes:
        path: its class.
        arguments: of its class; ``{name}`` stands for a folder with weights.
        inputs: for each input the number of bands, and whether it is a series.
        channels: of its last feature map.
        size: side of the images, px.
        trains: whether its weights change once it is thawed.
        large: whether a test takes long.
    """

    path: str
    arguments: Mapping[str, Any]
    inputs: Mapping[str, tuple[int, bool]]
    channels: int
    size: int = 8
    trains: bool = True
    large: bool = False


_R = "rslearn.models."
GALILEO = f"{_R}galileo.galileo.GalileoModel"
ENCODERS = (
    Encoder("rslp.helios.model.Helios", {"checkpoint_path": "{olmoearth}", "patch_size": 4}, _OPTICAL, 32),
    Encoder("rslp.helios.galileo.Galileo", {"size": "NANO", "pretrained_path": "{galileo}"}, _SERIES, 32),
    Encoder("rslp.helios.presto.Presto", {"pretrained_path": "{presto}"}, _SERIES, 128, size=2),
    Encoder(f"{_R}olmoearth_pretrain.model.OlmoEarth", {**_OLMOEARTH, "use_legacy_timestamps": False}, _OPTICAL, 32),
    Encoder(
        f"{_R}olmoearth_pretrain.model_period_timestamps.OlmoEarthPeriodTimestamps",
        {**_OLMOEARTH, "period_duration": "30 days, 0:00:00", "max_matches": 2},
        _OPTICAL,
        32,
    ),
    Encoder(
        GALILEO,
        {"size": "NANO", "pretrained_path": "{galileo}", "autocast_dtype": None},
        _SERIES,
        32,
    ),
    Encoder(f"{_R}presto.presto.Presto", {"pretrained_path": "{presto}"}, _SERIES, 128, size=2),
    Encoder(
        f"{_R}tessera.Tessera",
        {
            "random_initialization": True,
            "model_config": {"latent_dim": 16, "representation_dim": 16, "s2_num_layers": 1, "s1_num_layers": 1},
        },
        {"s2": (10, True), "s1_ascending": (2, True), "s1_descending": (2, True)},
        16,
        size=2,
    ),
    Encoder(_WRAPPED["class_path"], _WRAPPED["init_args"], {"image": (3, False)}, 8),
    Encoder(
        f"{_R}simple_time_series.SimpleTimeSeries",
        {"encoder": _WRAPPED, "backbone_channels": [[1, 8]]},
        {"image": (3, True)},
        8,
    ),
    Encoder(f"{_R}embedding_cache.EmbeddingCache", {"encoder": [_WRAPPED]}, {"image": (3, False)}, 8, trains=False),
    Encoder(
        f"{_R}xatt_fusion.CrossAttentionFusionExtractor",
        {
            "primary_path": [_WRAPPED],
            "context_paths": [[_WRAPPED]],
            "primary_output_channels": 8,
            "context_output_channels": [8],
            "attention_dim": 8,
        },
        {"image": (3, False)},
        8,
    ),
    Encoder(
        f"{_R}swin.Swin",
        {"arch": "swin_v2_t", "output_layers": [1, 7]},
        {"image": (3, False)},
        768,
        size=64,
        large=True,
    ),
    Encoder(
        f"{_R}ssl4eo_s12.Ssl4eoS12", {"backbone_ckpt_path": None}, {"image": (13, False)}, 2048, size=64, large=True
    ),
)
# Why an encoder is not tried: what it needs and this repository does not install, or would have to download.
SKIPPED = {
    "anysat.AnySat": "its code is downloaded by torch.hub",
    "clay.clay.Clay": "the package claymodel, and weights that are downloaded",
    "clip.CLIP": "weights that are downloaded",
    "croma.Croma": "weights that are downloaded",
    "dinov3.DinoV3": "its code is downloaded by torch.hub",
    "molmo.Molmo": "weights that are downloaded",
    "panopticon.Panopticon": "its code is downloaded by torch.hub",
    "prithvi.PrithviV2": "its configuration and weights are downloaded",
    "sam2_enc.SAM2Encoder": "the package sam2, and weights that are downloaded",
    "satlaspretrain.SatlasPretrain": "the package satlaspretrain_models, and weights that are downloaded",
    "terramind.Terramind": "the package terratorch, and weights that are downloaded",
}


def test_every_encoder_of_rslearn_is_tried_or_has_a_reason() -> None:
    bases = {"FeatureExtractor"}
    defined: dict[str, str] = {}
    for _ in range(2):  # the second time: classes derived from the encoders found first
        for path in sorted(MODELS.rglob("*.py")):
            module = ".".join(path.relative_to(MODELS).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & bases:
                    defined[f"{module}.{node.name}"] = node.name
        bases |= set(defined.values())
    defined.pop("component.FeatureExtractor", None)
    tried = {encoder.path.removeprefix(_R) for encoder in ENCODERS if encoder.path.startswith(_R)}
    assert tried | set(SKIPPED) == set(defined)
    assert not tried & set(SKIPPED)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {
        "olmoearth": str(tiny_helios.write_bundle(folder / "olmoearth", small("v1_2"))),
        "galileo": str(write_galileo(folder / "galileo")),
        "presto": str(write_presto(folder / "presto")),
    }


def write_dataset(path: Path, kind: str, size: int) -> Path:
    """Write a dataset with a single image and a series of two dates in each of four windows."""
    path.mkdir(parents=True)
    form = {"class_path": "rslearn.utils.raster_format.NumpyRasterFormat"}
    raster = {"type": "raster", "band_sets": [{"bands": BANDS, "dtype": "float32", "format": form}]}
    layers = {"single": raster, "series": raster, "label": {"type": "vector"}}
    (path / "config.json").write_text(json.dumps({"layers": layers}))
    dataset = Dataset(UPath(path))
    projection = Projection(CRS.from_epsg(32631), 10, -10)
    months = [datetime(2023, month, 1, tzinfo=UTC) for month in (5, 6)]
    for index in range(4):
        bounds = (50_000 + 100 * index, -500_000, 50_000 + 100 * index + size, -500_000 + size)
        window = Window(
            storage=dataset.storage,
            group="default",
            name=f"w{index}",
            projection=projection,
            bounds=bounds,
            time_range=(months[0], months[1] + timedelta(days=30)),
            options={"split": "train" if index < 2 else "val"},
            data_factory=dataset.window_data_storage_factory,
        )
        window.save()
        rng = np.random.default_rng(index)
        for layer, dates in (("single", 1), ("series", 2)):
            spans = [(start, start + timedelta(days=20)) for start in months[:dates]]
            values = rng.random((13, dates, size, size), dtype=np.float32)
            with window.data.open_layer_writer(layer) as writer:
                array = RasterArray(array=values, timestamps=spans)
                writer.write_raster(BANDS, NumpyRasterFormat(), projection, bounds, array)
            window.mark_layer_completed(layer)
        label = ("low", "high")[index % 2] if kind == "classify" else float(index)
        place = STGeometry(projection, shapely.Point(bounds[0] + 0.5, bounds[1] + 0.5), None)
        with window.data.open_layer_writer("label") as writer:
            writer.write_vector(GeojsonVectorFormat(), [Feature(place, {"value": label})])
        window.mark_layer_completed("label")
    return path


_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "classify": ("classification.Classification", {"property_name": "value", "classes": ["low", "high"]}),
    "regress": ("regression.Regression", {"property_name": "value", "filters": []}),
}


def run_config(
    folder: Path, encoder: Encoder, arguments: Any, *, sizes: tuple[int, int] | None = None
) -> dict[str, Any]:
    """A run config over a dataset of classes and one of numbers, a step of both for each epoch, thawed after one.

    Their images have the encoder's size, px, or ``sizes``.
    """
    of_kind = dict(zip(_TASKS, sizes or (encoder.size, encoder.size), strict=True))
    modules, decoders, tasks = {}, {}, {}
    for kind, (name, settings) in _TASKS.items():
        inputs: dict[str, Any] = {
            key: {
                "data_type": "raster",
                "layers": ["series" if series else "single"],
                "bands": BANDS[:count],
                "dtype": "FLOAT32",
                "passthrough": True,
            }
            for key, (count, series) in encoder.inputs.items()
        }
        inputs["targets"] = {"data_type": "vector", "layers": ["label"], "is_target": True}
        tasks[kind] = {"class_path": f"rslearn.train.tasks.{name}Task", "init_args": settings}
        multi = {"tasks": {kind: tasks[kind]}, "input_mapping": {kind: {"targets": "targets"}}}
        modules[kind] = {
            "class_path": "rslearn.train.data_module.RslearnDataModule",
            "init_args": {
                "path": str(write_dataset(folder / kind, kind, of_kind[kind])),
                "inputs": inputs,
                "task": {"class_path": "rslearn.train.tasks.multi_task.MultiTask", "init_args": multi},
                "batch_size": 2,
                "train_config": {"tags": {"split": "train"}},
                "val_config": {"tags": {"split": "val"}},
            },
        }
        pool = {"in_channels": encoder.channels, "out_channels": 2 if kind == "classify" else 1}
        decoders[kind] = [
            {"class_path": "rslearn.models.pooling_decoder.PoolingDecoder", "init_args": pool},
            {"class_path": f"rslearn.train.tasks.{name}Head"},
        ]
    built = [{"class_path": encoder.path, "init_args": arguments}]
    joint = {"class_path": "rslp.train.JointModel", "init_args": {"encoder": built, "decoders": decoders}}
    freeze = {"modules": "model.encoder.0", "thaw_at_epoch": 1}
    optimizer = {"class_path": "rslearn.train.optimizer.AdamW", "init_args": {"lr": 0.001}}
    mapping = {kind: {"targets": "targets"} for kind in tasks}
    union = {
        "class_path": "rslearn.train.tasks.multi_task.MultiTask",
        "init_args": {"tasks": tasks, "input_mapping": mapping},
    }
    data = {"num_workers": 0, "data_modules": modules, "datasets_per_step": 2}
    return {
        "model": {
            "class_path": "rslp.train.JointModule",
            "init_args": {"model": joint, "task": union, "optimizer": optimizer},
        },
        "data": {"class_path": "rslp.train.MultiDatasetDataModule", "init_args": data},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "rslp.train.Freeze", "init_args": freeze},
                {"class_path": "tests.train.test_encoders.RememberStart"},
            ],
        },
        "rslp_project": "tests",
        "rslp_experiment": "tiny",
    }


class RememberStart(Callback):
    """Keeps the encoder's parameters as they are before the first step of a fit."""

    parameters: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer
        named = pl_module.named_parameters()
        RememberStart.parameters = {n: p.detach().clone() for n, p in named if n.startswith("model.encoder.")}


def filled(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: filled(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, places) for item in value]
    return places[value[1:-1]] if isinstance(value, str) and value.startswith("{") else value


@pytest.mark.parametrize(
    "encoder",
    [pytest.param(one, marks=[pytest.mark.slow] if one.large else [], id=one.path) for one in ENCODERS],
)
def test_joint_steps_frozen_thawed_and_resumed(encoder: Encoder, weights: dict[str, str], tmp_path: Path) -> None:
    config = run_config(tmp_path, encoder, filled(encoder.arguments, weights))
    run = RunDir(tmp_path / "projects" / "tests" / "tiny")
    run.path.mkdir(parents=True)
    stages = []
    for epochs in (1, 2):
        config["trainer"]["max_epochs"] = epochs
        run.config.write_text(yaml.safe_dump(config, sort_keys=False))
        assert fit(run) == 0
        checkpoint = read_checkpoint(run.path / "checkpoints" / "last.ckpt")
        assert checkpoint["global_step"] == epochs
        start = RememberStart.parameters
        stages.append((start, {name: checkpoint["state_dict"][name] for name in start}))
    (first, frozen), (resumed, thawed) = stages
    assert all(torch.equal(frozen[name], first[name]) for name in first)
    assert all(torch.equal(resumed[name], frozen[name]) for name in frozen)
    assert any(not torch.equal(thawed[name], resumed[name]) for name in resumed) is encoder.trains
    assert all(tensor.isfinite().all() for tensor in thawed.values())


@pytest.mark.parametrize("path", ["rslp.helios.galileo.Galileo", "rslp.helios.presto.Presto", GALILEO])
def test_pixels_beside_images(
    path: str,
    weights: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = next(one for one in ENCODERS if one.path == path)
    config = run_config(tmp_path, encoder, filled(encoder.arguments, weights), sizes=(8, 1))
    config["trainer"] |= {"callbacks": [], "max_epochs": 3}
    run = RunDir(tmp_path / "projects" / "tests" / "tiny")
    run.path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(config, sort_keys=False))
    # The values are made up: units and names of bands are not those of the encoder.
    words = ["--allow+=units", "--allow+=band-order", "--allow+=band-units", "--max_overlap", "1"]
    assert main(["helios", "check", f"--config_paths+={run.config}", *words]) == 0, capsys.readouterr().err
    caplog.clear()
    assert fit(run) == 0
    assert read_checkpoint(run.path / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert caplog.text.count("Reducing patch size") <= 1


def _slow_unless_nano(model_id: str) -> Any:
    return pytest.param(model_id, marks=[] if model_id.endswith("Nano") else [pytest.mark.slow])


@pytest.mark.parametrize("model_id", [_slow_unless_nano(model_id) for model_id in IDS])
def test_check_and_a_step_with_each_published_architecture(
    model_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_helios.write_config(tmp_path / "encoder", architecture(model_id))
    monkeypatch.setattr(published, "hf_hub_download", lambda filename, **_: str(folder / filename))
    arguments: dict[str, Any] = {"checkpoint_path": model_id, "patch_size": 8, "random_initialization": True}
    channels = architecture(model_id)["model"]["encoder_config"]["embedding_size"]
    if "-v1_3-" in model_id:
        arguments |= {"use_location_token_output": True, "projected_location_token_dim": 64}
        channels = 64
    inputs = {"sentinel2_l2a": (12, True), "sentinel1": (2, True), "landsat": (11, True)}
    encoder = Encoder("rslp.helios.model.Helios", arguments, inputs, channels, size=16)
    config = run_config(tmp_path, encoder, {**arguments, "embedding_size": channels})
    config["trainer"]["callbacks"] = []
    run = RunDir(tmp_path / "projects" / "tests" / "tiny")
    run.path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["olmoearth_pretrain", "check", f"--config_paths+={run.config}"]) == 0, capsys.readouterr().err
    assert fit(run) == 0
    assert read_checkpoint(run.path / "checkpoints" / "last.ckpt")["global_step"] == 1
    shutil.rmtree(run.path)  # of large models gigabytes
