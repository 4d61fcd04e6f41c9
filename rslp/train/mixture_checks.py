"""What cannot be mixed: arguments that contradict each other, named together before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rslp.errors import ConfigError, DataError, Problem, UsageError
from rslp.suggest import did_you_mean
from rslp.train.mixture_settings import Mixture, is_count


def check_place(*, epoch: int, world: int, rank: int) -> None:
    """Make sure that the epoch and the process exist.

    Raises:
        UsageError: they do not.
    """
    if not is_count(epoch + 1):
        raise UsageError(f"the epoch must be a whole number of at least 0, got {epoch!r}")
    if not is_count(world):
        raise UsageError(f"the number of processes must be a whole number of at least 1, got {world!r}")
    if not is_count(rank + 1) or rank >= world:
        raise UsageError(f"the rank of {world} processes must be one of 0 to {world - 1}, got {rank!r}")


def check_fit(sizes: Mapping[str, int], batch_sizes: Mapping[str, int], mixture: Mixture | None = None) -> None:
    """Make sure that the datasets have samples, and that everything that names datasets names these.

    Args:
        sizes: samples in each dataset.
        batch_sizes: batch size of each dataset.
        mixture: how to draw; None for evaluation, where a dataset may be empty.

    Raises:
        DataError: there is no dataset, or an empty one with nothing to train on.
        ConfigError: batch sizes, weights, limits or datasets per step that do not fit the datasets.
    """
    if not sizes:
        raise DataError("there is no dataset to draw from")
    least = 0 if mixture is None else 1
    empty = sorted(name for name, size in sizes.items() if not is_count(size - least + 1))
    if empty:
        listed = ", ".join(f"{name} ({sizes[name]!r})" for name in empty)
        raise DataError(f"datasets with no samples to draw: {listed}; mend or disable them")
    problems = [*_batch_faults(sizes, batch_sizes), *(() if mixture is None else _mixture_faults(sizes, mixture))]
    if problems:
        raise ConfigError(problems)


def _batch_faults(sizes: Mapping[str, int], batch_sizes: Mapping[str, int]) -> Iterator[Problem]:
    yield from _unknown(batch_sizes, sizes, key="batch_sizes")
    yield from _missing(batch_sizes, sizes, key="batch_sizes")
    for name in sorted(set(batch_sizes) & set(sizes)):
        if not is_count(batch_sizes[name]):
            what = f"must be a whole number of at least 1, got {batch_sizes[name]!r}"
            yield Problem(what, key=f"batch_sizes.{name}")


def _mixture_faults(sizes: Mapping[str, int], mixture: Mixture) -> Iterator[Problem]:
    if mixture.weights is not None:
        yield from _unknown(mixture.weights, sizes, key="mixture.weights")
        yield from _missing(mixture.weights, sizes, key="mixture.weights")
    if isinstance(mixture.limits, Mapping):
        yield from _unknown(mixture.limits, sizes, key="mixture.limits")
    if mixture.datasets_per_step > len(sizes):
        what = f"got {mixture.datasets_per_step}, but there are only {len(sizes)} datasets"
        yield Problem(what, key="mixture.datasets_per_step")


def _unknown(given: Iterable[str], names: Iterable[str], *, key: str) -> Iterator[Problem]:
    known = sorted(names)
    for name in sorted(set(given) - set(known)):
        yield Problem(f"no such dataset{did_you_mean(name, known, otherwise='known')}", key=f"{key}.{name}")


def _missing(given: Iterable[str], names: Iterable[str], *, key: str) -> Iterator[Problem]:
    missing = sorted(set(names) - set(given))
    if missing:
        yield Problem(f"no value for {', '.join(missing)}", key=key)
