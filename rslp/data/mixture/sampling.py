"""Which samples a pass over a dataset draws: each once, or by weights, or each class equally often.

A pass is a pure function of seed, dataset and its number. Each drawn sample comes with its draw: a number that differs
between the draws of one sample, on which its crop and augmentation depend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rslp.data.mixture.stream import generator, shuffled

Ints = npt.NDArray[np.int64]


class Sampling(Protocol):
    """How one dataset's samples are drawn; ``size`` of them make a pass."""

    @property
    def size(self) -> int:
        """Number of samples in a pass."""

    def drawn(self, *, seed: int, dataset: str, number: int) -> tuple[Ints, Ints]:
        """The samples of pass ``number`` in order: their indices in the dataset, and their draws."""


@dataclass(frozen=True)
class InTurn:
    """All ``samples`` of the dataset in random order, then all of them in another one, and so on."""

    samples: int
    size: int

    def drawn(self, *, seed: int, dataset: str, number: int) -> tuple[Ints, Ints]:
        """See ``Sampling``; a sample's draw is how often it was drawn before."""
        position = number * self.size + np.arange(self.size)
        return _from_orders(position, self.samples, seed=seed, dataset=dataset), position // self.samples


@dataclass(frozen=True, eq=False)
class Weighted:
    """Samples at random with odds proportional to ``weights``, anew in each pass."""

    weights: npt.NDArray[np.float64]
    size: int
    replacement: bool

    def drawn(self, *, seed: int, dataset: str, number: int) -> tuple[Ints, Ints]:
        """See ``Sampling``; the draw is the pass, plus 2^32 for each time that it has the sample before."""
        odds = self.weights / self.weights.sum()
        index = generator("pass", seed, dataset, number).choice(len(odds), self.size, replace=self.replacement, p=odds)
        order = np.argsort(index, kind="stable")
        _, first, count = np.unique(index[order], return_index=True, return_counts=True)
        earlier = np.empty(self.size, np.int64)
        earlier[order] = np.arange(self.size) - np.repeat(first, count)
        return index, number + (earlier << 32)


@dataclass(frozen=True, eq=False)
class ClassBalanced:
    """Samples of each class equally often; within a class each sample once before any is drawn again.

    Draws come in rounds with one sample of each class, the classes of a round in random order. ``members`` has for each
    class the indices of its samples, at least one; a sample with several classes is drawn as a sample of each of them.
    """

    members: Sequence[Ints]
    size: int

    def drawn(self, *, seed: int, dataset: str, number: int) -> tuple[Ints, Ints]:
        """See ``Sampling``."""
        classes = len(self.members)
        rounds, place = np.divmod(number * self.size + np.arange(self.size), classes)
        span = range(rounds[0], rounds[-1] + 1)
        orders = np.array([generator("classes", seed, dataset, n).permutation(classes) for n in span])
        chosen = orders[rounds - rounds[0], place]
        index, draw = np.empty(self.size, np.int64), np.empty(self.size, np.int64)
        # How many classes a sample has, and how many of those are done: they take turns in the numbering of its draws.
        of_sample = np.bincount(np.concatenate(self.members))
        done = np.zeros_like(of_sample)
        for each, members in enumerate(self.members):
            mine = np.flatnonzero(chosen == each)
            own = members[_from_orders(rounds[mine], len(members), seed=seed, dataset=f"{dataset}/{each}")]
            index[mine], draw[mine] = own, rounds[mine] // len(members) * of_sample[own] + done[own]
            done[members] += 1
        return index, draw


def _from_orders(position: Ints, samples: int, *, seed: int, dataset: str) -> Ints:
    """The samples at some positions of an endless sequence of permutations of ``samples``."""
    turn, place = np.divmod(position, samples)
    index = np.empty(len(position), np.int64)
    for number in np.unique(turn).tolist():
        mine = turn == number
        index[mine] = shuffled(samples, seed=seed, dataset=dataset, number=number)[place[mine]]
    return index
