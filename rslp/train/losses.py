"""Running means of losses: sums and counts, so that batches and processes add up to the mean over all they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from rslp.train import collectives
from rslp.train.counts import precise

# (dataset, task, loss) -> sum of the loss over what it counts, and the count.
Sums = dict[tuple[str, str, str], torch.Tensor]
# The same and the numbers of samples in plain values, as (names, numbers).
State = dict[str, list[tuple[list[str], list[float]]]]


class LossMeter:
    """The losses of one split since it began.

    Args:
        only_finite: leave out losses that are not finite.

    Attributes:
        sums: for each loss its sum and its count.
        samples: number of samples by dataset.
    """

    def __init__(self, *, only_finite: bool = False) -> None:
        self._only_finite = only_finite
        self.sums: Sums = {}
        self.samples: dict[str, int] = {}

    def add(
        self,
        dataset: str,
        *,
        losses: Mapping[str, Mapping[str, torch.Tensor]],
        counts: Mapping[str, torch.Tensor],
        samples: int,
    ) -> None:
        """Add a batch.

        Args:
            dataset: its dataset.
            losses: for each task its losses by name, means over ``counts``.
            counts: for each task what its losses are means over.
            samples: number of samples in the batch.
        """
        self.samples[dataset] = self.samples.get(dataset, 0) + samples
        for task, named in losses.items():
            for name, loss in named.items():
                mean = loss.detach().to(precise(loss.device))
                count = counts[task].to(mean)
                if self._only_finite:
                    count = torch.where(torch.isfinite(mean), count, 0)
                part = torch.stack([torch.where(count > 0, mean * count, 0), count])
                key = (dataset, task, name)
                self.sums[key] = self.sums[key] + part if key in self.sums else part

    def settle(self) -> None:
        """Let the first process hold what all have seen, and the others nothing; all have to call it."""
        if collectives.several():
            parts = collectives.gathered(self.state())
            self.load(parts if collectives.first() else [])

    def state(self) -> State:
        """Plain values that a checkpoint can hold."""
        return {
            "sums": [(list(key), value.tolist()) for key, value in self.sums.items()],
            "samples": [([dataset], [float(n)]) for dataset, n in self.samples.items()],
        }

    def load(self, states: Iterable[State]) -> None:
        """Take up the sum of what ``state`` gave, here or elsewhere."""
        self.sums, self.samples = {}, {}
        for state in states:
            for (dataset, task, name), value in state["sums"]:
                part, key = torch.tensor(value, dtype=torch.float64), (dataset, task, name)
                self.sums[key] = self.sums[key] + part if key in self.sums else part
            for (dataset,), (n,) in state["samples"]:
                self.samples[dataset] = self.samples.get(dataset, 0) + int(n)

    def values(self, split: str) -> dict[str, float]:
        """The means as logged, and nothing held any more.

        Args:
            split: "train", "val" or "test".

        Returns:
            ``<split>_<task>_<loss>``; ``<split>/<dataset>/<task>/loss``, the sum of a task's losses;
            ``<split>/<dataset>/loss``, the sum over its tasks; ``<split>_loss``, the mean over all datasets' samples.
        """
        logged: dict[str, float] = {}
        by_dataset: dict[str, float] = dict.fromkeys(sorted(self.samples), 0.0)
        for (dataset, task, name), (total, count) in sorted((k, v.tolist()) for k, v in self.sums.items()):
            mean = total / count if count else 0.0
            logged[f"{split}_{task}_{name}"] = mean
            place = f"{split}/{dataset}/{task}/loss"
            logged[place] = logged.get(place, 0.0) + mean
            by_dataset[dataset] += mean
        logged |= {f"{split}/{dataset}/loss": loss for dataset, loss in by_dataset.items()}
        samples = sum(self.samples.values())
        if samples:
            logged[f"{split}_loss"] = sum(loss * self.samples[d] for d, loss in by_dataset.items()) / samples
        self.load([])
        return logged
