"""From the command to the first optimiser step: a second start of ours against rslearn 0.1.19, in turns.

The four example datasets, each with N more windows that have metadata and nothing else: listing meets them, no sample
is read of them. A second start is one whose config has passed the check before.

python benchmarks/start.py [N …]
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = (200, 2000, 20000)
DATASETS = ("crop_type", "vessel_detection", "land_cover", "fuel_moisture")
SPLITS = ("train",) * 8 + ("val", "test")
# Starts of each side, in turns.
REPEATS = {200: 5, 2000: 3, 20000: 3}


@dataclass(frozen=True)
class Start:
    """What a start took until its first optimiser step was done.

    Attributes:
        wall: seconds from the command on.
        cpu: seconds of CPU, of the process, its workers and what it ran before.
    """

    wall: float
    cpu: float


def main(counts: list[int]) -> None:
    """Measure, and print a table in Markdown."""
    print("| windows a dataset | rslearn wall s | ours wall s | ratio | rslearn CPU s | ours CPU s | ratio | runs |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        example = Path(place) / "example"
        _run("make_example", "--path", str(example), "--size", "0.02")
        recipe = example / "multi_dataset.yaml"
        subprocess.run([sys.executable, ROOT / "make_multidataset_config.py", "--cfg", recipe], check=True, stdout=2)
        templates = {dataset: _template(example, dataset) for dataset in DATASETS}
        done = 0
        for count in counts:
            for dataset, template in templates.items():
                for index in range(done, count):
                    _add_window(example, dataset, template=template, index=index)
            done = count
            theirs, ours = _measure(Path(place), example, repeats=REPEATS.get(count, 1))
            print(_row(count, theirs, ours), flush=True)


def _row(count: int, theirs: list[Start], ours: list[Start]) -> str:
    cells = []
    for kind in ("wall", "cpu"):
        pairs = [(getattr(a, kind), getattr(b, kind)) for a, b in zip(theirs, ours, strict=True)]
        ratios = [a / b for a, b in pairs]
        spread = f" ({min(ratios):.1f} … {max(ratios):.1f})" if len(ratios) > 1 else ""
        cells += [f"{statistics.median(column):.1f}" for column in zip(*pairs, strict=True)]
        cells.append(f"{statistics.median(ratios):.1f}{spread}")
    return f"| {count} | " + " | ".join(cells) + f" | {len(theirs)} |"


def _template(example: Path, dataset: str) -> dict[str, Any]:
    """The metadata of a window of a dataset."""
    window = next(iter((example / dataset / "windows" / "example").iterdir()))
    metadata: dict[str, Any] = json.loads((window / "metadata.json").read_text())
    return metadata


def _add_window(example: Path, dataset: str, *, template: dict[str, Any], index: int) -> None:
    """A window without layers, placed and named like none of the others."""
    width = template["bounds"][2] - template["bounds"][0]
    left = 1_000_000 + 2 * index * width
    options = {**template["options"], "split": SPLITS[index % len(SPLITS)]}
    folder = example / dataset / "windows" / "example" / f"empty_{index:06d}"
    folder.mkdir()
    metadata = {**template, "bounds": [left, 0, left + width, width], "options": options}
    (folder / "metadata.json").write_text(json.dumps(metadata))


def _measure(place: Path, example: Path, *, repeats: int) -> tuple[list[Start], list[Start]]:
    note = place / "note.json"
    config = yaml.safe_load((example / "OUT_multi_dataset.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": "start_parts.FirstStep", "init_args": {"out": str(note)}}]
    (example / "ours.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (example / "theirs.yaml").write_text(yaml.safe_dump(_for_rslearn(config), sort_keys=False))
    words = ["launch_finetune", f"--config_paths+={example / 'ours.yaml'}", "--rslp_project", "bench"]
    ours = [sys.executable, "-m", "rslp.main", "helios", *words, "--experiment_id", "start", "--local", "true"]
    theirs = [sys.executable, "-m", "rslearn.main", "model", "fit", "--config", str(example / "theirs.yaml")]
    shutil.rmtree(place / "runs", ignore_errors=True)
    _start(ours, place, note)  # the check
    pairs = [(_start(theirs, place, note), _start(ours, place, note)) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _for_rslearn(config: dict[str, Any]) -> dict[str, Any]:
    """The same run with rslearn's classes around the same encoder, heads and datasets."""
    theirs = copy.deepcopy({key: config[key] for key in ("model", "data", "trainer")})
    module, data, trainer = theirs["model"], theirs["data"], theirs["trainer"]
    module["class_path"] = "rslearn.train.lightning_module.RslearnLightningModule"
    module["init_args"]["model"]["class_path"] = "start_parts.RepairedMultiTaskModel"
    for name in set(module["init_args"]["model"]["init_args"]) - {"encoder", "decoders"}:
        del module["init_args"]["model"]["init_args"][name]
    module["init_args"].pop("scheduler", None)
    data["class_path"] = "rslearn.train.data_module.MultiDatasetDataModule"
    modules = data["init_args"]["data_modules"]
    sizes = {name: inner["init_args"].get("batch_size", 1) for name, inner in modules.items()}
    workers = data["init_args"].get("num_workers", 1)
    data["init_args"] = {"data_modules": modules, "num_workers": workers, "batch_sizes": sizes}
    trainer |= {"logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False, "devices": 1}
    return theirs


def _start(command: list[str], place: Path, note: Path) -> Start:
    note.unlink(missing_ok=True)
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "RSLP_PREFIX": str(place / "runs"), "OMP_NUM_THREADS": "1"}
    begun = time.time()
    done = subprocess.run(command, env=environment, cwd=note.parent / "example", capture_output=True, text=True)
    if not note.exists():
        raise SystemExit(f"{' '.join(command)} came to no step:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    noted = json.loads(note.read_text())
    return Start(wall=noted["time"] - begun, cpu=noted["cpu"])


def _run(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "rslp.main", "helios", *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or list(WINDOWS))
