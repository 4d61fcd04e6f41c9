"""How many batches of each dataset an epoch draws.

A quota is a real number of batches per epoch. Each epoch gets the quota rounded down or up, such that the sum is the
same in every epoch and the mean over epochs tends to the quota: systematic sampling (Madow 1949) of the fractional
parts, with a Weyl sequence (multiples of the golden ratio, modulo 1) in place of the random start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rslp.data.mixture.settings import Mixture
from rslp.data.mixture.stream import Stream
from rslp.errors import ConfigError, Problem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_BITS = 40  # fractions are whole multiples of 2^-40, so that sums are exact on every machine
_GOLDEN = 679_535_556_991  # odd, close to 2^40 (sqrt(5) - 1) / 2
_LEAST = 1e-30  # the smallest share, relative to the largest
_LONGEST = 10**7  # the largest number of batches in an epoch
_CHUNK = 4096  # epochs that are summed at a time


@dataclass(frozen=True)
class Supply:
    """The batches that one dataset has for an epoch.

    Its *offer* is how many samples it has for an epoch: all, or its limit if that is smaller.

    Attributes:
        stream: the dataset's batches.
        passes: samples of the offer / largest global batch.
        need: number of batches that use up the offer.
        most: number of batches that an epoch may draw; infinite without a limit.
    """

    stream: Stream
    passes: float
    need: int
    most: float


def supply(size: int, batch: int, limit: int | None, *, whole: bool) -> Supply:
    """Cut one dataset into batches.

    Args:
        size: samples in the dataset.
        batch: the largest global batch.
        limit: samples that one epoch may draw.
        whole: each epoch takes exactly the offer. Otherwise it takes any number of batches; with a limit these are made
            so small that some number of them comes close to the limit without exceeding it.
    """
    offer = size if limit is None else min(size, limit)
    if whole:
        stream = Stream(size=size, samples_per_cycle=offer, batch=batch)
        return Supply(stream=stream, passes=offer / batch, need=stream.batches, most=stream.batches)
    cut = batch if offer == size else offer // -(-offer // batch)
    stream = Stream(size=size, samples_per_cycle=size, batch=cut)
    largest = -(-size // stream.batches)
    most = math.inf if limit is None else limit // largest
    need = stream.batches if limit is None else min(stream.batches, limit // largest)
    return Supply(stream=stream, passes=offer / batch, need=need, most=most)


def dataset_shares(supplies: Mapping[str, Supply], mixture: Mixture) -> Floats:
    """The share of the batches that the mode gives each dataset; the sum is 1."""
    if mixture.mode == "weights" and mixture.weights is not None:
        raw = np.array([float(mixture.weights[name]) for name in supplies])
    elif mixture.mode in ("proportional", "temperature"):
        passes = np.array([each.passes for each in supplies.values()])
        raw = np.exp(np.log(passes / passes.max()) / (mixture.temperature or 1.0))
    else:
        raw = np.ones(len(supplies))
    share: Floats = np.maximum(raw / raw.max(), _LEAST)  # divided first, so that the sum of huge weights can't overflow
    normed: Floats = share / share.sum()
    return normed


def quotas(share: Floats, supplies: Mapping[str, Supply], mixture: Mixture) -> Floats:
    """The number of batches per epoch of each dataset, real numbers whose sum is a whole number.

    Raises:
        ConfigError: the limits leave fewer batches than the steps per epoch need, or an epoch would be too long.
    """
    need = np.array([float(each.need) for each in supplies.values()])
    if mixture.whole:
        return need
    most = np.array([each.most for each in supplies.values()])
    k = mixture.datasets_per_step
    steps = mixture.steps_per_epoch
    rounds = steps * mixture.accumulate if steps else _rounds(share, need, most, mixture)
    most = np.minimum(most, rounds)
    total = min(rounds * k, most.sum())
    if steps is not None and total < rounds * k:
        size = k * mixture.accumulate
        each = f" of {size} batches" if size > 1 else ""
        text = f"{steps} steps{each} are more than the limits allow ({total:.0f} batches); ask for fewer or raise them"
        raise ConfigError(Problem(text, key="mixture.steps_per_epoch"))
    if total > _LONGEST:
        text = f"an epoch would have {total:.3g} batches, above {_LONGEST:.0e}; shorten it or even out the shares"
        raise ConfigError(Problem(text, key="mixture"))
    return _fill(share, most, int(total))


def _rounds(share: Floats, need: Floats, most: Floats, mixture: Mixture) -> int:
    """The number of rounds of k batches after which the first dataset, or the last one, is used up."""
    k = mixture.datasets_per_step
    if mixture.stop == "shortest":
        batches = float((need / share).min())
        return max(1, math.floor((batches + _slack(batches)) / k))
    want = np.minimum(most, (need / share).max() * share)
    least = float(max(want.sum() / k, want.max()))
    return math.ceil(least - _slack(least))


def counts(quota: Floats, epoch: int) -> tuple[Ints, Ints]:
    """Round the quotas for one epoch.

    Args:
        quota: batches per epoch of each dataset, real numbers whose sum is a whole number.
        epoch: number of the epoch, from 0.

    Returns:
        The number of batches of each dataset in all earlier epochs together, and in this one.
    """
    total = float(quota.sum())
    base: Ints = np.floor(quota + _slack(total)).astype(np.int64)
    extra = round(total) - int(base.sum())
    if extra == 0:
        return base * epoch, base
    edges = np.concatenate([[0], np.cumsum(_fractions(quota - base, extra))])
    before = np.zeros(len(quota), dtype=np.int64)
    for start in range(0, epoch, _CHUNK):
        before += _chosen(edges, np.arange(start, min(start + _CHUNK, epoch), dtype=np.uint64)).sum(axis=0)
    return base * epoch + before, base + _chosen(edges, np.array([epoch], dtype=np.uint64))[0]


def _slack(total: float) -> float:
    """The largest rounding error of a quota in an epoch of ``total`` batches."""
    return 1e-9 + 1e-12 * total


def _fill(share: Floats, most: Floats, total: int) -> Floats:
    """Divide ``total`` by share, none above its ``most``; the excess goes to the others by their shares."""
    quota = np.zeros(len(share))
    full = np.zeros(len(share), dtype=np.bool_)
    while not full.all():
        quota[~full] = (total - most[full].sum()) * share[~full] / share[~full].sum()
        over = ~full & (quota > most)
        if not over.any():
            break
        quota[over] = most[over]
        full |= over
    return quota


def _fractions(fraction: Floats, total: int) -> Ints:
    """The fractions as multiples of 2^-40 whose sum is exactly ``total``."""
    units: Ints = np.clip(np.rint(fraction * 2.0**_BITS), 0, 2**_BITS).astype(np.int64)
    units[np.abs(units - 2 ** (_BITS - 1)).argmin()] += (total << _BITS) - int(units.sum())
    return units


def _chosen(edges: Ints, epochs: npt.NDArray[np.uint64]) -> Ints:
    """1 for datasets that get one more batch, those whose interval has a whole number in it; a row for each epoch."""
    start = ((epochs * np.uint64(_GOLDEN)) & np.uint64(2**_BITS - 1)).astype(np.int64)
    return np.diff((edges[None, :] + start[:, None]) >> _BITS, axis=1)
