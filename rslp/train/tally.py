"""What an evaluation was of: how many windows, and which share of their labels is valid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rslp.train.crops import PIXELS, Place

Window = tuple[str, str]


@dataclass
class Tally:
    """Counts of one task of one split.

    Attributes:
        windows: group and name of all windows.
        labelled: those with a valid label.
        valid: number of valid labels: pixels, or samples where a label is of a whole sample.
        total: number of labels.
    """

    windows: set[Window] = field(default_factory=set)
    labelled: set[Window] = field(default_factory=set)
    valid: int = 0
    total: int = 0

    @property
    def valid_share(self) -> float | None:
        """Share of the labels that are valid; None before the first."""
        return self.valid / self.total if self.total else None

    def new_windows(self, count: int) -> list[Place]:
        """Places of samples that are windows of their own."""
        names = (("", str(len(self.windows) + i)) for i in range(count))
        return [Place(name, (0, 0), None, alone=True) for name in names]

    def add(self, target: Mapping[str, Any], window: Window) -> None:
        """Add a sample's target."""
        mask = target["valid"]
        flags = (mask if isinstance(mask, torch.Tensor) else mask.image) > 0
        valid = int(flags.sum())
        self.windows.add(window)
        if valid:
            self.labelled.add(window)
        # Counted before transforms, which may pad or scale labels.
        valid, total = target[PIXELS].tolist() if PIXELS in target else (valid, flags.numel())
        self.valid += valid
        self.total += total

    def join(self, other: Tally) -> None:
        """Add what another process has seen."""
        self.windows |= other.windows
        self.labelled |= other.labelled
        self.valid += other.valid
        self.total += other.total
