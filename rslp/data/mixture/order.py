"""In which order the datasets follow each other within an epoch, given how many batches each one has."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from rslp.data.mixture.counts import Floats, Ints
from rslp.data.mixture.settings import Mixture


def order(count: Ints, share: Floats, mixture: Mixture, rng: np.random.Generator) -> Ints:
    """Arrange an epoch.

    Args:
        count: batches of each dataset in this epoch.
        share: odds of each dataset, for the random modes.
        mixture: its mode, stop rule and length of turns.
        rng: where the randomness comes from.

    Returns:
        The number of the dataset for each batch of the epoch; dataset i occurs ``count[i]`` times.
    """
    if mixture.mode in ("cycle", "random_cycle", "reptile"):
        times = _turns(count, mixture, rng)
    elif mixture.whole:
        # Drawing, each time, one of the datasets that are left with odds p is what independent Poisson processes of
        # rates p do when their events are put in one line and each process ends after its last batch.
        times = [rng.exponential(size=c).cumsum() / p for c, p in zip(count.tolist(), share.tolist(), strict=True)]
    else:
        return rng.permutation(np.repeat(np.arange(len(count)), count))
    owner = np.repeat(np.arange(len(count)), count)
    return owner[np.argsort(np.concatenate(times), kind="stable")]


def _turns(count: Ints, mixture: Mixture, rng: np.random.Generator) -> list[Floats]:
    """Give each batch a time: the number of its round, plus the place of its dataset within the round."""
    length = mixture.steps_per_dataset or 1
    times = []
    for index, batches in enumerate(count.tolist()):
        rounds = -(-batches // length)
        place = np.full(rounds, index / len(count)) if mixture.mode == "cycle" else rng.random(rounds)
        times.append(np.repeat(np.arange(rounds) + place, length)[:batches])
    return times


def steps(line: Ints, count: Ints, k: int) -> tuple[Ints, npt.NDArray[np.int32]]:
    """Form optimiser steps of up to ``k`` different datasets, staying as close to the given order as that allows.

    There are as few steps as possible: max(ceil(batches / k), batches of the largest dataset). A step is shorter than
    ``k`` only where fewer than ``k`` datasets are left.

    Args:
        line: number of the dataset for each batch, in the order that the mode asks for.
        count: batches of each dataset.
        k: datasets per step.

    Returns:
        The same batches re-arranged, and the size of each step.
    """
    places: list[list[int]] = [[] for _ in count]  # of each dataset's batches in the line, the next one last
    for place in range(len(line) - 1, -1, -1):
        places[line[place]].append(place)
    left = count.tolist()
    due: list[int] = []  # datasets that have to be in every remaining step
    heap = [(mine.pop(), dataset) for dataset, mine in enumerate(places) if mine]
    heapq.heapify(heap)
    arranged: list[int] = []
    sizes: list[int] = []
    total = check = max(-(-len(line) // k), max(left))
    for remaining in range(total, 0, -1):
        if remaining <= check:
            due += [dataset for _, dataset in heap if left[dataset] == remaining]
            heap = [item for item in heap if left[item[1]] < remaining]
            heapq.heapify(heap)
            check = max((left[dataset] for _, dataset in heap), default=0)  # none becomes due before that
        step = [heapq.heappop(heap)[1] for _ in range(min(k - len(due), len(heap)))]
        arranged += due + step
        sizes.append(len(due) + len(step))
        for dataset in step:
            left[dataset] -= 1
            if places[dataset]:
                heapq.heappush(heap, (places[dataset].pop(), dataset))
    return np.array(arranged, dtype=np.int64), np.array(sizes, dtype=np.int32)
