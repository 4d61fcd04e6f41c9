"""Losses over batches and ranks: mean losses for the log, and the factors that weight a step's batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from rslp.models.denominators import accumulation_dtype
from rslp.runtime import collectives

# (dataset, task, loss) -> the loss summed over its units, and the number of units.
Sums = dict[tuple[str, str, str], torch.Tensor]
# These sums and the numbers of samples as plain values, in pairs (names, numbers).
LossState = dict[str, list[tuple[list[str], list[float]]]]


class LossMeter:
    """Mean losses of one split since the epoch began.

    Args:
        only_finite: leave out losses that are not finite.

    Attributes:
        sums: for each loss its sum and its number of units.
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
            losses: for each task its losses by name, means over its ``counts`` units.
            counts: for each task the denominator of its losses, see ``models.denominators``.
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

    def reduce_to_rank_zero(self) -> None:
        """Sum over ranks into rank 0, and reset the other ranks; all of them have to call it."""
        if collectives.is_distributed():
            parts = collectives.all_gather(self.state())
            self.load(parts if collectives.is_rank_zero() else [])

    def state(self) -> LossState:
        """The sums as plain values, for a checkpoint."""
        return {
            "sums": [(list(key), value.tolist()) for key, value in self.sums.items()],
            "samples": [([dataset], [float(n)]) for dataset, n in self.samples.items()],
        }

    def load(self, states: Iterable[LossState]) -> None:
        """Replace the sums by the total of several ``state()``."""
        self.sums, self.samples = {}, {}
        for state in states:
            for (dataset, task, name), value in state["sums"]:
                part, key = torch.tensor(value, dtype=torch.float64), (dataset, task, name)
                self.sums[key] = self.sums[key] + part if key in self.sums else part
            for (dataset,), (n,) in state["samples"]:
                self.samples[dataset] = self.samples.get(dataset, 0) + int(n)

    def values(self, split: str) -> dict[str, float]:
        """The mean losses by the names they are logged under; resets the meter.

        Args:
            split: "train", "val" or "test".

        Returns:
            ``<split>_<task>_<loss>``; ``<split>/<dataset>/<task>/loss``, the sum of a task's losses;
            ``<split>/<dataset>/loss``, the sum over its tasks; ``<split>_loss``, the mean over all datasets' samples;
            of the training ``train/<dataset>/samples``.
        """
        logged: dict[str, float] = {}
        by_dataset: dict[str, float] = dict.fromkeys(sorted(self.samples), 0.0)
        for (dataset, task, name), (total, count) in sorted((k, v.tolist()) for k, v in self.sums.items()):
            mean = total / count if count else 0.0
            logged[f"{split}_{task}_{name}"] = mean
            key = f"{split}/{dataset}/{task}/loss"
            logged[key] = logged.get(key, 0.0) + mean
            by_dataset[dataset] += mean
        logged |= {f"{split}/{dataset}/loss": loss for dataset, loss in by_dataset.items()}
        if split == "train":
            # What the mixture has drawn.
            logged |= {f"train/{dataset}/samples": float(n) for dataset, n in sorted(self.samples.items())}
        samples = sum(self.samples.values())
        if samples:
            logged[f"{split}_loss"] = sum(loss * self.samples[d] for d, loss in by_dataset.items()) / samples
        self.load([])
        return logged


_TINY = 1e-12
Counts = Mapping[str, torch.Tensor]


def all_reduce_denominators(
    counts: Sequence[Counts], *, tasks: Sequence[str], preempted: bool, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sum a step's loss denominators over its batches and all ranks, and the preemption flag in the same all-reduce.

    Args:
        counts: for each batch of this rank its denominators by task.
        tasks: all tasks, in the same order in all ranks.
        preempted: whether this rank is preempted.
        device: the device of the ranks' communication.

    Returns:
        The denominators by task, and how many ranks are preempted.
    """
    position = {task: i for i, task in enumerate(tasks, start=1)}
    message = torch.zeros(1 + len(position), dtype=accumulation_dtype(device), device=device)
    message[0] = float(preempted)
    for of_batch in counts:
        for task, count in of_batch.items():
            message[position[task]] += count.to(message)
    totals = collectives.all_reduce_sum(message)
    return {task: totals[i] for task, i in position.items()}, totals[0]


def loss_factors(
    counts: Sequence[Counts], *, totals: Counts, tasks: Sequence[Sequence[str]]
) -> list[dict[str, torch.Tensor]]:
    """The factor on each batch's mean loss of each task: (m_t / m) n / N.

    Args:
        counts: for each batch of this rank its denominators n by task.
        totals: the denominators N of the step, over all ranks.
        tasks: for each batch the tasks of its dataset: m batches, m_t of them with task t.
    """
    batches = Counter(task for of_batch in tasks for task in of_batch)
    return [
        {
            task: batches[task] / len(tasks) * (count.to(totals[task]) / totals[task].clamp(min=_TINY))
            for task, count in of_batch.items()
        }
        for of_batch in counts
    ]


def weighted(losses: Mapping[str, Counts], factors: Counts, *, like: torch.Tensor) -> torch.Tensor:
    """The sum of a batch's losses, each multiplied by its task's factor.

    Args:
        losses: for each task its losses by name.
        factors: by task.
        like: a tensor on the device of the sum.
    """
    total = torch.zeros((), device=like.device)
    for task, named in losses.items():
        for loss in named.values():
            total = total + loss * factors[task].to(loss)
    return total
