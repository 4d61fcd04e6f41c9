"""Runs on the built-in example, of both sides, as processes: what the benchmarks of whole runs share."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rslearn_side import for_rslearn

ROOT = Path(__file__).resolve().parents[1]
DATASETS = ("crop_type", "vessel_detection", "land_cover", "fuel_moisture")
SIDES = ("ours", "rslearn", "rslearn, our encoder", "model alone")


@dataclass(frozen=True)
class Setting:
    """How a run uses the machine.

    Attributes:
        workers: processes that read samples.
        threads: of torch in the training process; None leaves it to whoever runs.
    """

    workers: int
    threads: int | None = None


def make_example(folder: Path, *, size: float) -> Path:
    """Write the example and its run config; gives its folder."""
    example = folder / "example"
    subprocess.run(
        [sys.executable, "-m", "rslp.main", "helios", "make_example", "--path", str(example), "--size", str(size)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment(folder, threads=None),
    )
    compose(example)
    return example


def compose(example: Path) -> None:
    """Write the example's run config."""
    maker = [sys.executable, str(ROOT / "make_multidataset_config.py"), "--cfg", str(example / "multi_dataset.yaml")]
    subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)


def run_config(example: Path) -> dict[str, Any]:
    """The example's run config."""
    config: dict[str, Any] = yaml.safe_load((example / "OUT_multi_dataset.yaml").read_text())
    return config


def train(example: Path, *, side: str, config: dict[str, Any], setting: Setting, name: str) -> list[dict[str, float]]:
    """Train in a process of its own, and say what its epochs took, see ``epoch_parts.EpochTimes``.

    Args:
        example: the example's folder.
        side: one of ``SIDES``.
        config: the run config of this project.
        setting: workers and threads.
        name: a new name for the run.

    Raises:
        SystemExit: it failed.
    """
    note = example.parent / f"{name}.json"
    config = copy.deepcopy(config)
    config["data"]["init_args"]["num_workers"] = setting.workers
    own = {"class_path": "epoch_parts.EpochTimes", "init_args": {"out": str(note)}}
    config["trainer"]["callbacks"] = [*config["trainer"].get("callbacks", []), own]
    config["trainer"] |= {"enable_progress_bar": False}
    if side == "model alone":
        config["data"]["class_path"] = "epoch_parts.ReadyDataModule"
    elif side != "ours":
        config = for_rslearn(config, encoder=side == "rslearn")
    path = example / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = _theirs(path) if side.startswith("rslearn") else _ours(path, name)
    variables = environment(example.parent, threads=setting.threads)
    done = subprocess.run(command, env=variables, cwd=example, capture_output=True, text=True)
    if done.returncode or not note.exists():
        raise SystemExit(f"a run of {side} failed, see the lines above: {_gist(done.stdout + done.stderr)}")
    epochs: list[dict[str, float]] = json.loads(note.read_text())
    return epochs


def _gist(text: str) -> str:
    """The last lines of what a process said; rslearn's errors print whole samples."""
    print(text[-6000:], file=sys.stderr)
    told = [line for line in text.splitlines() if "Error" in line]
    return (told or [text])[-1][:200]


def _ours(path: Path, name: str) -> list[str]:
    words = [f"--config_paths+={path}", "--rslp_project", "bench", "--experiment_id", name, "--check", "false"]
    return [sys.executable, "-m", "rslp.main", "helios", "launch_finetune", *words, "--local", "true"]


def _theirs(path: Path) -> list[str]:
    return [sys.executable, "-m", "rslearn.main", "model", "fit", "--config", str(path)]


def environment(folder: Path, *, threads: int | None) -> dict[str, str]:
    """Variables for a process of either side.

    Args:
        folder: where its runs are put.
        threads: of torch; None leaves it to the process.
    """
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    variables = {**os.environ, "PYTHONPATH": path, "RSLP_PREFIX": str(folder / "runs"), "WANDB_MODE": "disabled"}
    variables["RSLP_TRUST"] = "start_parts,epoch_parts"
    variables.pop("OMP_NUM_THREADS", None)
    return variables if threads is None else {**variables, "OMP_NUM_THREADS": str(threads)}
