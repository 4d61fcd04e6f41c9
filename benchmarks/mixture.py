"""Planning an epoch, and giving its batches: ours against rslearn's sampler.

python benchmarks/mixture.py [--quick] [--out FILE]

rslearn's sampler copies what is left of a dataset with each batch, so the comparison is made where that is bearable;
ours alone is measured at sizes that matter, too.
"""

from __future__ import annotations

import time
from itertools import islice

from rows import Curve, Report, report, row
from rslearn.train.data_module import DistributedPerDatasetBatchSampler
from rslearn.train.dataset import MultiDataset

from rslp.data.mixture.mixture import Mixture, plan_epoch

LARGE = {
    "8 datasets of 1M samples": ({f"d{i}": 1_000_000 for i in range(8)}, Mixture()),
    "8 datasets of 1M samples, 4 a step": ({f"d{i}": 1_000_000 for i in range(8)}, Mixture(datasets_per_step=4)),
    "1000 datasets of 10 samples, refilled": ({f"d{i}": 10 for i in range(1000)}, Mixture(stop="longest")),
}
SAMPLES = 20_000
BATCH = 8
BATCHES = 10_000
ROUNDS = 3
# Samples of each of 8 datasets; rslearn's sampler takes minutes for the larger ones.
SIZES = {"ours": (100, 1000, 10_000, 100_000), "rslearn": (100, 1000, 10_000)}


class Numbers:
    """As much of a dataset as a sampler looks at."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        """Number of samples."""
        return self._length

    def set_name(self, name: str) -> None:
        """Nothing."""


def main(out: Report) -> None:
    """Measure, and report."""
    sizes = {f"d{i}": SAMPLES // (10 if out.quick else 1) for i in range(8)}
    turns = [(_rslearn(sizes), _ours(sizes)) for _ in range(ROUNDS)]
    out.add(
        row(
            "mixture",
            f"plan an epoch of 8 datasets of {sizes['d0']} samples, and give all its batches of {BATCH}",
            unit="s",
            ours=[turn[1] for turn in turns],
            rslearn=[turn[0] for turn in turns],
        )
    )
    ways = {"ours": _ours, "rslearn": _rslearn}
    lines = {
        side: [(n, ways[side]({f"d{i}": n for i in range(8)})) for n in many[: 2 if out.quick else None]]
        for side, many in SIZES.items()
    }
    out.add(Curve("mixture", "Plan an epoch of 8 datasets and give its batches", "samples of each", "s", lines))
    for name, (large, mixture) in LARGE.items():
        plan, enter, each = zip(*(_large(large, mixture) for _ in range(1 if out.quick else ROUNDS)), strict=True)
        what = f"epoch 100 of {name}, batches of {BATCH}"
        out.add(row(f"plan, {name}", f"plan {what}", unit="s", ours=plan))
        out.add(row(f"enter, {name}", f"enter {what}, in its middle", unit="s", ours=enter))
        out.add(row(f"batch, {name}", f"give a batch of {what}", unit="µs", ours=each))


def _rslearn(sizes: dict[str, int]) -> float:
    sampler = DistributedPerDatasetBatchSampler(
        MultiDataset({name: Numbers(size) for name, size in sizes.items()}),  # type: ignore[misc]
        dict.fromkeys(sizes, BATCH),
        num_replicas=1,
        rank=0,
    )
    begun = time.perf_counter()
    sampler.set_epoch(1)
    given = sum(1 for _ in sampler)
    _expect(given, sizes)
    return time.perf_counter() - begun


def _ours(sizes: dict[str, int]) -> float:
    begun = time.perf_counter()
    planned = plan_epoch(sizes, dict.fromkeys(sizes, BATCH), Mixture(), seed=0, epoch=1)
    given = sum(1 for _ in planned)
    _expect(given, sizes)
    return time.perf_counter() - begun


def _expect(given: int, sizes: dict[str, int]) -> None:
    if given != sum(-(-size // BATCH) for size in sizes.values()):
        raise SystemExit(f"{given} batches were given")


def _large(sizes: dict[str, int], mixture: Mixture) -> tuple[float, float, float]:
    """Seconds to plan, seconds to enter in the middle, microseconds for a batch."""
    start = time.perf_counter()
    planned = plan_epoch(sizes, dict.fromkeys(sizes, BATCH), mixture, seed=0, epoch=100)
    plan = time.perf_counter()
    batches = (planned[i] for i in range(len(planned) // 2, len(planned)))
    next(batches)
    enter = time.perf_counter()
    given = sum(1 for _ in islice(batches, BATCHES))
    return plan - start, enter - plan, (time.perf_counter() - enter) / given * 1e6


if __name__ == "__main__":
    main(report(__doc__ or ""))
