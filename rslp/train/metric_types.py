"""Metrics made of counts and sums, so that they add up over batches and processes."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class BalancedAccuracy(Metric):
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

    def compute(self) -> torch.Tensor:
        """The mean recall; 0 without labels."""
        present = self.support > 0
        if not present.any():
            return torch.zeros(())
        return (self.hits[present] / self.support[present]).mean()


class R2(Metric):
    """Coefficient of determination, 1 - SSE / SST, from sums in double precision.

    SST is taken around the mean of the labels seen. It is 0 by convention where the labels do not vary.
    """

    sums: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # n, sum of labels, sum of squared labels, sum of squared errors
        self.add_state("sums", default=torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, labels: torch.Tensor) -> None:
        """Add predictions and labels of one shape."""
        y, p = labels.double().flatten(), preds.double().flatten()
        ones = torch.ones_like(y)
        self.sums += torch.stack([ones.sum(), y.sum(), (y * y).sum(), ((y - p) ** 2).sum()])

    def compute(self) -> torch.Tensor:
        """The coefficient; 0 where the labels do not vary."""
        n, total, squares, errors = self.sums
        variation = squares - total * total / n.clamp(min=1)
        if variation <= 0:
            return torch.zeros((), dtype=torch.float64)
        return torch.sub(1, errors / variation)
