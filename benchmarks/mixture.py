"""How long it takes to plan an epoch, to enter it in the middle, and to give a batch.

python benchmarks/mixture.py
"""

from __future__ import annotations

import time
from itertools import islice

from rslp.train.mixture import Mixture, epoch

CASES = {
    "8 datasets x 1M samples": ({f"d{i}": 1_000_000 for i in range(8)}, Mixture()),
    "8 datasets x 1M samples, 4 a step": ({f"d{i}": 1_000_000 for i in range(8)}, Mixture(datasets_per_step=4)),
    "1000 datasets x 10 samples, refilled": ({f"d{i}": 10 for i in range(1000)}, Mixture(stop="longest")),
}
BATCHES = 10_000


def main() -> None:
    """Print a line per case."""
    print(f"{'batch size 8, epoch 100':38}{'batches':>9}{'plan s':>9}{'enter s':>9}{'µs/batch':>10}")
    for name, (sizes, mixture) in CASES.items():
        start = time.perf_counter()
        planned = epoch(sizes, dict.fromkeys(sizes, 8), mixture, seed=0, epoch=100)
        plan = time.perf_counter()
        batches = planned.starting_at(len(planned) // 2)
        next(batches)
        enter = time.perf_counter()
        given = sum(1 for _ in islice(batches, BATCHES))
        each = (time.perf_counter() - enter) / given * 1e6
        print(f"{name:38}{len(planned):9}{plan - start:9.3f}{enter - plan:9.3f}{each:10.1f}")


if __name__ == "__main__":
    main()
