"""The order of the datasets' batches within an epoch, given how many batches each dataset has."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from rslp.data.mixture.counts import Floats, Ints
from rslp.data.mixture.settings import Mixture


def order(count: Ints, share: Floats, mixture: Mixture, rng: np.random.Generator) -> Ints:
    """Order the batches of an epoch.

    Args:
        count: number of batches of each dataset in this epoch.
        share: odds of each dataset, for the random modes.
        mixture: mode, stop rule and length of turns.
        rng: random generator.

    Returns:
        The number of the dataset for each batch of the epoch; dataset i occurs ``count[i]`` times.
    """
    if mixture.mode in ("cycle", "random_cycle", "reptile"):
        times = _turns(count, mixture, rng)
    elif mixture.whole:
        # To draw, each time, one of the remaining datasets with odds p is the same as to order by time the events of
        # independent Poisson processes of rates p, each of which ends after its last batch.
        times = [rng.exponential(size=c).cumsum() / p for c, p in zip(count.tolist(), share.tolist(), strict=True)]
    else:
        return rng.permutation(np.repeat(np.arange(len(count)), count))
    owner = np.repeat(np.arange(len(count)), count)
    return owner[np.argsort(np.concatenate(times), kind="stable")]


def _turns(count: Ints, mixture: Mixture, rng: np.random.Generator) -> list[Floats]:
    """A time for each batch: the number of its round, plus the position (0 to 1) of its dataset within the round."""
    length = mixture.steps_per_dataset or 1
    times = []
    for index, batches in enumerate(count.tolist()):
        rounds = -(-batches // length)
        position = np.full(rounds, index / len(count)) if mixture.mode == "cycle" else rng.random(rounds)
        times.append(np.repeat(np.arange(rounds) + position, length)[:batches])
    return times


def steps(line: Ints, count: Ints, k: int) -> tuple[Ints, npt.NDArray[np.int32]]:
    """Form optimiser steps of up to ``k`` different datasets, staying as close to the given order as that allows.

    There are as few steps as possible: max(ceil(batches / k), batches of the largest dataset). A step is shorter than
    ``k`` only where fewer than ``k`` datasets are left.

    Args:
        line: number of the dataset for each batch, in the order of the mode.
        count: number of batches of each dataset.
        k: datasets per step.

    Returns:
        The batches in their new order, and the number of batches of each step.
    """
    positions: list[list[int]] = [[] for _ in count]  # for each dataset its positions in the line, the next one last
    for position in range(len(line) - 1, -1, -1):
        positions[line[position]].append(position)
    left = count.tolist()
    due: list[int] = []  # datasets that must be in every remaining step
    heap = [(of_dataset.pop(), dataset) for dataset, of_dataset in enumerate(positions) if of_dataset]
    heapq.heapify(heap)
    arranged: list[int] = []
    sizes: list[int] = []
    total = check = max(-(-len(line) // k), max(left))
    for remaining in range(total, 0, -1):
        if remaining <= check:
            due += [dataset for _, dataset in heap if left[dataset] == remaining]
            heap = [item for item in heap if left[item[1]] < remaining]
            heapq.heapify(heap)
            check = max((left[dataset] for _, dataset in heap), default=0)  # no dataset becomes due before this
        step = [heapq.heappop(heap)[1] for _ in range(min(k - len(due), len(heap)))]
        arranged += due + step
        sizes.append(len(due) + len(step))
        for dataset in step:
            left[dataset] -= 1
            if positions[dataset]:
                heapq.heappush(heap, (positions[dataset].pop(), dataset))
    return np.array(arranged, dtype=np.int64), np.array(sizes, dtype=np.int32)
