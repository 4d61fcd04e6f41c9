"""From the command to the first optimiser step: a second start of ours against rslearn 0.1.19, in turns.

python benchmarks/start.py [--quick] [--out FILE]

The four example datasets, each with N more windows that have metadata and nothing else: listing meets them, no sample
is read of them. A second start is one whose config has passed the check before. Then runs with up to 32 datasets, each
under a name of its own and with a head of its own.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from example_runs import DATASETS, ROOT, environment, make_example, run_config
from rows import Curve, Report, report, row
from rslearn_side import for_rslearn

SPLITS = ("train",) * 8 + ("val", "test")
# Windows a dataset, and starts of each side; a start of minutes is not repeated much.
REPEATS = {200: 3, 2000: 3, 20000: 2}
MANY = (1, 8, 32)
# Windows a dataset -> how many times faster than rslearn a start has to be.
WANTED = {200: 4, 20000: 6}


@dataclass(frozen=True)
class Start:
    """What a start took until its first optimiser step was done.

    Attributes:
        wall: seconds from the command on.
        cpu: seconds of CPU, of the process, its workers and what it ran before.
    """

    wall: float
    cpu: float


def main(out: Report) -> None:
    """Measure, and report."""
    _help(out)
    with tempfile.TemporaryDirectory() as place:
        example = make_example(Path(place), size=0.02)
        _by_datasets(out, Path(place), example)
        _by_windows(out, Path(place), example)


def _help(out: Report) -> None:
    commands = {
        "ours": [sys.executable, "-m", "rslp.main", "--help"],
        "rslearn": [sys.executable, "-m", "rslearn.main", "--help"],
        "bare": [sys.executable, "-c", "pass"],
    }
    turns = [{key: _cpu(command) for key, command in commands.items()} for _ in range(3 if out.quick else 7)]
    times = {key: [turn[key] for turn in turns] for key in commands}
    out.add(
        row(
            "help",
            "`--help`",
            unit="s of CPU",
            ours=times["ours"],
            rslearn=times["rslearn"],
            limit=times["bare"],
            limit_is="the bare interpreter",
            note="wanted: less than 0.4 s",
        )
    )


def _by_windows(out: Report, place: Path, example: Path) -> None:
    templates = {dataset: _template(example, dataset) for dataset in DATASETS}
    config = run_config(example)
    done = 0
    lines: dict[str, list[tuple[float, float]]] = {"rslearn": [], "ours": []}
    for count, repeats in ({200: 1} if out.quick else REPEATS).items():
        for dataset, template in templates.items():
            for index in range(done, count):
                _add_window(example, dataset, template=template, index=index)
        done = count
        theirs, ours = _measure(place, example, config, repeats=repeats)
        for name, starts in (("rslearn", theirs), ("ours", ours)):
            lines[name].append((count, min(start.wall for start in starts)))
        for kind, unit in (("wall", "s"), ("cpu", "s of CPU")):
            out.add(
                row(
                    f"start {count}, {kind}",
                    f"second start, four datasets of {count} windows: command to first optimiser step",
                    unit=unit,
                    ours=[getattr(start, kind) for start in ours],
                    rslearn=[getattr(start, kind) for start in theirs],
                    wanted_ratio=WANTED.get(count) if kind == "wall" else None,
                )
            )
    out.add(Curve("start-windows", "Command to first optimiser step", "windows in each of 4 datasets", "s", lines))


def _by_datasets(out: Report, place: Path, example: Path) -> None:
    lines: dict[str, list[tuple[float, float]]] = {"rslearn": [], "ours": []}
    for count in MANY[:2] if out.quick else MANY:
        theirs, ours = _measure(place, example, _several(run_config(example), count), repeats=1)
        for name, starts in (("rslearn", theirs), ("ours", ours)):
            lines[name].append((count, min(start.wall for start in starts)))
    out.add(Curve("start-datasets", "Command to first optimiser step", "datasets", "s", lines))


def _several(config: dict[str, Any], count: int) -> dict[str, Any]:
    """A run config with one of its datasets under so many names."""
    one, many = "fuel_moisture", [f"fuel_{i:02d}" for i in range(count)]
    text = yaml.safe_dump(config)
    made: dict[str, Any] = yaml.safe_load(text)
    model, data = made["model"]["init_args"], made["data"]["init_args"]
    for place in (model["model"]["init_args"]["decoders"], model["task"]["init_args"]["tasks"]):
        value = place[one]
        place.clear()
        place |= {name: copy.deepcopy(value) for name in many}
    model["task"]["init_args"]["input_mapping"] = {name: {"targets": "targets"} for name in many}
    module = data["data_modules"][one]
    task = module["init_args"]["task"]["init_args"]["tasks"][one]
    data["data_modules"] = {}
    for name in many:
        module["init_args"]["task"]["init_args"] = {
            "tasks": {name: task},
            "input_mapping": {name: {"targets": "targets"}},
        }
        data["data_modules"][name] = copy.deepcopy(module)
    return made


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


def _measure(place: Path, example: Path, config: dict[str, Any], *, repeats: int) -> tuple[list[Start], list[Start]]:
    note = place / "note.json"
    config = copy.deepcopy(config)
    config["trainer"]["callbacks"] = [{"class_path": "start_parts.FirstStep", "init_args": {"out": str(note)}}]
    (example / "ours.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (example / "theirs.yaml").write_text(yaml.safe_dump(for_rslearn(config, encoder=True), sort_keys=False))
    words = ["launch_finetune", f"--config_paths+={example / 'ours.yaml'}", "--rslp_project", "bench"]
    ours = [sys.executable, "-m", "rslp.main", "helios", *words, "--experiment_id", "start", "--local", "true"]
    theirs = [sys.executable, "-m", "rslearn.main", "model", "fit", "--config", str(example / "theirs.yaml")]
    shutil.rmtree(place / "runs", ignore_errors=True)
    _start(ours, place, note)  # the check
    pairs = [(_start(theirs, place, note), _start(ours, place, note)) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _start(command: list[str], place: Path, note: Path) -> Start:
    note.unlink(missing_ok=True)
    begun = time.time()
    done = subprocess.run(
        command, env=environment(place, threads=1), cwd=place / "example", capture_output=True, text=True
    )
    if not note.exists():
        raise SystemExit(f"{' '.join(command)} came to no step:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    noted = json.loads(note.read_text())
    return Start(wall=noted["time"] - begun, cpu=noted["cpu"])


def _cpu(command: list[str]) -> float:
    """CPU seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main(report(__doc__ or ""))
