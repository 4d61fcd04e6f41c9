"""Evaluations of classifiers with known qualities, written as a run writes them, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from rasterio.crs import CRS
from rslearn.train.model_context import SampleMetadata
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.utils.geometry import Projection

from rslp.data.crops import CropPlace
from rslp.evaluate.evaluation import intervals_of
from rslp.evaluate.predictions import write_predictions
from rslp.evaluate.rows import Evaluation, rows_of
from rslp.study.comparison import ArmResult, Cost
from rslp.train.metrics import TaskMetrics

UTM = Projection(CRS.from_epsg(32631), 10, -10)
TASK = ClassificationTask(property_name="p", classes=["a", "b"])
WINDOWS = 150


def place(number: int) -> CropPlace:
    x = 50_000 + 500 * number
    bounds = (x, -500_000, x + 4, -499_996)
    metadata = SampleMetadata("g", f"w{number:03d}", bounds, bounds, 0, 1, None, UTM, "data")
    return CropPlace(("g", metadata.window_name), (0, 0), None, alone=True, metadata=metadata)


def evaluated(dataset: str, quality: float, *, seed: int, windows: int = WINDOWS) -> TaskMetrics:
    """A classifier that is right where a window is easier than its quality; how easy it is, all classifiers share."""
    difficulty = np.random.default_rng(sum(map(ord, dataset))).random(windows)
    difficulty = difficulty + np.random.default_rng(seed).normal(0, 0.03, windows)
    metrics = TaskMetrics(TASK, record=True)
    for number, hard in enumerate(difficulty):
        label = number % 2
        output = torch.eye(2)[label if hard < quality else 1 - label]
        target = {"class": torch.tensor(label), "valid": torch.tensor(1.0)}
        constant = torch.tensor([1.0, 0.0])
        metrics.update([output], targets=[target], constants=[constant], places=[place(number)])
    return metrics


def write_evaluation(
    folder: Path,
    qualities: Mapping[str, float],
    *,
    seed: int = 0,
    windows: int = WINDOWS,
    predictions: bool = True,
    intervals: bool = False,
) -> Path:
    """Write ``test.json`` and ``test.parquet`` into a folder; qualities by dataset."""
    metrics = {(d, d): evaluated(d, quality, seed=seed, windows=windows) for d, quality in qualities.items()}
    results = {key: one.result() for key, one in metrics.items()}
    found = intervals_of(results, lambda key: metrics[key].resampler(results[key])) if intervals else {}
    fingerprints = {dataset: f"{dataset}{windows}" for dataset in qualities}
    evaluation = Evaluation(
        "p/e", "test", "best.ckpt", "sha", 1, None, "f", 0.5, (), rows_of(results, found), fingerprints
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.json").write_text(evaluation.json())
    if predictions:
        records = {key: result.records for key, result in results.items() if result.records}
        write_predictions(folder / "test.parquet", records, checkpoint_sha256="sha")
    return folder / "test.json"


def arm(folder: Path, name: str, qualities: Mapping[str, float], *, seeds: int = 3, **options: bool) -> list[ArmResult]:
    """An arm with some seeds, whose qualities differ a little."""
    results = []
    for seed in range(seeds):
        noise = float(np.random.default_rng([seed, *map(ord, name)]).normal(0, 0.01))
        noisy = {dataset: quality + noise for dataset, quality in qualities.items()}
        path = write_evaluation(folder / name.replace(":", "-") / str(seed), noisy, seed=seed, **options)
        results.append(ArmResult(name, seed, (path,), Cost(1_000_000, 4800, 600, 123.4)))
    return results
