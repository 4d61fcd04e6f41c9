"""Tiny real rslearn datasets and a tiny encoder: the whole training path in seconds.

Each dataset's label can be read off the image's mean, so that a few steps show whether anything is learnt.
"""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
import yaml
from rasterio.crs import CRS
from rslearn.dataset import Dataset, Window
from rslearn.models.component import FeatureExtractor, FeatureMaps
from rslearn.train.model_context import ModelContext
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import GeotiffRasterFormat
from rslearn.utils.vector_format import GeojsonVectorFormat
from upath import UPath

from rslp.rundir import RunDir

SIZE = 8
KINDS = ("classify", "segment", "regress", "detect")
_PROJECTION = Projection(CRS.from_epsg(32631), 10, -10)
_START = datetime(2024, 3, 1, tzinfo=UTC)


class TinyEncoder(FeatureExtractor):
    """Two convolutions, then dropout, over the input `image`; features `B 8 H W`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1), torch.nn.Dropout(dropout)
        )

    def forward(self, context: ModelContext) -> FeatureMaps:
        images = torch.stack([inputs["image"].image[:, 0] for inputs in context.inputs])
        return FeatureMaps([self.layers(images)])


def write_dataset(path: Path, kind: str, *, train: int = 6, val: int = 3, test: int = 3, size: int = SIZE) -> Path:
    """Write one dataset with windows of `size` x `size` px tagged by split."""
    path.mkdir(parents=True)
    layers: dict[str, Any] = {"image": _raster_layer(["a", "b"], "float32")}
    layers["label"] = _raster_layer(["class"], "uint8") if kind == "segment" else {"type": "vector"}
    (path / "config.json").write_text(json.dumps({"layers": layers}))
    dataset = Dataset(UPath(path))
    rng = np.random.default_rng(sum(map(ord, kind)))
    index = 0
    for split, count in (("train", train), ("val", val), ("test", test)):
        for _ in range(count):
            _write_window(dataset, kind, index=index, split=split, rng=rng, size=size)
            index += 1
    return path


def add_window(path: Path, kind: str, *, index: int, split: str = "train", size: int = SIZE) -> None:
    """Add a window to a dataset that was written before."""
    _write_window(Dataset(UPath(path)), kind, index=index, split=split, rng=np.random.default_rng(index), size=size)


def _raster_layer(bands: list[str], dtype: str) -> dict[str, Any]:
    return {"type": "raster", "band_sets": [{"bands": bands, "dtype": dtype}]}


def _write_window(dataset: Dataset, kind: str, *, index: int, split: str, rng: np.random.Generator, size: int) -> None:
    bounds = (index * 2 * size, 0, index * 2 * size + size, size)
    window = Window(
        storage=dataset.storage,
        group="default",
        name=f"w{index:03d}",
        projection=_PROJECTION,
        bounds=bounds,
        time_range=(_START, _START + timedelta(days=30)),
        options={"split": split},
        data_factory=dataset.window_data_storage_factory,
    )
    window.save()
    level = (index % 2) + 0.2 * rng.random()
    image = (level + 0.1 * rng.standard_normal((2, size, size))).astype(np.float32)
    with window.data.open_layer_writer("image") as writer:
        raster = RasterArray(chw_array=image, time_range=(_START, _START + timedelta(days=1)))
        writer.write_raster(["a", "b"], GeotiffRasterFormat(), window.projection, window.bounds, raster)
    with window.data.open_layer_writer("label") as writer:
        if kind == "segment":
            classes = (image[:1] > 0.6).astype(np.uint8)
            label = RasterArray(chw_array=classes)
            writer.write_raster(["class"], GeotiffRasterFormat(), window.projection, window.bounds, label)
        else:
            writer.write_vector(GeojsonVectorFormat(), [_feature(kind, level=level, bounds=bounds)])
    for layer in ("image", "label"):
        window.mark_layer_completed(layer)


def _feature(kind: str, *, level: float, bounds: tuple[int, int, int, int]) -> Feature:
    value: Any = {"classify": "high" if level > 0.6 else "low", "regress": float(level), "detect": "thing"}[kind]
    shape = shapely.Point((bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2)
    return Feature(STGeometry(_PROJECTION, shape, None), {"value": value})


_POOL = "rslearn.models.pooling_decoder.PoolingDecoder"
_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "classify": ("classification.ClassificationTask", {"property_name": "value", "classes": ["low", "high"]}),
    "segment": ("segmentation.SegmentationTask", {"num_classes": 2}),
    "regress": ("regression.RegressionTask", {"property_name": "value", "filters": []}),
    "detect": (
        "detection.DetectionTask",
        {"property_name": "value", "classes": ["bg", "thing"], "box_size": 2, "score_threshold": 0.1},
    ),
}
_DECODERS: dict[str, list[dict[str, Any]]] = {
    "classify": [
        {"class_path": _POOL, "init_args": {"in_channels": 8, "out_channels": 2}},
        {"class_path": "rslearn.train.tasks.classification.ClassificationHead"},
    ],
    "segment": [
        {
            "class_path": "rslearn.models.conv.Conv",
            "init_args": {
                "in_channels": 8,
                "out_channels": 2,
                "kernel_size": 1,
                "activation": {"class_path": "torch.nn.Identity"},
            },
        },
        {"class_path": "rslearn.train.tasks.segmentation.SegmentationHead"},
    ],
    "regress": [
        {"class_path": _POOL, "init_args": {"in_channels": 8, "out_channels": 1}},
        {"class_path": "rslearn.train.tasks.regression.RegressionHead"},
    ],
    "detect": [
        {
            "class_path": "rslearn.models.faster_rcnn.FasterRCNN",
            "init_args": {"downsample_factors": [1], "num_channels": 8, "num_classes": 2, "anchor_sizes": [[4]]},
        }
    ],
}  # fmt: skip


def task_config(kind: str) -> dict[str, Any]:
    name, init_args = _TASKS[kind]
    # A copy: tests change their config, and must not change each other's.
    return {"class_path": f"rslearn.train.tasks.{name}", "init_args": copy.deepcopy(init_args)}


def data_module_config(path: str, tasks: dict[str, str], *, batch_size: int = 2) -> dict[str, Any]:
    """One dataset's data module; `tasks` is task name -> kind (all read the same label layer)."""
    inputs: dict[str, Any] = {
        "image": {"data_type": "raster", "layers": ["image"], "bands": ["a", "b"], "passthrough": True}
    }
    for name, kind in tasks.items():
        label: dict[str, Any] = {"data_type": "vector", "layers": ["label"], "is_target": True}
        if kind == "segment":
            label |= {"data_type": "raster", "bands": ["class"], "dtype": "INT32"}
        inputs[f"label_{name}"] = label
    return {
        "class_path": "rslearn.train.data_module.RslearnDataModule",
        "init_args": {
            "path": path,
            "inputs": inputs,
            "task": _multi_task(tasks),
            "batch_size": batch_size,
            **{f"{split}_config": {"tags": {"split": split}} for split in ("train", "val", "test")},
        },
    }


def _multi_task(tasks: dict[str, str]) -> dict[str, Any]:
    return {
        "class_path": "rslearn.train.tasks.multi_task.MultiTask",
        "init_args": {
            "tasks": {name: task_config(kind) for name, kind in tasks.items()},
            "input_mapping": {name: {f"label_{name}": "targets"} for name in tasks},
        },
    }


def run_config(
    datasets: dict[str, tuple[str, str]], *, epochs: int = 2, dropout: float = 0.0, **data: Any
) -> dict[str, Any]:
    """A run config over `name -> (path, kind)`, each dataset with one task of its name."""
    return {
        "model": {
            "class_path": "rslp.train.JointModule",
            "init_args": {
                "model": {
                    "class_path": "rslp.train.JointModel",
                    "init_args": {
                        "encoder": [{"class_path": "tests.tiny.TinyEncoder", "init_args": {"dropout": dropout}}],
                        "decoders": {name: copy.deepcopy(_DECODERS[kind]) for name, (_, kind) in datasets.items()},
                    },
                },
                "task": _multi_task({name: kind for name, (_, kind) in datasets.items()}),
                "optimizer": {"class_path": "rslearn.train.optimizer.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "rslp.train.MultiDatasetDataModule",
            "init_args": {
                "num_workers": 0,
                **data,
                "data_modules": {
                    name: data_module_config(path, {name: kind}) for name, (path, kind) in datasets.items()
                },
            },
        },
        "trainer": {"max_epochs": epochs, "accelerator": "cpu", "enable_progress_bar": True, "callbacks": []},
        "rslp_project": "tests",
        "rslp_experiment": "tiny",
    }  # fmt: skip


def write_run(folder: Path, config: dict[str, Any]) -> RunDir:
    """Make a run directory that holds a config."""
    run = RunDir(folder / "projects" / "tests" / "tiny")
    run.path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(config, sort_keys=False))
    return run


def four_datasets(folder: Path, **sizes: int) -> dict[str, tuple[str, str]]:
    """One dataset of each kind; name -> (path, kind)."""
    return {kind: (str(write_dataset(folder / kind, kind, **sizes)), kind) for kind in KINDS}
