"""The example's own datasets with two sensors, small, and run configs over them for each encoder that we ship."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from rslearn.models.galileo.single_file_galileo import Encoder

from rslp.cli.main import main as rslp_main
from rslp.example import bundle, windows

DATASETS = ("crop_type", "fuel_moisture")
ENCODERS = ("helios", "galileo")
_GALILEO_BANDS = {
    "s2": ("sentinel2", ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"]),
    "s1": ("sentinel1", ["vv", "vh"]),
}


def write_place(folder: Path) -> Path:
    """Write two datasets of a year of Sentinel-2 and Sentinel-1, the encoders, and stage 1's run config of both."""
    folder.mkdir(parents=True)
    portions = windows.create(folder, size=0.02, seed=0)
    for _ in windows.write(folder, [one for one in portions if one[0].dataset in DATASETS], seed=0, workers=0):
        pass
    bundle.write(folder / "encoder", seed=0)
    _write_galileo(folder / "galileo" / "models" / "nano")
    for source in files("rslp.example").joinpath("configs").iterdir():
        (folder / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    wanted = yaml.safe_load((folder / "multi_dataset.yaml").read_text())
    wanted["dataset_cfgs"] = [f"{name}.yaml" for name in DATASETS]
    (folder / "two.yaml").write_text(yaml.safe_dump({**wanted, "output_path": "OUT_two.yaml"}))
    assert rslp_main(["helios", "make_multidataset_config", "--cfg", str(folder / "two.yaml")]) == 0
    return folder


def _write_galileo(folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(Encoder(depth=1).state_dict(), folder / "encoder.pt")
    (folder / "config.json").write_text(json.dumps({"model": {"encoder": {"depth": 1}}}))


def run_config(place: Path, encoder: str, *, workers: int, epochs: int = 1, **data: Any) -> dict[str, Any]:
    """A run config over both datasets, of few steps; ``data``: further arguments of the joint data module."""
    config: dict[str, Any] = yaml.safe_load((place / "OUT_two.yaml").read_text())
    joint = config["data"]["init_args"]
    joint |= {"num_workers": workers, **data}
    model = config["model"]["init_args"]["model"]["init_args"]
    model["encoder"][0]["init_args"]["checkpoint_path"] = str(place / "encoder")
    for name, module in joint["data_modules"].items():
        module["init_args"] |= {"path": str(place / name), "batch_size": 2}
        if encoder == "galileo":
            _for_galileo(module["init_args"])
    if encoder == "galileo":
        settings = {"size": "NANO", "patch_size": 8, "pretrained_path": str(place / "galileo")}
        model["encoder"][0] = {"class_path": "rslp.helios.galileo.Galileo", "init_args": settings}
    config["trainer"] |= {
        "max_epochs": epochs,
        "check_val_every_n_epoch": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
    }
    return config


def _for_galileo(data: dict[str, Any]) -> None:
    """Give a dataset the names and bands that Galileo has, without the normalisation of Helios."""
    label = next({name: spec} for name, spec in data["inputs"].items() if spec.get("is_target"))
    images = {
        name: {"data_type": "raster", "layers": [layer], "bands": bands, "dtype": "FLOAT32", "passthrough": True}
        for name, (layer, bands) in _GALILEO_BANDS.items()
    }
    data["inputs"] = {**images, **label}
    for key in ("default_config", "train_config", "val_config", "test_config"):
        split: dict[str, Any] = data.get(key) or {}
        kept = [one for one in split.get("transforms", []) if not one["class_path"].endswith("HeliosNormalize")]
        for one in kept:
            one["init_args"]["image_selectors"] = list(images)
        if "transforms" in split:
            split["transforms"] = kept


def freezing(config: Mapping[str, Any], *, thaw_at_epoch: int | None) -> dict[str, Any]:
    """The config with a frozen encoder."""
    freeze = {
        "class_path": "rslp.train.Freeze",
        "init_args": {"modules": "model.encoder.0", "thaw_at_epoch": thaw_at_epoch},
    }
    return {**config, "trainer": {**config["trainer"], "callbacks": [freeze]}}
