"""How well anyone could do: the truth behind the labels, scored against the labels as they were recorded."""

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
    """What is to be had on the test split.

    Attributes:
        metric: the metric of the dataset.
        floor: score of the answer that needs no image: the majority class, the training mean, no detection.
        bound: score of the truth itself against the recorded labels; noise of the images lowers it further.
        windows: number of windows in the test split.
    """

    metric: str
    floor: float
    bound: float
    windows: int


def entry(site: Site, scene: Scene) -> Entry:
    """Note what a window's label says."""
    return Entry(site.dataset, site.index, site.split, scene.recorded, scene.truth)


def score(kind: Kind, said: Sequence[Array], recorded: Sequence[Array]) -> float:
    """Score answers against recorded labels, window by window, by the dataset's metric.

    Args:
        kind: the dataset.
        said: one answer per window: a class, a value, points ``N 2`` in px, or a class raster.
        recorded: the labels, in the same form.

    Returns:
        Balanced accuracy, R2, average precision or mIoU.
    """
    if kind.metric == "average_precision":
        return _average_precision(said, recorded)
    answers, labels = (np.concatenate([one.ravel() for one in many]) for many in (said, recorded))
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


def _average_precision(said: Sequence[Array], recorded: Sequence[Array]) -> float:
    """Of points without scores, the area under precision over recall is the product of the two."""
    hits = 0
    for points, labels in zip(said, recorded, strict=True):
        near = distance_matrix(points.reshape(-1, 2), labels.reshape(-1, 2)) <= REACH
        rows, columns = linear_sum_assignment(~near)
        hits += int(near[rows, columns].sum())
    total = sum(len(points) for points in said) * sum(len(labels) for labels in recorded)
    return hits**2 / total if total else 0.0


def weigh(kind: Kind, entries: Sequence[Entry]) -> Oracle:
    """Work out floor and bound of one dataset from the labels of its windows."""
    own = [one for one in entries if one.dataset == kind.name]
    train = [one.recorded for one in own if one.split == "train"]
    test = [one for one in own if one.split == "test"]
    labels = [one.recorded for one in test]
    if kind.metric == "average_precision":
        idle = [np.zeros((0, 2)) for _ in test]
    else:
        values = np.concatenate([one.ravel() for one in train])
        if kind.metric == "r2":
            usual = float(values.mean())
        else:
            usual = float(np.bincount(values[values != UNLABELLED].astype(int)).argmax())
        idle = [np.full(one.shape, usual) for one in labels]
    return Oracle(
        metric=kind.metric,
        floor=round(score(kind, idle, labels), 4),
        bound=round(score(kind, [one.truth for one in test], labels), 4),
        windows=len(test),
    )


def write(root: Path, entries: Sequence[Entry]) -> None:
    """Write floors and bounds of all datasets to ``oracle.json``."""
    ordered = sorted(entries, key=lambda one: (one.dataset, one.index))
    table = {kind.name: asdict(weigh(kind, ordered)) for kind in KINDS}
    (root / ORACLES).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def read(root: Path) -> dict[str, Oracle]:
    """Read them back."""
    table = json.loads((root / ORACLES).read_text(encoding="utf-8"))
    return {name: Oracle(**row) for name, row in table.items()}
