"""What one bad dataset does to a joint run on the built-in example, under each `balance`: a table of test metrics.

python -m rslp.main helios make_example --path example/
python benchmarks/spoiler.py --example example/ --out results/ --seeds 2

`crop_type` and `fuel_moisture` are trained together, then beside a spoiler: the images of `crop_type` with a number
between 0 and 100 by chance as label, whose loss, about 3000, is a thousand times theirs. Each step has a batch of each
dataset. Runs that are done are not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from rslp.cli.make_multidataset_config import make_multidataset_config
from rslp.evaluate.evaluation import evaluate
from rslp.rundir import RunDir
from rslp.train.fit import fit

WITHOUT = "without the spoiler"
ARMS = (WITHOUT, "none", "scale", "uncertainty", "famo", "upgrad")
METRICS = {"crop_type": "balanced_accuracy", "fuel_moisture": "r2"}


def make_spoiler(example: Path, out: Path) -> None:
    """Copy crop_type with labels by chance, and write its dataset config."""
    if (out / "spoiler.yaml").exists():
        return
    shutil.copytree(example / "crop_type", out / "spoiler", ignore=shutil.ignore_patterns(".rslp*"))
    draws = random.Random(0)
    for path in sorted((out / "spoiler" / "windows").glob("*/*/layers/label/data.geojson")):
        content = json.loads(path.read_text())
        for feature in content["features"]:
            feature["properties"] = {"value": draws.choice([0, 20, 40, 60, 80, 100])}
        path.write_text(json.dumps(content))
    text = (
        (example / "crop_type.yaml")
        .read_text()
        .replace("crop_type", "spoiler")
        .replace("out_channels: 6", "out_channels: 1")
    )
    head, tail = text.split("            class_path: rslearn.train.tasks.classification.ClassificationTask\n")
    task = (
        "            class_path: rslearn.train.tasks.regression.RegressionTask\n"
        "            init_args:\n              property_name: value\n              metrics: [r2]\n"
    )
    text = head + task + tail[tail.index("        input_mapping:") :]
    (out / "spoiler.yaml").write_text(text.replace("classification.ClassificationHead", "regression.RegressionHead"))


def config(example: Path, out: Path, *, arm: str, seed: int) -> dict[str, Any]:
    """The multi-dataset config of an arm."""
    made: dict[str, Any] = yaml.safe_load((example / "multi_dataset.yaml").read_text())
    spoiler = [] if arm == WITHOUT else [str(out / "spoiler.yaml")]
    overrides = made["global_overrides"]
    overrides["seed"] = seed
    overrides["trainer"] |= {"max_epochs": 3, "check_val_every_n_epoch": 3, "enable_progress_bar": False}
    overrides["data"] = {"init_args": {"steps_per_epoch": 24, "datasets_per_step": 2 + len(spoiler)}}
    module = overrides["model"]["init_args"]
    module["balance"] = "none" if arm == WITHOUT else arm
    module["optimizer"]["init_args"]["lr"] = 0.001
    module["scheduler"]["init_args"] = {"milestones": [2], "gamma": 0.3}
    return {
        **made,
        "dataset_cfgs": [*(str(example / f"{name}.yaml") for name in METRICS), *spoiler],
        "helios_checkpoint_path": str(example / "encoder"),
        "num_workers": 0,
        "output_path": "config.yaml",
    }


def measured(example: Path, out: Path, *, arm: str, seed: int) -> dict[str, float]:
    """Train and evaluate one arm, if that is not done yet; the test metrics of the last weights by dataset."""
    run = RunDir(out / "projects" / "spoiler" / f"{ARMS.index(arm)}-{seed}")
    done = run.path / "scores.json"
    if not done.exists():
        run.path.mkdir(parents=True, exist_ok=True)
        path = run.path / "multi.yaml"
        path.write_text(yaml.safe_dump(config(example, out, arm=arm, seed=seed), sort_keys=False))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_multidataset_config(str(path))
            fit(run)
            (evaluation,) = evaluate(run, splits=("test",), checkpoint=str(run.last))
        done.write_text(json.dumps({row.dataset: row.value for row in evaluation.rows if row.primary}))
    found: dict[str, float] = json.loads(done.read_text())
    return found


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    example, out = given.example.resolve(), given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    make_spoiler(example, out)
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(given.seeds):
        for arm in ARMS:
            results[arm].append(measured(example, out, arm=arm, seed=seed))
            sys.stderr.write(f"{seed} {arm}: {results[arm][-1]}\n")
    lines = [f"| balance | {' | '.join(f'{name}, {metric}' for name, metric in METRICS.items())} |", "|---|---|---|"]
    for arm, runs in results.items():
        cells = [[run[name] for run in runs] for name in METRICS]
        shown = [f"{statistics.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})" for values in cells]
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
