"""Align the dates of a sample's modalities on common time steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

Interval = tuple[datetime, datetime]


@dataclass(frozen=True)
class Timeline:
    """The time steps of one sample.

    Attributes:
        steps: ``(day, month, year)`` per time step, the month counted from 0, as the encoder does.
        position: per modality the time step of each of its images.
    """

    steps: tuple[tuple[int, int, int], ...]
    position: Mapping[str, tuple[int, ...]]


def align(intervals: Mapping[str, Sequence[Interval]], tolerance: timedelta) -> Timeline:
    """Align the images of all modalities on common time steps, in the order of time.

    An image joins the nearest step that its modality does not use yet, if that is less than ``tolerance`` away;
    otherwise it adds a new step. Its time is the middle of its interval.

    Args:
        intervals: per modality the interval in which each of its images was taken, in any order.
        tolerance: images of different modalities closer than this share a step.
    """
    steps: list[datetime] = []
    joined: dict[str, list[int]] = {}
    for modality, of_modality in intervals.items():
        joined[modality] = []
        free = list(range(len(steps)))
        for start, end in of_modality:
            middle = start + (end - start) / 2
            gaps = [(abs(steps[step] - middle), step) for step in free]
            gap, step = min(gaps, default=(tolerance, -1))
            if gap < tolerance:
                free.remove(step)
            else:
                step = len(steps)
                steps.append(middle)
            joined[modality].append(step)
    order = sorted(range(len(steps)), key=steps.__getitem__)
    rank = {step: index for index, step in enumerate(order)}
    return Timeline(
        steps=tuple((steps[step].day, steps[step].month - 1, steps[step].year) for step in order),
        position={modality: tuple(rank[step] for step in used) for modality, used in joined.items()},
    )


def legacy(counts: Mapping[str, int]) -> Timeline:
    """The dummy months of the original project: image 0 in January 2024, image 1 in February 2024, and so on.

    Args:
        counts: the number of images per modality; at most 12.

    Returns:
        As many steps as the longest modality has images.
    """
    longest = max(counts.values(), default=0)
    return Timeline(
        steps=tuple((1, month, 2024) for month in range(longest)),
        position={modality: tuple(range(count)) for modality, count in counts.items()},
    )
