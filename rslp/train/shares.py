"""The part of each batch's loss in the loss of its optimiser step; the formula stands in ``docs/joint_training.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from rslp.train import collectives
from rslp.train.counts import precise

_TINY = 1e-12
Counts = Mapping[str, torch.Tensor]


def agreed(
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
    told = torch.zeros(1 + len(place_of), dtype=precise(device), device=device)
    told[0] = float(asked)
    for own in counts:
        for task, count in own.items():
            told[place_of[task]] += count.to(told)
    totals = collectives.summed(told)
    return {task: totals[place] for task, place in place_of.items()}, totals[0]


def shares(
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
