"""The first training epoch, nothing frozen, of the whole joint run on the example: ours against rslearn, in turns.

python benchmarks/epoch.py [--quick] [--out FILE]

Both sides have the same datasets, heads, weights, batch sizes and precision. How many workers and threads suit each
side best on this machine is tried first, in the same way for both.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from example_runs import SIDES, Setting, make_example, run_config, train
from machine import processors
from rows import Curve, Report, report, row

WORKERS = (0, 1, 2)
ROUNDS = 3


def main(out: Report) -> None:
    """Measure, and report."""
    with tempfile.TemporaryDirectory() as place:
        example = make_example(Path(place), size=0.1 if out.quick else 1)
        config = run_config(example)
        config["trainer"] |= {"max_epochs": 1, "limit_val_batches": 0}
        # The first run packs the store, as the first of each run on a dataset does.
        train(example, side="ours", config=config, setting=Setting(1), name="cold")
        tried = {side: _tried(example, config, side=side, quick=out.quick) for side in SIDES[:2]}
        out.add(_curve(tried))
        best = {side: max(rates, key=rates.__getitem__) for side, rates in tried.items()}
        best |= {"rslearn, our encoder": best["rslearn"], "model alone": Setting(0, 1 if out.quick else processors())}
        epochs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for turn in range(1 if out.quick else ROUNDS):
            for side in SIDES:
                epochs[side].append(_epoch(example, config, side=side, setting=best[side], name=f"turn-{turn}-{side}"))
    _add_rows(out, epochs, best)


def _tried(example: Path, config: dict[str, Any], *, side: str, quick: bool) -> dict[Setting, float]:
    """Samples per second with each setting, over a part of the epoch."""
    part = {**config, "trainer": {**config["trainer"], "limit_train_batches": 0.5}}
    rates = {}
    for setting in [Setting(1, 1)] if quick else _settings(side):
        name = f"try-{side}-{setting.workers}-{setting.threads}"
        epoch = _epoch(example, part, side=side, setting=setting, name=name)
        rates[setting] = epoch["samples"] / epoch["wall"]
    return rates


def _settings(side: str) -> list[Setting]:
    """Ours leaves workers the processors that they need; rslearn is tried with as many threads as there are, too."""
    if side == "ours":
        return [Setting(workers) for workers in WORKERS]
    few = {workers: max(1, processors() - workers) for workers in WORKERS}
    return [Setting(w, threads) for w in WORKERS for threads in sorted({few[w], processors()})]


def _epoch(example: Path, config: dict[str, Any], *, side: str, setting: Setting, name: str) -> dict[str, float]:
    words = "".join(letter if letter.isalnum() else "-" for letter in name)
    if side == "model alone":  # its batches are read in the first epoch
        config = {**config, "trainer": {**config["trainer"], "max_epochs": 2}}
    return train(example, side=side, config=config, setting=setting, name=words)[-1]


def _curve(tried: dict[str, dict[Setting, float]]) -> Curve:
    series = {}
    for side, rates in tried.items():
        by_workers = {w: max(rate for s, rate in rates.items() if s.workers == w) for w in {s.workers for s in rates}}
        series[side] = sorted(by_workers.items())
    return Curve("workers", "Joint training, first epoch", "workers", "samples a second", series, linear=True)


def _add_rows(out: Report, epochs: dict[str, list[dict[str, float]]], best: dict[str, Setting]) -> None:
    used = {side: f"{s.workers} workers, {s.threads or 'its own choice of'} threads" for side, s in best.items()}
    rates = {side: [epoch["samples"] / epoch["wall"] for epoch in many] for side, many in epochs.items()}
    cpu = {side: [epoch["cpu"] / epoch["samples"] * 1e3 for epoch in many] for side, many in epochs.items()}
    out.add(
        row(
            "epoch",
            "first training epoch, nothing frozen, whole joint run on the example",
            unit="samples/s",
            ours=rates["ours"],
            rslearn=rates["rslearn"],
            limit=rates["model alone"],
            limit_is="the model alone, batches in memory",
            more_is_better=True,
            wanted_ratio=1.5,
            note=f"each with its best setting: ours {used['ours']}; rslearn {used['rslearn']}",
        )
    )
    out.add(
        row(
            "epoch, CPU",
            "the same runs, CPU time of all their processes",
            unit="ms/sample",
            ours=cpu["ours"],
            rslearn=cpu["rslearn"],
            limit=cpu["model alone"],
            limit_is="the model alone, batches in memory",
            note="threads that wait for each other count, too",
        )
    )
    out.add(
        row(
            "epoch, our encoder class",
            "the first training epoch, rslearn with our encoder class and normalisation",
            unit="samples/s",
            ours=rates["ours"],
            rslearn=rates["rslearn, our encoder"],
            more_is_better=True,
            note="what is left to the reading and the loop",
        )
    )


if __name__ == "__main__":
    main(report(__doc__ or ""))
