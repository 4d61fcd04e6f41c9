"""Bounds of what a model can reach on the example's labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import distance_matrix

from rslp.example.datasets import KINDS, Kind
from rslp.example.fields import UNLABELLED
from rslp.example.scene import Array, Scene, Site

ORACLES = "oracle.json"
# A detection counts if it lies this close to a label, px.
REACH = 10.0


@dataclass(frozen=True)
class Entry:
    """A window's label as recorded, and the truth behind it (forms as in ``Scene``)."""

    dataset: str
    index: int
    split: str
    recorded: Array
    truth: Array


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Scores on the test split of a dataset.

    Attributes:
        metric: the metric of the dataset.
        floor: score of the best constant: the majority class, the training mean, no detection.
        bound: score of the true labels against the recorded ones; noise of the images lowers what a model can reach.
        windows: number of windows in the test split.
    """

    metric: str
    floor: float
    bound: float
    windows: int


def entry(site: Site, scene: Scene) -> Entry:
    """The label of a window, recorded and true."""
    return Entry(site.dataset, site.index, site.split, scene.recorded, scene.truth)


def score(kind: Kind, predictions: Sequence[Array], recorded: Sequence[Array]) -> float:
    """Score predictions against recorded labels by the dataset's metric.

    Args:
        kind: the dataset.
        predictions: one per window: a class, a value, points ``N 2`` in px, or a class raster.
        recorded: the labels, in the same form.

    Returns:
        Balanced accuracy, R2, average precision or mIoU.
    """
    if kind.metric == "average_precision":
        return _average_precision(predictions, recorded)
    answers, labels = (np.concatenate([array.ravel() for array in arrays]) for arrays in (predictions, recorded))
    if kind.metric == "r2":
        return float(1 - ((answers - labels) ** 2).sum() / ((labels - labels.mean()) ** 2).sum())
    count = len(kind.classes)
    known = labels != UNLABELLED
    pairs = labels[known].astype(int) * count + answers[known].astype(int)
    table = np.bincount(pairs, minlength=count**2).reshape(count, count)
    hits = np.diag(table)
    if kind.metric == "balanced_accuracy":
        present = table.sum(1) > 0
        return float((hits[present] / table.sum(1)[present]).mean())
    union = table.sum(0) + table.sum(1) - hits
    return float((hits[union > 0] / union[union > 0]).mean())


def _average_precision(predictions: Sequence[Array], recorded: Sequence[Array]) -> float:
    """Average precision of points without scores: the product of precision and recall."""
    hits = 0
    for points, labels in zip(predictions, recorded, strict=True):
        close = distance_matrix(points.reshape(-1, 2), labels.reshape(-1, 2)) <= REACH
        rows, columns = linear_sum_assignment(~close)
        hits += int(close[rows, columns].sum())
    total = sum(len(points) for points in predictions) * sum(len(labels) for labels in recorded)
    return hits**2 / total if total else 0.0


def weigh(kind: Kind, entries: Sequence[Entry]) -> Oracle:
    """Compute floor and bound of one dataset from the labels of its windows."""
    train = [entry.recorded for entry in entries if entry.dataset == kind.name and entry.split == "train"]
    test = [entry for entry in entries if entry.dataset == kind.name and entry.split == "test"]
    labels = [entry.recorded for entry in test]
    if kind.metric == "average_precision":
        constant = [np.zeros((0, 2)) for _ in test]
    else:
        values = np.concatenate([label.ravel() for label in train])
        if kind.metric == "r2":
            value = float(values.mean())
        else:
            value = float(np.bincount(values[values != UNLABELLED].astype(int)).argmax())
        constant = [np.full(label.shape, value) for label in labels]
    return Oracle(
        metric=kind.metric,
        floor=round(score(kind, constant, labels), 4),
        bound=round(score(kind, [entry.truth for entry in test], labels), 4),
        windows=len(test),
    )


def write(root: Path, entries: Sequence[Entry]) -> None:
    """Write floors and bounds of all datasets to ``oracle.json``."""
    ordered = sorted(entries, key=lambda entry: (entry.dataset, entry.index))
    table = {kind.name: asdict(weigh(kind, ordered)) for kind in KINDS}
    (root / ORACLES).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def read(root: Path) -> dict[str, Oracle]:
    """Read ``oracle.json``."""
    table = json.loads((root / ORACLES).read_text(encoding="utf-8"))
    return {name: Oracle(**row) for name, row in table.items()}
