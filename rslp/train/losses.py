"""Running means of losses: sums and counts, so that batches and processes add up to the mean over all they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from rslp.models.denominators import accumulation_dtype
from rslp.runtime import collectives

# (dataset, task, loss) -> sum of the loss over what it counts, and the count.
Sums = dict[tuple[str, str, str], torch.Tensor]
# The same and the numbers of samples in plain values, as (names, numbers).
LossState = dict[str, list[tuple[list[str], list[float]]]]


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
                mean = loss.detach().to(accumulation_dtype(loss.device))
                count = counts[task].to(mean)
                if self._only_finite:
                    count = torch.where(torch.isfinite(mean), count, 0)
                part = torch.stack([torch.where(count > 0, mean * count, 0), count])
                key = (dataset, task, name)
                self.sums[key] = self.sums[key] + part if key in self.sums else part

    def settle(self) -> None:
        """Let the first process hold what all have seen, and the others nothing; all have to call it."""
        if collectives.is_distributed():
            parts = collectives.all_gather(self.state())
            self.load(parts if collectives.is_rank_zero() else [])

    def state(self) -> LossState:
        """Plain values that a checkpoint can hold."""
        return {
            "sums": [(list(key), value.tolist()) for key, value in self.sums.items()],
            "samples": [([dataset], [float(n)]) for dataset, n in self.samples.items()],
        }

    def load(self, states: Iterable[LossState]) -> None:
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


_TINY = 1e-12
Counts = Mapping[str, torch.Tensor]


def all_reduce_denominators(
    counts: Sequence[Counts], *, tasks: Sequence[str], asked: bool, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Add up a step's counts over its batches and over all processes, in one small message.

    Args:
        counts: for each batch of this process its counts by task.
        tasks: all tasks, in the same order everywhere.
        asked: whether this process was asked to leave.
        device: where the message is made.

    Returns:
        The counts by task, and how many processes were asked to leave.
    """
    place_of = {task: place for place, task in enumerate(tasks, start=1)}
    told = torch.zeros(1 + len(place_of), dtype=accumulation_dtype(device), device=device)
    told[0] = float(asked)
    for own in counts:
        for task, count in own.items():
            told[place_of[task]] += count.to(told)
    totals = collectives.all_reduce_sum(told)
    return {task: totals[place] for task, place in place_of.items()}, totals[0]


def loss_factors(
    counts: Sequence[Counts], *, totals: Counts, tasks: Sequence[Sequence[str]]
) -> list[dict[str, torch.Tensor]]:
    """The factor on each batch's mean loss of each task: (m_t / m) n / N.

    Args:
        counts: for each batch of this process its counts n by task.
        totals: the counts N of the step.
        tasks: for each batch the tasks of its dataset: m batches, m_t of them with task t.
    """
    often = Counter(task for of_batch in tasks for task in of_batch)
    return [
        {
            task: often[task] / len(tasks) * (count.to(totals[task]) / totals[task].clamp(min=_TINY))
            for task, count in own.items()
        }
        for own in counts
    ]


def weighted(losses: Mapping[str, Counts], factors: Counts, *, like: torch.Tensor) -> torch.Tensor:
    """The sum of a batch's losses, each task's times its factor.

    Args:
        losses: for each task its losses by name.
        factors: by task.
        like: says the device.
    """
    total = torch.zeros((), device=like.device)
    for task, named in losses.items():
        for loss in named.values():
            total = total + loss * factors[task].to(loss)
    return total
