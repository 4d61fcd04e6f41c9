"""What predictions show beside metrics: confusion, reliability, precision over recall, and their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rslp.evaluate.predictions import Key, read_tasks
from rslp.train.metric_types import Curve

Floats = npt.NDArray[np.float64]
# Bins of a reliability diagram, and the most points of a scatter plot.
_BINS, _MOST_POINTS = 10, 1500


@dataclass(frozen=True)
class TaskDetails:
    """The predictions of one task.

    Attributes:
        kind: name of the task's kind.
        classes: names of its classes; none for numbers.
        table: the rows of the file.
    """

    kind: str
    classes: tuple[str, ...]
    table: pa.Table

    def _column(self, name: str) -> list[Any] | None:
        if name not in self.table.column_names or self.table[name].null_count == len(self.table):
            return None
        values: list[Any] = self.table[name].to_pylist()
        return values

    def confusion(self) -> npt.NDArray[np.int64] | None:
        """How many samples or pixels have a label (row) and a predicted class (column), ``C C``; None for others."""
        counts = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        if (probabilities := self._column("probabilities")) is not None:
            for label, scores in zip(self.table["label"].to_pylist(), probabilities, strict=True):
                counts[label, int(np.argmax(scores))] += 1
            return counts
        parts = [self._column(f"confusion_{name}") for name in ("label", "predicted", "pixels")]
        if any(part is None for part in parts):
            return None
        label, predicted, pixels = (np.concatenate([np.array(p, np.int64) for p in part or ()]) for part in parts)
        size = max(len(self.classes), int(max(label.max(initial=-1), predicted.max(initial=-1))) + 1)
        counts = np.zeros((size, size), dtype=np.int64)
        np.add.at(counts, (label, predicted), pixels)
        return counts

    def reliability(self) -> tuple[Floats, Floats, npt.NDArray[np.int64], float] | None:
        """Of a classifier, by bins of equal width of its confidence that are not empty.

        Returns:
            Mean confidence, share of right predictions and number of samples of each bin; and the expected calibration
            error: the mean distance of the first two, weighted by the third.
        """
        if (probabilities := self._column("probabilities")) is None:
            return None
        scores = np.array(probabilities, dtype=np.float64)
        confidence, right = scores.max(axis=1), scores.argmax(axis=1) == np.array(self.table["label"].to_pylist())
        bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
        number = np.bincount(bins, minlength=_BINS)
        some = number > 0
        means = (np.bincount(bins, weights=values, minlength=_BINS)[some] for values in (confidence, right))
        mean_confidence, accuracy = (total / number[some] for total in means)
        error = float((np.abs(mean_confidence - accuracy) * number[some]).sum() / number.sum())
        return mean_confidence, accuracy, number[some], error

    def precision_recall(self) -> tuple[Floats, Floats] | None:
        """Recall and precision of a detector at each of its score thresholds, over all classes together."""
        hits, scores = self._column("state_hits"), self._column("state_scores")
        true = self._column("true_labels")
        if self.kind != "detection" or hits is None or scores is None or true is None:
            return None
        objects = sum(map(len, true))
        flat_hits, flat_scores = (np.concatenate([np.array(p, np.float64) for p in part]) for part in (hits, scores))
        if not objects or not len(flat_scores):
            return None
        curve = Curve.from_scores(flat_scores, flat_hits, objects=objects)
        return curve.true / curve.objects, curve.true / curve.all

    def points(self) -> tuple[Floats, Floats, int] | None:
        """Label and prediction of a regression, thinned to what a plot can show, and their true number."""
        target, value = self._column("target"), self._column("value")
        if target is None or value is None:
            return None
        step = max(1, -(-len(target) // _MOST_POINTS))
        return np.array(target[::step], np.float64), np.array(value[::step], np.float64), len(target)

    def places(self) -> list[tuple[float, float]]:
        """Longitude and latitude of each sample."""
        return list(zip(self.table["lon"].to_pylist(), self.table["lat"].to_pylist(), strict=True))

    def sample(self, group: str, window: str, bounds: Sequence[int]) -> dict[str, Any]:
        """The columns of one sample that are not empty; none where the file lacks it."""
        fields = {"group": group, "window": window, "x0": bounds[0], "y0": bounds[1]}
        chosen = self.table
        for name, value in fields.items():
            chosen = chosen.filter(pa.compute.equal(chosen[name], pa.scalar(value, chosen[name].type)))
        row: dict[str, Any] = chosen.to_pylist()[0] if len(chosen) else {}
        return {name: value for name, value in row.items() if value is not None}


def confused(counts: npt.NDArray[np.int64]) -> tuple[int, int, int, int] | None:
    """The most frequent confusion: label, predicted class, how often, and how often the label occurs; None if none."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    if not wrong.any():
        return None
    label, predicted = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return int(label), int(predicted), int(wrong[label, predicted]), int(counts[label].sum())


def read_details(path: Path, *, checkpoint_sha256: str) -> dict[Key, TaskDetails]:
    """The predictions of a file by (dataset, task).

    Raises:
        RunError: the file is damaged, or of another checkpoint.
    """

    def read(rows: pa.Table, entry: Mapping[str, Any]) -> TaskDetails:
        return TaskDetails(entry["kind"], _classes(entry["description"]), rows)

    return read_tasks(path, checkpoint_sha256, read)


def _classes(description: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a task's classes; numbers where it has none."""
    names = description.get("classes") or description.get("class_names")
    return tuple(names or map(str, range(description.get("num_classes") or 0)))
