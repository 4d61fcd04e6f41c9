"""What the options of joint training do on the built-in example: one short run per option and seed, and a table.

python -m rslp.main helios make_example --path example/
python benchmarks/joint_options.py --example example/ --out results/ --seeds 3

Every run sees the same number of samples in the same number of batches (but where the table says otherwise), from
random weights, and is scored on the test split. Runs that are done are not done again. The arms of a seed come one
after the other, so what drifts on the machine drifts over all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rslp.cli.make_multidataset_config import make_multidataset_config
from rslp.evaluate.evaluation import evaluate
from rslp.rundir import RunDir
from rslp.train.fit import fit

EPOCHS, STEPS, BATCH = 4, 24, 16
# So few windows of one dataset that how often each is drawn matters.
SMALL = 80
REFERENCE = "reference"


def data(**settings: Any) -> dict[str, Any]:
    """Settings of the data module."""
    return {"data": {"init_args": settings}}


def optimizer(**settings: Any) -> dict[str, Any]:
    """Settings of the optimiser."""
    return {"model": {"init_args": {"optimizer": {"init_args": settings}}}}


def weights(**factors: float) -> dict[str, Any]:
    """Factors on the tasks' losses."""
    return {"model": {"init_args": {"model": {"init_args": {"loss_weights": factors}}}}}


def freeze(**settings: Any) -> dict[str, Any]:
    """The encoder frozen for a while."""
    callback = {"class_path": "rslp.train.Freeze", "init_args": {"modules": "model.encoder", **settings}}
    return {"trainer": {"callbacks": [callback]}}


SURGERY = {
    "trainer": {
        "callbacks": [{"class_path": "rslp.train.surgery.MiniPCGrad", "init_args": {"selectors": ["model.encoder"]}}]
    }
}
TRUNK = {
    "class_path": "rslearn.models.trunk.DecoderTrunk",
    "init_args": {
        "task_embedding": {
            "class_path": "rslearn.models.task_embedding.TaskChannelEmbedding",
            "init_args": {"encoder_embedding_size": 128},
        }
    },
}
# An arm with this key is one of stage 1's options, not an override.
MERGED = "merged heads"
PAIRS = data(datasets_per_step=2, steps_per_epoch=STEPS // 2)

ARMS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "sample_mode: random": data(sample_mode="random"),
    "sample_mode: cycle": data(sample_mode="cycle"),
    "sample_mode: reptile, steps_per_dataset: 4": data(sample_mode="reptile", steps_per_dataset=4),
    "sample_mode: proportional": data(sample_mode="proportional"),
    "sample_mode: temperature, temperature: 3": data(sample_mode="temperature", temperature=3.0),
    "sample_mode: weights, crop_type 1 : shrubland 3": data(
        sample_mode="weights", weights={"crop_type": 1, "shrubland": 3}
    ),
    "per_dataset_patch_limit: {shrubland: 80}, stop: all (40 batches)": data(
        per_dataset_patch_limit={"shrubland": SMALL}, steps_per_epoch=None
    ),
    "batch_sizes: 8, twice the steps": data(batch_sizes=8, steps_per_epoch=2 * STEPS),
    "datasets_per_step: 2, half the steps": PAIRS,
    "accumulate_grad_batches: 2, half the steps": {
        **data(steps_per_epoch=STEPS // 2),
        "trainer": {"accumulate_grad_batches": 2},
    },
    "MiniPCGrad on datasets_per_step: 2": {**PAIRS, **SURGERY},
    "loss_weights: {fuel_moisture: 0.1}": weights(fuel_moisture=0.1),
    "loss_weights: {crop_type: 3}": weights(crop_type=3.0),
    "no gradient_clip_val": {"trainer": {"gradient_clip_val": None}},
    "encoder_lr_factor: 0.2": optimizer(encoder_lr_factor=0.2),
    "layer_decay: 0.5": optimizer(layer_decay=0.5),
    "warmup_steps: 24": optimizer(warmup_steps=24),
    "Freeze, thaw_at_epoch: 2": freeze(thaw_at_epoch=2),
    "Freeze, thaw_at_epoch: 2, warmup_steps: 12": freeze(thaw_at_epoch=2, warmup_steps=12),
    "Freeze, never thawed": freeze(),
    "crop_type alone, its half of the batches": data(disabled_datasets=["shrubland"], steps_per_epoch=STEPS // 2),
    "shrubland alone, its half of the batches": data(disabled_datasets=["crop_type"], steps_per_epoch=STEPS // 2),
    "trunk with a task embedding": {"model": {"init_args": {"model": {"init_args": {"trunk": TRUNK}}}}},
    "merge_heads, merge_task_labels (one head for crop_type and shrub)": {MERGED: True},
}


def config(example: Path, arm: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """The multi-dataset config of an arm."""
    reference = {
        "seed": seed,
        **data(num_workers=0, sample_mode="random_cycle", steps_per_epoch=STEPS),
        "trainer": {
            "max_epochs": EPOCHS,
            "check_val_every_n_epoch": EPOCHS,
            "gradient_clip_val": 1.0,
            "callbacks": [],
            "enable_progress_bar": False,
        },
        "model": {
            "init_args": {
                "optimizer": {"class_path": "rslp.train.LayerwiseAdamW", "init_args": {"lr": 0.0005}},
                "scheduler": {
                    "class_path": "rslearn.train.scheduler.MultiStepScheduler",
                    "init_args": {"milestones": [2, 3], "gamma": 0.5},
                },
            }
        },
    }
    few = {"data": {"init_args": {"train_config": {"num_patches": SMALL}}}}
    here = example.resolve()
    options = {"merge_heads": True, "merge_task_labels": True} if MERGED in arm else None
    overrides = {key: value for key, value in arm.items() if key != MERGED}
    return {
        "dataset_cfgs": [
            {"name": "shrubland", "cfgs": [f"{here}/fuel_moisture.yaml", f"{here}/fuel_shrub.yaml"]},
            {"cfgs": f"{here}/crop_type.yaml", "overrides": few},
        ],
        "helios_checkpoint_path": f"{here}/encoder",
        "encoder_embedding_size": 128,
        "patch_size": 8,
        "output_path": "config.yaml",
        "merge_options": options,
        "global_overrides": merged(reference, overrides),
    }


def merged(below: Any, above: Any) -> Any:
    """One mapping over another."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}


def score(example: Path, out: Path, *, arm: str, seed: int) -> dict[str, float]:
    """Train and evaluate one arm, if that is not done yet; the score of each task and the seconds it took."""
    number = list(ARMS).index(arm)
    run = RunDir(out / "projects" / "options" / f"{number:02d}-{seed}")
    kept = run.path / "scores.json"
    if kept.exists():
        found: dict[str, float] = json.loads(kept.read_text())
        return found
    run.path.mkdir(parents=True, exist_ok=True)
    maker = run.path / "multi.yaml"
    maker.write_text(yaml.safe_dump(config(example, ARMS[arm], seed=seed), sort_keys=False))
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_multidataset_config(str(maker))
        fit(run)
        (evaluation,) = evaluate(run, splits=("test",), checkpoint=str(run.last))
    scores = {
        row.task: min(1.0, max(0.0, (row.value - row.floor) / (1 - row.floor)))
        for row in evaluation.rows
        if row.primary and row.floor is not None
    }
    scores["seconds"] = time.process_time() - begin
    kept.write_text(json.dumps(scores))
    return scores


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The results in Markdown: means over the seeds, with the spread of the run's score."""
    tasks = ("crop_type", "fuel_moisture", "shrub")
    lines = ["| | crop_type | fuel_moisture | shrub | score (each seed) |", "|---|---|---|---|---|"]
    for arm, runs in results.items():
        # A mean over the tasks that all arms have in common would hide the one that is left out.
        cells = [f"{statistics.mean(r[t] for r in runs):.2f}" if t in runs[0] else "" for t in tasks]
        each = [statistics.mean(r[t] for t in tasks if t in r) for r in runs]
        cells.append(f"**{statistics.mean(each):.2f}** ({', '.join(f'{value:.2f}' for value in each)})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default="", help="only those whose name holds this text")
    given = parser.parse_args()
    for seed in range(given.seeds):
        for arm in ARMS:
            if given.arms in arm:
                scores = score(given.example, given.out, arm=arm, seed=seed)
                sys.stderr.write(f"{seed} {arm}: {scores}\n")
    print(table(collected(given.out)))


def collected(out: Path) -> dict[str, list[dict[str, float]]]:
    """What was ever measured there, by arm."""
    found = {
        arm: [json.loads(path.read_text()) for path in sorted(out.glob(f"projects/options/{number:02d}-*/scores.json"))]
        for number, arm in enumerate(ARMS)
    }
    return {arm: runs for arm, runs in found.items() if runs}


if __name__ == "__main__":
    main()
