"""Which detections are true, and what follows for each score threshold: precision, recall, F1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def compatible(objects: torch.Tensor, boxes: torch.Tensor, *, rule: tuple[str, float]) -> Flags:
    """Which detections fit which objects by their boxes: flags ``N M``, as rslearn's ``F1Metric`` compares them.

    Args:
        objects: boxes ``M 4`` (x0 y0 x1 y1).
        boxes: boxes ``N 4`` of detections.
        rule: ``iou`` and the least intersection over union, or ``distance`` and the largest one between centres.
    """
    mode, limit = rule
    if mode == "iou":
        iou: Flags = torchvision.ops.box_iou(boxes, objects).cpu().numpy() >= limit
        return iou
    a, b = (((c[:, :2] + c[:, 2:]) / 2).cpu().numpy().astype(np.float64) for c in (boxes, objects))
    near: Flags = np.sqrt(((a[:, None] - b[None, :]) ** 2).sum(axis=2)) <= limit
    return near


def matched(fits: Flags) -> Flags:
    """For each detection whether the largest matching grows when it is added to those before it.

    So the number of flags among the first k is the size of the largest matching of the first k, for every k.

    Args:
        fits: ``N M``, detections by falling score.
    """
    owner: dict[int, int] = {}
    holds: dict[int, int] = {}
    near = [np.flatnonzero(row).tolist() for row in fits]
    return np.array([_grows(start, near=near, owner=owner, holds=holds) for start in range(len(fits))], dtype=bool)


def _grows(start: int, *, near: list[list[int]], owner: dict[int, int], holds: dict[int, int]) -> bool:
    """Look for an augmenting path from a detection to a free object, and take it.

    Args:
        start: the detection.
        near: for each detection the objects that fit it.
        owner: the detection that each matched object belongs to.
        holds: the object that each matched detection has.
    """
    reached: dict[int, int] = {}
    queue = [start]
    for detection in queue:
        for item in near[detection]:
            if item in reached:
                continue
            reached[item] = detection
            if item in owner:
                queue.append(owner[item])
                continue
            while True:
                taker = reached[item]
                given_up = holds.get(taker)
                owner[item], holds[taker] = taker, item
                if given_up is None:
                    return True
                item = given_up
    return False


@dataclass(frozen=True)
class Curve:
    """Detections at each score threshold.

    Attributes:
        thresholds: the scores that occur, falling.
        true: for each the true positives among the detections of at least that score.
        all: for each the number of these detections.
        objects: number of objects, at least 1.
    """

    thresholds: Floats
    true: npt.NDArray[np.int64]
    all: npt.NDArray[np.int64]
    objects: int

    @classmethod
    def of(cls, scores: npt.NDArray[Any], hits: npt.NDArray[Any], *, objects: int) -> Curve:
        """From the score of each detection, and whether it is a true positive."""
        order = np.argsort(-scores, kind="stable")
        scores, hits = scores[order], hits[order].astype(np.int64)
        # Detections of equal score come in together.
        ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, np.int64)
        return cls(scores[ends], np.cumsum(hits)[ends], ends + 1, objects)

    def average_precision(self) -> float:
        """The area under the highest precision at each recall or a higher one."""
        precision = np.maximum.accumulate((self.true / self.all)[::-1])[::-1]
        return float(np.sum(np.diff(self.true, prepend=0) * precision) / self.objects)

    def f1(self, thresholds: Floats) -> Floats:
        """F1 = 2 true positives / (detections + objects) at each threshold."""
        place = np.searchsorted(-self.thresholds, -thresholds, side="right")
        true, total = (np.concatenate([[0], counts])[place] for counts in (self.true, self.all))
        found: Floats = 2 * true / (total + self.objects)
        return found
