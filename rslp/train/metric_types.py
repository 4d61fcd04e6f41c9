"""Metrics as sums of counts, moments and scores in double precision, which add up over batches and ranks.

Up to rounding, their values do not depend on how samples are ordered or divided. Without a label the value is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from torchmetrics import Metric

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def compatible(objects: torch.Tensor, boxes: torch.Tensor, *, rule: tuple[str, float]) -> Flags:
    """Which boxes of detections match which boxes of objects, as in rslearn's ``F1Metric``: flags ``N M``.

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
    within: Flags = np.sqrt(((a[:, None] - b[None, :]) ** 2).sum(axis=2)) <= limit
    return within


def matched(fits: Flags) -> Flags:
    """True positives at every score threshold: whether each detection enlarges the maximum matching of those before it.

    The number of True among the first k flags is the size of the maximum matching of the first k detections.

    Args:
        fits: ``N M``, detections by descending score.
    """
    detection_of: dict[int, int] = {}
    object_of: dict[int, int] = {}
    candidates = [np.flatnonzero(row).tolist() for row in fits]
    return np.array([_augment(i, candidates, detection_of, object_of) for i in range(len(fits))], dtype=bool)


def _augment(start: int, candidates: list[list[int]], detection_of: dict[int, int], object_of: dict[int, int]) -> bool:
    """Search breadth-first for an augmenting path from a detection to a free object, and change the matching along it.

    Args:
        start: the detection.
        candidates: for each detection the objects that it fits.
        detection_of: the matching, from object to detection.
        object_of: the matching, from detection to object.
    """
    predecessor: dict[int, int] = {}
    queue = [start]
    for detection in queue:
        for item in candidates[detection]:
            if item in predecessor:
                continue
            predecessor[item] = detection
            if item in detection_of:
                queue.append(detection_of[item])
                continue
            while True:
                matched_detection = predecessor[item]
                released = object_of.get(matched_detection)
                detection_of[item], object_of[matched_detection] = matched_detection, item
                if released is None:
                    return True
                item = released
    return False


@dataclass(frozen=True)
class Curve:
    """Counts of detections and true positives at each score threshold.

    Attributes:
        thresholds: the distinct scores, descending.
        true: for each threshold the number of true positives of at least that score.
        all: for each threshold the number of detections of at least that score.
        objects: number of objects, at least 1.
    """

    thresholds: Floats
    true: npt.NDArray[np.int64]
    all: npt.NDArray[np.int64]
    objects: int

    @classmethod
    def from_scores(cls, scores: npt.NDArray[Any], hits: npt.NDArray[Any], *, objects: int) -> Curve:
        """Make the curve from the score of each detection, and whether it is a true positive."""
        order = np.argsort(-scores, kind="stable")
        scores, hits = scores[order], hits[order].astype(np.int64)
        # Detections of equal score share a threshold.
        ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, np.int64)
        return cls(scores[ends], np.cumsum(hits)[ends], ends + 1, objects)

    def average_precision(self) -> float:
        """The area under precision over recall; precision at a recall is the highest at that recall or above."""
        precision = np.maximum.accumulate((self.true / self.all)[::-1])[::-1]
        return float(np.sum(np.diff(self.true, prepend=0) * precision) / self.objects)

    def f1(self, thresholds: Floats) -> Floats:
        """F1 = 2 true positives / (detections + objects) at each threshold."""
        index = np.searchsorted(-self.thresholds, -thresholds, side="right")
        true, total = (np.concatenate([[0], counts])[index] for counts in (self.true, self.all))
        scores: Floats = 2 * true / (total + self.objects)
        return scores


_NO_VALUE = float("nan")


class ClassMetric(Metric):
    """A metric that is a mean over classes."""

    def classes(self) -> list[int]:
        """Indices of the classes that the mean is over."""
        raise NotImplementedError


class BalancedAccuracy(ClassMetric):
    """Mean recall over the classes that occur among the labels (Brodersen et al. 2010).

    Args:
        num_classes: number of classes.
    """

    hits: torch.Tensor
    support: torch.Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("hits", default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("support", default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, labels: torch.Tensor) -> None:
        """Add predictions ``N C`` (scores) and labels ``N`` (class indices)."""
        classes = len(self.hits)
        self.support += torch.bincount(labels, minlength=classes)
        self.hits += torch.bincount(labels[preds.argmax(dim=1) == labels], minlength=classes)

    def classes(self) -> list[int]:
        """Indices of the classes that occur among the labels."""
        return [index for index, count in enumerate(self.support.tolist()) if count]

    def compute(self) -> torch.Tensor:
        """The mean recall."""
        present = self.support > 0
        return (self.hits[present].double() / self.support[present]).mean()


class MeanIoU(ClassMetric):
    """Mean over classes of intersection / union, both counted over all pixels of a split.

    Args:
        num_classes: number of classes.
        without: a class that is left out of the mean, such as nodata.
    """

    hits: torch.Tensor
    predicted: torch.Tensor
    labelled: torch.Tensor

    def __init__(self, num_classes: int, *, without: int | None = None) -> None:
        super().__init__()
        self._without = without
        for name in ("hits", "predicted", "labelled"):
            self.add_state(name, default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, labels: torch.Tensor) -> None:
        """Add predictions ``N C`` (scores) and labels ``N`` (class indices)."""
        classes, chosen = len(self.hits), preds.argmax(dim=1)
        self.hits += torch.bincount(labels[chosen == labels], minlength=classes)
        self.predicted += torch.bincount(chosen, minlength=classes)
        self.labelled += torch.bincount(labels, minlength=classes)

    def classes(self) -> list[int]:
        """Indices of the classes that occur among the labels or the predictions."""
        counts = (self.predicted + self.labelled).tolist()
        return [index for index, count in enumerate(counts) if count and index != self._without]

    def compute(self) -> torch.Tensor:
        """The mean IoU."""
        chosen = self.classes()
        union = (self.predicted + self.labelled - self.hits)[chosen]
        return (self.hits[chosen].double() / union).mean()


class R2(Metric):
    """Coefficient of determination, 1 - SSE / SST, with SST around the mean of the labels.

    Mean and SST are merged from moments of batches (Chan, Golub & LeVeque 1983), since a difference of sums of squares
    would cancel for labels such as 1e6 ± 1.
    """

    moments: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # n, mean of the labels, sum of their squared distances from it, sum of squared errors
        self.add_state("moments", default=torch.zeros(4, dtype=torch.float64), dist_reduce_fx=_merged)

    def update(self, preds: torch.Tensor, labels: torch.Tensor) -> None:
        """Add predictions and labels of one shape."""
        if not labels.numel():
            return
        y, p = labels.double().flatten(), preds.double().flatten()
        # Relative to the first label, so that equal labels have a variation of exactly 0.
        shifted = y - y[0]
        mean = shifted.mean()
        n = torch.full_like(mean, float(len(y)))
        part = torch.stack([n, y[0] + mean, ((shifted - mean) ** 2).sum(), ((y - p) ** 2).sum()])
        self.moments = _merged(torch.stack([self.moments, part]))

    def compute(self) -> torch.Tensor:
        """The coefficient; 0 by convention for constant labels."""
        n, _, variation, errors = self.moments
        if n == 0:
            return torch.full_like(n, _NO_VALUE)
        return torch.zeros_like(n) if variation <= 0 else 1 - errors / variation


def _merged(parts: torch.Tensor) -> torch.Tensor:
    """Merge moments; each row has n, mean, sum of squared distances from it, sum of squared errors."""
    n, means, squares, errors = parts.unbind(1)
    total = n.sum()
    # Relative to one of the means, so that equal labels have a variation of exactly 0.
    origin = means[n.argmax()]
    shift = (n * (means - origin)).sum() / total.clamp(min=1)
    between = (n * (means - origin - shift) ** 2).sum()
    return torch.stack([total, origin + shift, squares.sum() + between, errors.sum()])


class WithinFactor(Metric):
    """Share of predictions p with l (1 - f) <= p <= l (1 + f), where l is the label.

    Args:
        factor: f.
    """

    counts: torch.Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor
        self.add_state("counts", default=torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, labels: torch.Tensor) -> None:
        """Add predictions and labels of one shape."""
        within = (preds >= labels * (1 - self._factor)) & (preds <= labels * (1 + self._factor))
        self.counts += torch.stack([within.sum(), torch.full_like(within.sum(), within.numel())])

    def compute(self) -> torch.Tensor:
        """The share."""
        return self.counts[0].double() / self.counts[1]


class DetectionScores(ClassMetric):
    """Average precision and F1 of detections, over all score thresholds at once.

    The true positives at a threshold are a maximum matching of detections and objects of the same class whose boxes
    match, as in rslearn's ``F1Metric``; they do not depend on the order of detections of equal score. Average precision
    is the area under precision over recall, where precision at a recall is the highest at that recall or above ("all
    points", PASCAL VOC 2010, Everingham et al. 2010; COCO samples the same curve at 101 recalls).

    Args:
        num_classes: number of classes.
        cmp_mode: how boxes are compared: by ``iou``, or by the ``distance`` of their centres.
        cmp_threshold: the least IoU, or the largest distance in px, of boxes that match.
        flatten_classes: count all classes together; otherwise take the mean over the classes that have objects.
    """

    scores: list[torch.Tensor]
    hits: list[torch.Tensor]
    labels: list[torch.Tensor]
    objects: torch.Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        cmp_mode: str = "iou",
        cmp_threshold: float = 0.5,
        flatten_classes: bool = True,
    ) -> None:
        super().__init__()
        self._rule = (cmp_mode, cmp_threshold)
        self._flat = flatten_classes
        for name in ("scores", "hits", "labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state("objects", default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: list[Mapping[str, Any]], targets: list[Mapping[str, Any]]) -> None:
        """Add images: detections ``{boxes N 4, labels N, scores N}`` and objects ``{boxes M 4, labels M}``."""
        for pred, target in zip(preds, targets, strict=True):
            order = torch.argsort(pred["scores"], descending=True)
            order = order[torch.isfinite(pred["scores"][order])]
            labels = pred["labels"][order]
            fits = compatible(target["boxes"], pred["boxes"][order], rule=self._rule)
            fits &= (labels[:, None] == target["labels"][None, :]).cpu().numpy()
            self.scores.append(pred["scores"][order].double().cpu())
            self.labels.append(labels.cpu())
            self.hits.append(torch.from_numpy(matched(fits)))
            self.objects += torch.bincount(target["labels"], minlength=len(self.objects))

    def classes(self) -> list[int]:
        """Indices of the classes that have objects."""
        return [index for index, count in enumerate(self.objects.tolist()) if count]

    def curves(self) -> list[Curve]:
        """One curve for all classes together, or one for each class that has objects."""
        scores, hits, labels = (
            torch.cat([part.cpu() for part in parts]).numpy() if parts else np.zeros(0)
            for parts in (self.scores, self.hits, self.labels)
        )
        counts = self.objects.tolist()
        if self._flat:
            return [Curve.from_scores(scores, hits, objects=sum(counts))] if sum(counts) else []
        return [Curve.from_scores(scores[labels == i], hits[labels == i], objects=counts[i]) for i in self.classes()]

    def compute(self) -> torch.Tensor:
        """The average precision."""
        return torch.tensor(_mean([curve.average_precision() for curve in self.curves()]), dtype=torch.float64)

    def f1(self, threshold: float) -> float:
        """F1 of the detections whose score is at least the threshold."""
        return _mean([float(curve.f1(np.array([threshold]))[0]) for curve in self.curves()])

    def best_threshold(self) -> float | None:
        """The highest of the score thresholds with the best F1; None without a true positive."""
        curves = self.curves()
        thresholds = np.unique(np.concatenate([curve.thresholds for curve in curves])) if curves else np.zeros(0)
        if not len(thresholds):
            return None
        values = np.mean([curve.f1(thresholds) for curve in curves], axis=0)
        best = len(values) - 1 - int(values[::-1].argmax())
        return float(thresholds[best]) if values[best] > 0 else None


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else _NO_VALUE
