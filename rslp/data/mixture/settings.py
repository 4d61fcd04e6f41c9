"""The settings of a mixture, and which of them contradict each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from rslp.errors import ConfigError, DataError, Problem, UsageError
from rslp.suggest import did_you_mean

MixtureMode = Literal["random", "cycle", "random_cycle", "reptile", "proportional", "temperature", "weights"]
Stop = Literal["all", "shortest", "longest"]


@dataclass(frozen=True)
class Mixture:
    """How training batches are drawn from the datasets. A batch has samples of one dataset.

    Below, ``k`` is ``datasets_per_step``, ``b`` the global batch size of a dataset, ``n`` its number of samples, or its
    limit where that is smaller, and ``p`` the share of the batches that a mode gives a dataset:

    ``random``, ``cycle``, ``random_cycle``, ``reptile``: p equal for all; ``proportional``: p ~ n / b, so that every
    sample is drawn equally often; ``temperature``: p ~ (n / b)^(1 / T); ``weights``: p ~ the given weight.

    Attributes:
        mode: the order of the datasets. ``cycle``: in turn, by name. ``random_cycle``: in turn, in a new random order
            each round. ``reptile``: like ``random_cycle``, each turn being ``steps_per_dataset`` batches long. The
            others: at random; under ``stop: all`` each batch comes from a dataset that is not used up, with odds p.
        stop: when an epoch ends. ``all``: every dataset has been gone through once, each drops out when it is used up.
            ``shortest``: the first dataset is used up. ``longest``: the last one is; the others start again,
            re-shuffled. Under the latter two the shares p are kept in every epoch up to one batch, and exactly over
            many.
        steps_per_epoch: optimiser steps (of k batches, times ``accumulate``) in an epoch, in place of ``stop``; shares
            as above.
        temperature: T > 0 of mode ``temperature``; 1 is ``proportional``, a large T evens the datasets out.
        weights: a positive number for every dataset, for mode ``weights``; only their ratios count.
        limits: the largest number of samples that one epoch draws of each dataset, over all processes together; one
            number for all or a number for some. The next epoch goes on where this one ended. Under ``stop: all`` it is
            reached exactly; otherwise shares that would exceed it go to the other datasets.
        steps_per_dataset: length of a turn in mode ``reptile``, in batches.
        datasets_per_step: k, how many different datasets give one batch each to an optimiser step. Each dataset is at
            most once in a step, so a share above 1 / k cannot be had.
        accumulate: how many such rounds of k batches make one optimiser step, from
            ``trainer.accumulate_grad_batches``. With k = 1 the batches of a step are consecutive, and may be of
            one dataset. The last step of an epoch may have fewer rounds.

    Raises:
        ConfigError: a value out of its range, or one that the chosen mode does not use.
    """

    mode: MixtureMode = "random_cycle"
    stop: Stop = "all"
    steps_per_epoch: int | None = None
    temperature: float | None = None
    weights: Mapping[str, float] | None = None
    limits: int | Mapping[str, int] | None = None
    steps_per_dataset: int | None = None
    datasets_per_step: int = 1
    accumulate: int = 1

    @property
    def whole(self) -> bool:
        """Whether every epoch goes through all samples of each dataset, or its limit, exactly once."""
        return self.stop == "all" and self.steps_per_epoch is None

    def limit(self, dataset: str) -> int | None:
        """The largest number of samples of a dataset in one epoch; None if there is no limit."""
        return self.limits.get(dataset) if isinstance(self.limits, Mapping) else self.limits

    def __post_init__(self) -> None:
        """Check the values, all at once."""
        problems = [Problem(message, key=f"mixture.{key}") for key, message in _problems(self)]
        if problems:
            raise ConfigError(problems)
        for name in ("weights", "limits"):  # a copy, so that a later change by the caller has no effect
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, dict(value))


def _problems(mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Yield (field, problem)."""
    for name, choices in (("mode", get_args(MixtureMode)), ("stop", get_args(Stop))):
        if getattr(mixture, name) not in choices:
            yield name, f"got {getattr(mixture, name)!r}, allowed: {', '.join(choices)}"
    for name in ("steps_per_epoch", "steps_per_dataset", "datasets_per_step", "accumulate"):
        value = getattr(mixture, name)
        if not (is_count(value) or (value is None and name in ("steps_per_epoch", "steps_per_dataset"))):
            yield name, f"must be a whole number of at least 1, got {value!r}"
    for name, mode in (("temperature", "temperature"), ("weights", "weights"), ("steps_per_dataset", "reptile")):
        if mixture.mode == mode and getattr(mixture, name) is None:
            yield name, f"mode {mode} needs it"
        elif mixture.mode != mode and getattr(mixture, name) is not None:
            yield name, f"only mode {mode} uses it, the mode is {mixture.mode}; change the mode or leave it out"
    if mixture.steps_per_epoch is not None and mixture.stop != "all":
        yield "steps_per_epoch", f"contradicts stop: {mixture.stop}; give one of the two"
    if mixture.mode == "reptile" and mixture.datasets_per_step != 1:
        yield "datasets_per_step", f"mode reptile stays with one dataset; must be 1, got {mixture.datasets_per_step}"
    yield from _number_problems(mixture)


def _number_problems(mixture: Mixture) -> Iterator[tuple[str, str]]:
    if mixture.temperature is not None and not _is_positive(mixture.temperature):
        yield "temperature", f"must be a positive number, got {mixture.temperature!r}"
    for name, weight in (mixture.weights or {}).items():
        if not _is_positive(weight):
            yield f"weights.{name}", f"must be a positive number, got {weight!r}; to leave a dataset out, disable it"
    limits = mixture.limits if isinstance(mixture.limits, Mapping) else {"": mixture.limits}
    for name, limit in limits.items():
        if not is_count(limit) and (name or limit is not None):
            yield f"limits.{name}".rstrip("."), f"must be a whole number of at least 1, got {limit!r}"


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1; True and 3.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def check_rank(*, epoch: int, world: int, rank: int) -> None:
    """Check the numbers of the epoch and of this process.

    Raises:
        UsageError: ``epoch`` or ``rank`` is negative, ``world`` is below 1, or ``rank`` is not below ``world``.
    """
    if not is_count(epoch + 1):
        raise UsageError(f"the epoch must be a whole number of at least 0, got {epoch!r}")
    if not is_count(world):
        raise UsageError(f"the number of processes must be a whole number of at least 1, got {world!r}")
    if not is_count(rank + 1) or rank >= world:
        raise UsageError(f"the rank of {world} processes must be one of 0 to {world - 1}, got {rank!r}")


def check_fit(sizes: Mapping[str, int], batch_sizes: Mapping[str, int], mixture: Mixture | None = None) -> None:
    """Check that the datasets have samples, and that batch sizes, weights and limits name these datasets.

    Args:
        sizes: samples in each dataset.
        batch_sizes: batch size of each dataset.
        mixture: how to draw; None for evaluation, where a dataset may be empty.

    Raises:
        DataError: there is no dataset, or one to train on is empty.
        ConfigError: batch sizes, weights, limits or datasets per step that do not fit the datasets.
    """
    if not sizes:
        raise DataError("there is no dataset to draw from")
    least = 0 if mixture is None else 1
    empty = sorted(name for name, size in sizes.items() if not is_count(size - least + 1))
    if empty:
        listed = ", ".join(f"{name} ({sizes[name]!r})" for name in empty)
        raise DataError(f"datasets with no samples to draw: {listed}; mend or disable them")
    problems = [*_batch_problems(sizes, batch_sizes), *(() if mixture is None else _name_problems(sizes, mixture))]
    if problems:
        raise ConfigError(problems)


def _batch_problems(sizes: Mapping[str, int], batch_sizes: Mapping[str, int]) -> Iterator[Problem]:
    yield from _unknown(batch_sizes, sizes, key="batch_sizes")
    yield from _missing(batch_sizes, sizes, key="batch_sizes")
    for name in sorted(set(batch_sizes) & set(sizes)):
        if not is_count(batch_sizes[name]):
            message = f"must be a whole number of at least 1, got {batch_sizes[name]!r}"
            yield Problem(message, key=f"batch_sizes.{name}")


def _name_problems(sizes: Mapping[str, int], mixture: Mixture) -> Iterator[Problem]:
    if mixture.weights is not None:
        yield from _unknown(mixture.weights, sizes, key="mixture.weights")
        yield from _missing(mixture.weights, sizes, key="mixture.weights")
    if isinstance(mixture.limits, Mapping):
        yield from _unknown(mixture.limits, sizes, key="mixture.limits")
    if mixture.datasets_per_step > len(sizes):
        message = f"got {mixture.datasets_per_step}, but there are only {len(sizes)} datasets"
        yield Problem(message, key="mixture.datasets_per_step")


def _unknown(given: Iterable[str], names: Iterable[str], *, key: str) -> Iterator[Problem]:
    known = sorted(names)
    for name in sorted(set(given) - set(known)):
        yield Problem(f"no such dataset{did_you_mean(name, known, otherwise='known')}", key=f"{key}.{name}")


def _missing(given: Iterable[str], names: Iterable[str], *, key: str) -> Iterator[Problem]:
    missing = sorted(set(names) - set(given))
    if missing:
        yield Problem(f"no value for {', '.join(missing)}", key=key)
