"""A training epoch while the encoder is frozen: from kept features, against rslearn, and against the heads alone.

python benchmarks/frozen.py [--quick] [--out FILE]

The example, with its pooled heads (classification and regression), with its dense ones (segmentation and detection),
and with the pooled ones on an encoder of the published Tiny's size; the example's own has that of Nano, the smallest.
Epochs after the first are measured: our features are kept by then, and rslearn has all windows in memory. The heads
alone train on batches of features that are in memory before the epoch begins.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from example_runs import Setting, compose, make_example, run_config, train
from machine import processors
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.config import Config
from rows import Report, report, row

TINY = 192
POOLED = ("crop_type", "fuel_moisture")
DENSE = ("land_cover", "vessel_detection")
ROUNDS = 3
SIDES = ("ours", "rslearn", "model alone")


def main(out: Report) -> None:
    """Measure, and report."""
    with tempfile.TemporaryDirectory() as place:
        example = make_example(Path(place), size=0.1 if out.quick else 1)
        for heads, datasets in (("pooled", POOLED), ("dense", DENSE)):
            _compare(out, example, heads, datasets, rounds=1 if out.quick else ROUNDS)
        grow(example)
        _compare(out, example, "pooled, Tiny", POOLED, rounds=1)


def _compare(out: Report, example: Path, heads: str, datasets: tuple[str, ...], *, rounds: int) -> None:
    config = frozen(only(run_config(example), datasets))
    best = {side: _best(example, config, side=side, heads=heads, quick=out.quick) for side in SIDES}
    epochs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in SIDES:
            name = f"{heads}-{turn}-{side}".replace(", ", "-").replace(" ", "-")
            epochs[side] += train(example, side=side, config=config, setting=best[side], name=name)[1:]
    _add_rows(out, heads, epochs, best)


def grow(example: Path) -> None:
    """Give the example's encoder, whose weights are random in any case, the shape of Tiny."""
    bundle = example / "encoder"
    settings = json.loads((bundle / "config.json").read_text())
    settings["model"]["encoder_config"] |= {"embedding_size": TINY, "num_heads": 3, "depth": 12}
    settings["model"]["decoder_config"]["encoder_embedding_size"] = TINY
    (bundle / "config.json").write_text(json.dumps(settings))
    torch.save(Config.from_dict(settings["model"]).build().state_dict(), bundle / "weights.pth")
    config = example / "multi_dataset.yaml"
    config.write_text(config.read_text().replace("encoder_embedding_size: 128", f"encoder_embedding_size: {TINY}"))
    compose(example)


def only(config: dict[str, Any], datasets: tuple[str, ...]) -> dict[str, Any]:
    """A run config with some of its datasets alone."""
    config = copy.deepcopy(config)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    for place in (
        data["data_modules"],
        model["model"]["init_args"]["decoders"],
        model["task"]["init_args"]["tasks"],
        model["task"]["init_args"]["input_mapping"],
    ):
        for name in set(place) - set(datasets):
            del place[name]
    return config


def frozen(config: dict[str, Any]) -> dict[str, Any]:
    """A run config whose encoder never trains, with one view of each sample, and a few epochs without validation."""
    freeze = {
        "class_path": "rslearn.train.callbacks.freeze_unfreeze.FreezeUnfreeze",
        "init_args": {"module_selector": ["model", "encoder", 0]},
    }
    config["trainer"] |= {"callbacks": [freeze], "max_epochs": 4, "limit_val_batches": 0}
    config["data"]["init_args"]["frozen_views"] = 1
    return config


def _best(example: Path, config: dict[str, Any], *, side: str, heads: str, quick: bool) -> Setting:
    """The setting of two with which a side trains faster."""
    settings = [Setting(1, max(1, processors() - 1)), Setting(0, processors())]
    if quick:
        return settings[0]
    if side == "model alone":
        return settings[1]
    short = {**config, "trainer": {**config["trainer"], "max_epochs": 2}}
    rates = {}
    for setting in settings:
        name = f"try-{heads}-{side}-{setting.workers}".replace(", ", "-")
        rates[setting] = _rate(train(example, side=side, config=short, setting=setting, name=name)[-1])
    return max(rates, key=rates.__getitem__)


def _rate(epoch: dict[str, float]) -> float:
    return epoch["samples"] / epoch["wall"]


def _add_rows(out: Report, heads: str, epochs: dict[str, list[dict[str, float]]], best: dict[str, Setting]) -> None:
    used = {side: f"{s.workers} workers, {s.threads} threads" for side, s in best.items()}
    rates = {side: list(map(_rate, many)) for side, many in epochs.items()}
    cpu = {side: [epoch["cpu"] / epoch["samples"] * 1e3 for epoch in many] for side, many in epochs.items()}
    alone = "the heads alone, features in memory"
    kind, _, size = heads.partition(", ")
    of = f" of {size}'s size" if size else ""
    out.add(
        row(
            f"frozen, {heads}",
            f"epoch with a frozen encoder{of} and {kind} heads, features kept",
            unit="samples/s",
            ours=rates["ours"],
            rslearn=rates["rslearn"],
            limit=rates["model alone"],
            limit_is=alone,
            more_is_better=True,
            wanted_ratio=None if heads == "dense" else 20,
            wanted_share=1 / 1.15 if heads == "dense" else None,
            note=f"ours {used['ours']}; rslearn {used['rslearn']}",
        )
    )
    out.add(
        row(
            f"frozen, {heads}, CPU",
            f"the same runs with {kind} heads{of}, CPU time of all their processes",
            unit="ms/sample",
            ours=cpu["ours"],
            rslearn=cpu["rslearn"],
            limit=cpu["model alone"],
            limit_is=alone,
        )
    )


if __name__ == "__main__":
    main(report(__doc__ or ""))
