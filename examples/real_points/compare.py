"""Joint against alone against a random forest, on the test splits: runs everything and writes RESULTS.md.

    python examples/real_points/compare.py

Everything below was fixed before the test splits were looked at: arms, budget, metrics, seeds. Choices of the configs
(learning rate, epochs, heads) and of the forest were made on the validation splits. A run is evaluated at its best
checkpoint, chosen by the validation score; the test split is computed once, from that checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml
from rslearn.dataset import Dataset, Window
from rslearn.utils.raster_format import NumpyRasterFormat
from rslearn.utils.vector_format import GeojsonVectorFormat
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.metrics import balanced_accuracy_score, r2_score
from upath import UPath

from rslp.errors import DataError, UserError

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
DATASETS = HERE / "datasets"

# The plan. Each dataset's metric is the primary one of rslp's evaluation; the budget of a run is base.yaml's epochs.
ARMS = ("joint", "fuel_only", "crops_only")
SEEDS = (0, 1, 2)
METRICS = {"fuel_moisture": "r2", "crop_type": "balanced_accuracy"}
FLOORS = {"fuel_moisture": "predicting the mean", "crop_type": "predicting the commonest class"}
FOREST: Mapping[str, Any] = {"n_estimators": 300, "min_samples_leaf": 3, "max_features": 0.4}
FOREST_ARM = "random forest"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of one arm.

    Attributes:
        arm: which arm.
        seed: its seed.
        dataset: of which dataset.
        split: ``val`` or ``test``.
        value: the dataset's metric.
        floor: what a constant prediction gets, where known.
        n: number of samples.
        seconds: wall time of the arm's training with this seed.
    """

    arm: str
    seed: int
    dataset: str
    split: str
    value: float
    floor: float | None
    n: int
    seconds: float


def fine_tune(arm: str, seed: int, *, epochs: int | None, prefix: Path) -> Iterator[Score]:
    """Run the three documented commands for one arm and seed, and read what the evaluation wrote."""
    folder = prefix / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load((HERE / f"{arm}.yaml").read_text(encoding="utf-8"))
    changes: dict[str, Any] = {"seed": seed}
    if epochs is not None:
        scheduler = {"init_args": {"T_max": epochs}}
        changes |= {"trainer": {"max_epochs": epochs}, "model": {"init_args": {"scheduler": scheduler}}}
    config |= {
        "base_cfg": str(HERE / config["base_cfg"]),
        "dataset_cfgs": [str(HERE / path) for path in config["dataset_cfgs"]],
        "helios_checkpoint_path": str((HERE / config["helios_checkpoint_path"]).resolve()),
        "output_path": f"OUT_{arm}_{seed}.yaml",
        "global_overrides": changes,
    }
    path = folder / f"{arm}_{seed}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    _command("make_multidataset_config.py", "--cfg", str(path), prefix=prefix)
    launch = ("-m", "rslp.main", "helios", "launch_finetune", f"--config_paths+={folder / config['output_path']}")
    launch += ("--rslp_project", "real_points", "--experiment_id", f"{arm}_{seed}", "--local", "true")
    start = time.perf_counter()
    _command(*launch, prefix=prefix)
    seconds = time.perf_counter() - start
    _command(*launch, "--do_eval", "true", prefix=prefix)
    for split in ("val", "test"):
        report = prefix / "projects" / "real_points" / f"{arm}_{seed}" / "eval" / f"{split}.json"
        for row in json.loads(report.read_text(encoding="utf-8"))["rows"]:
            if row["metric"] == METRICS[row["dataset"]]:
                facts = {key: row[key] for key in ("dataset", "value", "floor", "n")}
                yield Score(arm=arm, seed=seed, split=split, seconds=seconds, **facts)


def _command(*words: str, prefix: Path) -> None:
    environment = {**os.environ, "RSLP_PREFIX": str(prefix)}
    done = subprocess.run(
        [sys.executable, *words], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise UserError(f"python {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def forest(dataset: str, seed: int) -> Iterator[Score]:
    """A random forest on the raw values of the same windows, NaN where a date is missing, and the months."""
    samples = _samples(dataset)
    values, labels = samples["train"]
    classify = dataset == "crop_type"
    start = time.perf_counter()
    if classify:
        model: Any = RandomForestClassifier(**FOREST, random_state=seed, class_weight="balanced")
    else:
        model = RandomForestRegressor(**FOREST, random_state=seed)
    model.fit(values, labels)
    seconds = time.perf_counter() - start
    metric = balanced_accuracy_score if classify else r2_score
    for split in ("val", "test"):
        values, labels = samples[split]
        value = float(metric(labels, model.predict(values)))
        facts = {"value": value, "floor": None, "n": len(labels), "seconds": seconds}
        yield Score(arm=FOREST_ARM, seed=seed, dataset=dataset, split=split, **facts)


def _samples(dataset: str) -> dict[str, tuple[np.ndarray, list[Any]]]:
    """Values ``N F`` and labels of each split."""
    prop = {"fuel_moisture": "lfmc", "crop_type": "crop"}[dataset]
    steps = {"fuel_moisture": 3, "crop_type": 12}[dataset]
    found: dict[str, tuple[list[np.ndarray], list[Any]]] = {split: ([], []) for split in ("train", "val", "test")}
    for window in Dataset(UPath(DATASETS / dataset)).load_windows():
        place = (GeojsonVectorFormat(), window.projection, window.bounds)
        [label] = window.data.read_vector("label", *place)
        values, labels = found[window.options["split"]]
        values.append(_features(window, steps=steps))
        labels.append((label.properties or {})[prop])
    return {split: (np.stack(values), labels) for split, (values, labels) in found.items()}


def _features(window: Window, *, steps: int) -> np.ndarray:
    """All values of a window, dates in order of time, and its first month."""
    if window.time_range is None:
        raise DataError(f"{window.name} has no time range")
    begin, end = window.time_range
    step = (end - begin) / steps
    parts = [np.array([begin.month], dtype=float)]
    for layer, bands in (("s2", 10), ("s1", 2), ("weather", 2), ("terrain", 2)):
        table = np.full((1 if layer == "terrain" else steps, bands), np.nan)
        if window.is_layer_completed(layer):
            names = window_bands(layer)
            raster = window.data.read_raster(layer, names, NumpyRasterFormat(), window.projection, window.bounds)
            for column, span in enumerate(raster.timestamps or ()):
                row = 0 if layer == "terrain" else int((span[0] + (span[1] - span[0]) / 2 - begin) / step)
                table[row] = raster.array[:, column, 0, 0]
        parts.append(table.ravel())
    return np.concatenate(parts)


def window_bands(layer: str) -> list[str]:
    """The names of a layer's bands, as both datasets have them."""
    config = json.loads((DATASETS / "crop_type" / "config.json").read_text(encoding="utf-8"))
    bands: list[str] = config["layers"][layer]["band_sets"][0]["bands"]
    return bands


def report(scores: Sequence[Score], *, minutes: float) -> str:
    """The text of RESULTS.md."""
    lines = [
        "# Results",
        "",
        f"Written by `compare.py`: seeds {', '.join(map(str, SEEDS))}, mean ± standard deviation over them, on the "
        "held-out",
        "test splits (in brackets: validation, on which all choices were made). "
        f"{minutes:.0f} minutes in all, wall time.",
        "",
        "| arm | fuel moisture, R2 | crop type, balanced accuracy | training, s |",
        "|---|---|---|---|",
    ]
    floors = {s.dataset: s.floor for s in scores if s.split == "test" and s.floor is not None}
    cells = [f"{floors[name]:.3f} ({FLOORS[name]})" if name in floors else "" for name in METRICS]
    lines.append(f"| floor | {cells[0]} | {cells[1]} | |")
    for arm in (*ARMS, FOREST_ARM):
        mine = [score for score in scores if score.arm == arm]
        cells = [_cell([score for score in mine if score.dataset == name]) for name in METRICS]
        seconds = sum(
            {(score.seed, score.dataset if arm == FOREST_ARM else ""): score.seconds for score in mine}.values()
        )
        lines.append(f"| {arm} | {cells[0]} | {cells[1]} | {seconds / len(SEEDS):.0f} |")
    sizes = {s.dataset: s.n for s in scores if s.split == "test"}
    lines += ["", "Test samples: " + ", ".join(f"{name} {n}" for name, n in sorted(sizes.items())) + ".", ""]
    return "\n".join(lines)


def _cell(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    test, val = ([score.value for score in scores if score.split == split] for split in ("test", "val"))
    spread = f" ± {stdev(test):.3f}" if len(test) > 1 else ""
    return f"{mean(test):.3f}{spread} ({mean(val):.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all arms, one process at a time; what was finished before is read, not repeated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=Path, default=HERE / "runs", help="where the runs lie (RSLP_PREFIX)")
    parser.add_argument("--epochs", type=int, default=None, help="epochs of every run; base.yaml's when left out")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    scores: list[Score] = []
    try:
        for dataset in METRICS:
            if not (DATASETS / dataset / "config.json").exists():
                raise DataError(f"{DATASETS / dataset}: no such dataset; first run convert.py")
        for seed in SEEDS:
            for arm in ARMS:
                scores += fine_tune(arm, seed, epochs=options.epochs, prefix=options.prefix.resolve())
                print(f"{time.perf_counter() - start:5.0f} s  {arm}, seed {seed}", flush=True)
        for dataset in METRICS:
            scores += [score for seed in SEEDS for score in forest(dataset, seed)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    minutes = (time.perf_counter() - start) / 60
    (HERE / "RESULTS.md").write_text(report(scores, minutes=minutes), encoding="utf-8")
    rows = [asdict(score) for score in scores]
    (options.prefix / "scores.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {HERE / 'RESULTS.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
