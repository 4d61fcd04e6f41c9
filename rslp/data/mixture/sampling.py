"""Which samples a pass over a dataset draws: each once, or by weights, or each class equally often.

A pass is a pure function of seed, dataset and its number, as all of the mixture. Of each drawn sample it also gives the
draw: a number that is another one each time the same sample is drawn, of which its crop and augmentation depend.
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
    """How one dataset's samples are drawn."""

    @property
    def size(self) -> int:
        """Number of samples in a pass."""

    def drawn(self, *, seed: int, dataset: str, number: int) -> tuple[Ints, Ints]:
        """The samples of pass ``number`` in order: their indices in the dataset, and their draws."""


@dataclass(frozen=True)
class InTurn:
    """All samples in random order, then all of them in another one, and so on.

    Attributes:
        samples: number of samples in the dataset.
        size: number of samples in a pass.
    """

    samples: int
    size: int

    def drawn(self, *, seed: int, dataset: str, number: int) -> tuple[Ints, Ints]:
        """See ``Sampling``; a sample's draw is how often it was drawn before."""
        position = number * self.size + np.arange(self.size)
        return _from_orders(position, self.samples, seed=seed, dataset=dataset), position // self.samples


@dataclass(frozen=True, eq=False)
class Weighted:
    """Samples at random with odds proportional to weights, anew in each pass.

    Attributes:
        weights: of each sample of the dataset.
        size: number of samples in a pass.
        replacement: whether a sample may occur several times in a pass.
    """

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

    Draws come in rounds with one sample of each class, the classes of a round in random order. A sample with several
    classes is drawn as a sample of each of them.

    Attributes:
        members: for each class the indices of the samples that have it, at least one.
        size: number of samples in a pass.
    """

    members: Sequence[Ints]
    size: int

    def drawn(self, *, seed: int, dataset: str, number: int) -> tuple[Ints, Ints]:
        """See ``Sampling``."""
        position, classes = number * self.size + np.arange(self.size), len(self.members)
        rounds, place = np.divmod(position, classes)
        orders = [generator("classes", seed, dataset, n).permutation(classes) for n in range(rounds[0], rounds[-1] + 1)]
        chosen = np.array(orders)[rounds - rounds[0], place]
        index, draw = np.empty(self.size, np.int64), np.empty(self.size, np.int64)
        samples = 1 + max(int(members.max()) for members in self.members)
        of_sample, earlier = np.zeros(samples, np.int64), np.zeros(samples, np.int64)
        for members in self.members:
            of_sample[members] += 1
        for each, members in enumerate(self.members):
            mine = np.flatnonzero(chosen == each)
            own = _from_orders(rounds[mine], len(members), seed=seed, dataset=f"{dataset}/{each}")
            index[mine] = members[own]
            # The passes over the sample's classes take turns in the numbering of its draws.
            draw[mine] = rounds[mine] // len(members) * of_sample[index[mine]] + earlier[index[mine]]
            earlier[members] += 1
        return index, draw


def _from_orders(position: Ints, samples: int, *, seed: int, dataset: str) -> Ints:
    """The samples at some positions, in rising order, of an endless sequence of permutations of ``samples``."""
    turn, place = np.divmod(position, samples)
    index = np.empty(len(position), np.int64)
    for number in np.unique(turn).tolist():
        mine = turn == number
        index[mine] = shuffled(samples, seed=seed, dataset=dataset, number=number)[place[mine]]
    return index
