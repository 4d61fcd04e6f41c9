"""A study of two tiny datasets: its files, and what it has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import run_config, write_dataset

KINDS = {"classes": "classify", "numbers": "regress"}


def write_study(folder: Path, *, epochs: int = 1, sizes: dict[str, int] | None = None, **keys: Any) -> Path:
    """Write datasets, their configs, a multi-dataset config and a ``study.yaml`` with these keys; returns the last."""
    paths = {name: str(write_dataset(folder / name, kind, **(sizes or {}))) for name, kind in KINDS.items()}
    config = run_config({name: (paths[name], kind) for name, kind in KINDS.items()}, epochs=epochs)
    config["trainer"] |= {"enable_progress_bar": False, "callbacks": []}
    model = config["model"]["init_args"]["model"]["init_args"]
    decoders, modules = model["decoders"], config["data"]["init_args"]["data_modules"]
    for name in KINDS:
        dataset = {
            "model": {"init_args": {"model": {"init_args": {"decoders": {name: decoders[name]}}}}},
            "data": {**modules[name], "init_args": {**modules[name]["init_args"], "path": name}},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(dataset, sort_keys=False))
    model["decoders"] = None
    config["model"]["init_args"].pop("task")
    config["data"]["init_args"]["data_modules"] = None
    (folder / "base.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    multi = {"base_cfg": "base.yaml", "dataset_cfgs": [f"{name}.yaml" for name in KINDS], "output_path": "OUT.yaml"}
    (folder / "multi.yaml").write_text(yaml.safe_dump(multi, sort_keys=False))
    study = {"multi_dataset_config": "multi.yaml", "check": {"allow": ["overlap"]}, **keys}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def folder_of(root: Path) -> Path:
    return root / "runs" / "studies" / "studies" / "study"


def runs_of(root: Path) -> dict[str, dict[str, Any]]:
    """The runs of ``arms.json`` by name; none before it is written."""
    path = folder_of(root) / "arms.json"
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def done(root: Path) -> list[str]:
    return [name for name, entry in runs_of(root).items() if entry["state"] == "done"]
