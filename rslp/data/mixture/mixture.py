"""The mixture: the samples of each batch of an epoch, on every process.

A pure function of (sizes, batch sizes, mixture, seed, epoch, world size, rank): nothing is remembered between calls, so
a resumed run needs only its epoch and its position in it. Four modules answer one question each: how many batches of
each dataset (``counts``), in which order (``order``), which part of its passes (``stream``), which samples each pass
has (``sampling``). Read ``plan_epoch`` first.

A *global batch* is the batch of all processes together, of one dataset; each process gets a part of it. A *pass* goes
once through a dataset, in a new random order. A *round* is up to ``datasets_per_step`` batches of different datasets.
An optimiser step is one round, or several (``accumulate``). The *line* is the order of an epoch's batches: for each
batch the number of its dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rslp.data.mixture.counts import Ints, counts, dataset_shares, quotas, supply
from rslp.data.mixture.order import order, steps
from rslp.data.mixture.sampling import InTurn, Sampling
from rslp.data.mixture.settings import Mixture, Stop, check_fit, check_rank
from rslp.data.mixture.stream import Stream, generator
from rslp.errors import UsageError

__all__ = ["EpochBatches", "Mixture", "PlannedBatch", "Stop", "plan_epoch", "plan_evaluation"]


@dataclass(frozen=True)
class PlannedBatch:
    """One process's part of a global batch.

    Attributes:
        dataset: key of the dataset that all samples come from.
        indices: this process's samples, as indices in the dataset's split; never empty.
        draws: how often each of them has been drawn before in this run; with a sampling, any number that differs
            between the draws of a sample.
        global_size: number of real samples of the batch over all processes.
        real: how many of ``indices`` are samples of the batch: all, or none. None on a process that gets no share of a
            batch with fewer samples than processes: its one index is a filler, which must not count in any loss or
            metric.
        step: number of the optimiser step in the epoch, from 0.
        step_size: how many batches that step has; their gradients are summed.
    """

    dataset: str
    indices: tuple[int, ...]
    draws: tuple[int, ...]
    global_size: int
    real: int
    step: int
    step_size: int


@dataclass(frozen=True)
class _Part:
    """One dataset's part of an epoch: batches of its stream, from batch ``start`` on."""

    name: str
    stream: Stream
    start: int
    sampling: Sampling


class EpochBatches:
    """The batches of one epoch for one process, each computed when it is requested; made by ``plan_epoch``."""

    def __init__(
        self,
        parts: Sequence[_Part],
        *,
        line: Ints,
        step_sizes: npt.NDArray[np.int32],
        seed: int | None,
        world: int,
        rank: int,
    ) -> None:
        """Store the line and the parts.

        Args:
            parts: the datasets, sorted by name; the index in this list is a dataset's number.
            line: for each batch the number of its dataset.
            step_sizes: the number of batches of each optimiser step.
            seed: seed of the shuffled passes; None keeps the order of the dataset.
            world: number of processes.
            rank: number of this process.
        """
        self._parts = tuple(parts)
        self._line = line.astype(np.int32)
        self._step_sizes = step_sizes
        # For each batch the number of its step, and how many earlier batches of the epoch are of the same dataset.
        self._step_of_batch = np.repeat(np.arange(len(step_sizes), dtype=np.int32), step_sizes)
        self._earlier_of_dataset = _occurrence(line, len(parts))
        self._seed = seed
        self._world, self._rank = world, rank
        # For each dataset the number of the pass that was used last, and its samples with their draws.
        self._passes: dict[str, tuple[int, tuple[Ints, Ints]]] = {}

    def __len__(self) -> int:
        """The number of batches: the same on every process, and in every epoch of a run."""
        return len(self._line)

    @property
    def steps(self) -> int:
        """The number of optimiser steps: the same on every process, and in every epoch of a run."""
        return len(self._step_sizes)

    @property
    def counts(self) -> dict[str, int]:
        """The number of batches of each dataset."""
        counts = np.bincount(self._line, minlength=len(self._parts)).tolist()
        return {part.name: n for part, n in zip(self._parts, counts, strict=True)}

    def __getitem__(self, index: int) -> PlannedBatch:
        """Batch ``index`` of the epoch, computed without those before it.

        Raises:
            IndexError: there is no such batch.
        """
        position = range(len(self))[index]
        part = self._parts[self._line[position]]
        pass_number, first, stop = part.stream.span(part.start + int(self._earlier_of_dataset[position]))
        size = stop - first
        # This process's share of the global batch; without one, the batch's first sample as a filler.
        own_first, own_stop = (first + size * r // self._world for r in (self._rank, self._rank + 1))
        if own_first == own_stop:
            indices, draws = self._samples(part, pass_number, first, first + 1)
        else:
            indices, draws = self._samples(part, pass_number, own_first, own_stop)
        step = int(self._step_of_batch[position])
        return PlannedBatch(
            part.name, indices, draws, size, own_stop - own_first, step, step_size=int(self._step_sizes[step])
        )

    def __iter__(self) -> Iterator[PlannedBatch]:
        """All batches in order."""
        return (self[index] for index in range(len(self)))

    def steps_from(self, step: int) -> Iterator[list[PlannedBatch]]:
        """The batches of each optimiser step, from a step on.

        Raises:
            UsageError: the step is not in 0 to the number of steps.
        """
        if not 0 <= step <= self.steps:
            raise UsageError(f"cannot start at step {step} of an epoch that has {self.steps} steps")
        edges = np.concatenate([[0], np.cumsum(self._step_sizes, dtype=np.int64)])[step:]
        return ([self[index] for index in range(first, stop)] for first, stop in pairwise(edges.tolist()))

    def _samples(self, part: _Part, pass_number: int, first: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The samples at positions ``first`` to ``stop - 1`` of a pass: indices in the dataset's split, and draws."""
        if self._seed is None:
            return tuple(range(first, stop)), (0,) * (stop - first)
        cached = self._passes.get(part.name)
        if cached is None or cached[0] != pass_number:
            cached = pass_number, part.sampling.drawn(seed=self._seed, dataset=part.name, number=pass_number)
            self._passes[part.name] = cached
        indices, draws = (values[first:stop].tolist() for values in cached[1])
        return tuple(indices), tuple(draws)


def plan_epoch(
    sizes: Mapping[str, int],
    batch_sizes: Mapping[str, int],
    mixture: Mixture,
    *,
    seed: int,
    epoch: int,
    world: int = 1,
    rank: int = 0,
    samplings: Mapping[str, Sampling] | None = None,
) -> EpochBatches:
    """Plan one epoch of training.

    Every dataset is an endless stream of shuffled passes, of which each epoch takes the next piece: no sample is drawn
    twice before all samples of its dataset have been drawn once, across epochs too. The order of the mappings has no
    effect, and 1 process with batch size 2 b draws the same global batches as 2 processes with batch size b.

    Args:
        sizes: number of training samples of each dataset.
        batch_sizes: for each dataset the largest number of samples that one process gets of a batch.
        mixture: how to draw.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        world: number of processes.
        rank: number of this process, from 0.
        samplings: how samples are drawn, for datasets that do not draw each once in a pass; its ``size`` then stands
            for the number of samples.

    Raises:
        DataError: a dataset is empty, or there is none.
        ConfigError: batch sizes, weights or limits that do not fit the datasets, or limits that leave too few batches.
        UsageError: the epoch is negative, or there is no process of this rank.
    """
    check_rank(epoch=epoch, world=world, rank=rank)
    check_fit(sizes, batch_sizes, mixture)
    names = sorted(sizes)
    drawing = {name: InTurn(sizes[name], sizes[name]) for name in names} | dict(samplings or {})
    sizes = {name: drawing[name].size for name in names}
    supplies = {
        name: supply(sizes[name], batch_sizes[name] * world, mixture.limit(name), whole=mixture.whole) for name in names
    }
    share = dataset_shares(supplies, mixture)
    before, count = counts(quotas(share, supplies, mixture), epoch)
    line = order(count, share, mixture, generator("order", seed, epoch))
    step_sizes = np.ones(len(line), np.int32)
    if mixture.datasets_per_step > 1:
        line, step_sizes = steps(line, count, mixture.datasets_per_step)
    if mixture.accumulate > 1:
        step_sizes = np.add.reduceat(step_sizes, np.arange(0, len(step_sizes), mixture.accumulate), dtype=np.int32)
    parts = [
        _Part(name, supplies[name].stream, start, drawing[name])
        for name, start in zip(names, before.tolist(), strict=True)
    ]
    return EpochBatches(parts, line=line, step_sizes=step_sizes, seed=seed, world=world, rank=rank)


def plan_evaluation(
    sizes: Mapping[str, int], batch_sizes: Mapping[str, int], *, world: int = 1, rank: int = 0
) -> EpochBatches:
    """Plan one pass through all datasets, in the order of their names, for validation, test and prediction.

    Over all processes every sample is real exactly once, without limits or shuffling. Every process gets the same
    number of batches, so that none waits for another at the end; see ``PlannedBatch.real`` for the filler samples.
    The arguments are those of ``plan_epoch``; a dataset may be empty.

    Raises:
        DataError: there is no dataset.
        ConfigError: batch sizes that do not fit the datasets.
        UsageError: there is no process of this rank.
    """
    check_rank(epoch=0, world=world, rank=rank)
    check_fit(sizes, batch_sizes)
    names = [name for name in sorted(sizes) if sizes[name]]
    streams = [
        Stream(size=sizes[name], samples_per_cycle=sizes[name], batch=batch_sizes[name] * world) for name in names
    ]
    line = np.repeat(np.arange(len(names)), np.array([each.batches for each in streams], dtype=np.int64))
    parts = [_Part(name, each, 0, InTurn(each.size, each.size)) for name, each in zip(names, streams, strict=True)]
    return EpochBatches(parts, line=line, step_sizes=np.ones(len(line), np.int32), seed=None, world=world, rank=rank)


def _occurrence(line: Ints, datasets: int) -> npt.NDArray[np.int32]:
    """For each position in ``line`` the number of earlier positions with the same dataset."""
    nth = np.empty(len(line), dtype=np.int32)
    by_dataset = np.argsort(line, kind="stable")
    edges = np.concatenate([[0], np.cumsum(np.bincount(line, minlength=datasets))])
    for start, stop in pairwise(edges.tolist()):
        nth[by_dataset[start:stop]] = np.arange(stop - start, dtype=np.int32)
    return nth
