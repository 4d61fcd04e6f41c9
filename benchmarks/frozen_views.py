"""How many fixed views does a frozen encoder need? The rule for the default of ``frozen_views``, and its runs.

Written down before the runs. Data: the built-in example, all four datasets (random crops and flips in each but fuel
moisture, which has flips alone). Encoder: the best checkpoint of the example's own joint run (``make demo``), frozen to
the end; heads from scratch. Budget: 6 epochs at the example's learning rate. Arms: 1, 2 and 4 fixed views, and fresh
draws each time (``frozen_views: null``). Seeds 0, 1, 2. Metric: ``val/score`` after the last epoch. Noise: the standard
deviation of the fresh arm over its seeds. Rule: the default is the smallest number of views whose mean is no more than
that noise below the mean of the fresh arm. The test split is not touched.

    python benchmarks/frozen_views.py --example example --checkpoint RUN/checkpoints/best.ckpt --out FOLDER

Prints a line for each run, then the table; runs that are done already in FOLDER are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

ARMS: tuple[int | None, ...] = (None, 1, 2, 4)
SEEDS = (0, 1, 2)
EPOCHS = 6


def config_of(example: Path, checkpoint: Path, *, views: int | None, seed: int, out: Path) -> dict[str, object]:
    """The multi-dataset config of one run."""
    names = ("crop_type", "vessel_detection", "land_cover", "fuel_moisture")
    return {
        "dataset_cfgs": [str(example / f"{name}.yaml") for name in names],
        "helios_checkpoint_path": str(checkpoint),
        "encoder_embedding_size": 128,
        "patch_size": 8,
        "output_path": str(out),
        "num_workers": 1,
        "global_overrides": {
            "seed": seed,
            "data": {"init_args": {"frozen_views": views}},
            "trainer": {
                "max_epochs": EPOCHS,
                "check_val_every_n_epoch": EPOCHS,
                "gradient_clip_val": 1.0,
                "enable_progress_bar": False,
                "callbacks": [{"class_path": "rslp.train.Freeze", "init_args": {"modules": "model.encoder"}}],
            },
            "model": {
                "init_args": {
                    "optimizer": {"init_args": {"lr": 0.0005}},
                    "scheduler": {
                        "class_path": "rslearn.train.scheduler.MultiStepScheduler",
                        "init_args": {"milestones": [4, 6], "gamma": 0.5},
                    },
                }
            },
        },
    }


def score_of(example: Path, checkpoint: Path, *, views: int | None, seed: int, folder: Path) -> float:
    """Train one arm with one seed, unless it is done; its last validation score."""
    name = f"{'fresh' if views is None else views}-{seed}"
    run = folder / "projects" / "views" / name
    if not (run / "DONE.json").exists():
        written = folder / f"{name}.yaml"
        generated = folder / f"OUT_{name}.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(example, checkpoint, views=views, seed=seed, out=generated)
        written.write_text(yaml.safe_dump(config, sort_keys=False))
        workflow = [sys.executable, "-m", "rslp.main", "helios"]
        subprocess.run([*workflow, "make_multidataset_config", "--cfg", str(written)], check=True)
        words = ["--rslp_project", "views", "--experiment_id", name, "--local", "true", "--check", "false"]
        environment = {**os.environ, "RSLP_PREFIX": str(folder)}
        launch = [*workflow, "launch_finetune", f"--config_paths+={generated}", *words]
        subprocess.run(launch, check=True, env=environment, stderr=subprocess.DEVNULL)
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return [float(row[3]) for row in rows if row[2] == "val/score"][-1]


def main() -> None:
    """Run all arms and print what the rule says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", type=Path, required=True, help="the folder that `helios make_example` has written")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint of a joint run on it")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    given = parser.parse_args()
    scores: dict[str, list[float]] = {}
    for seed in SEEDS:
        for views in ARMS:
            name = "fresh" if views is None else str(views)
            score = score_of(
                given.example.absolute(),
                given.checkpoint.absolute(),
                views=views,
                seed=seed,
                folder=given.out.absolute(),
            )
            scores.setdefault(name, []).append(score)
            print(json.dumps({"views": name, "seed": seed, "val_score": round(score, 4)}), flush=True)
    noise, best = statistics.stdev(scores["fresh"]), statistics.mean(scores["fresh"])
    print("\n| views | mean | by seed |\n|---|---|---|")
    for name, values in scores.items():
        print(f"| {name} | {statistics.mean(values):.3f} | {', '.join(f'{value:.3f}' for value in values)} |")
    enough = [name for name in scores if name != "fresh" and statistics.mean(scores[name]) >= best - noise]
    print(f"\nnoise {noise:.3f}; the smallest number of views within it: {enough[0] if enough else 'none of them'}")


if __name__ == "__main__":
    main()
