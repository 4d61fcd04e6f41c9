"""What a run of a study draws: the epoch of joint training, and how runs on some of its datasets are made equal."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rslp.config import pick
from rslp.config.datasets import DATA_MODULES
from rslp.errors import ConfigError, Problem
from rslp.io import Document

Budget = Literal["samples", "steps"]
# Limits of a trainer that cut epochs short, so that arms would not be equal.
_CUTTING = ("max_steps", "max_time", "limit_train_batches")
# Arguments of the data module that say how batches are drawn.
_MIXTURE = ("stop", "refill_batches", "temperature", "steps_per_dataset", "per_dataset_patch_limit")


@dataclass(frozen=True)
class Epoch:
    """The first epoch of a training on all datasets.

    Attributes:
        batches: batches of each dataset.
        samples: samples drawn of each dataset.
        windows: training windows of each dataset.
        sizes: training samples of each dataset.
        batch_sizes: samples of a batch of each dataset.
        steps: optimiser steps.
        rounds: rounds of batches in an optimiser step (``accumulate_grad_batches``).
        whole: whether every epoch goes through all samples of each dataset, or its limit, exactly once.
        count: number of epochs.
    """

    batches: Mapping[str, int]
    samples: Mapping[str, int]
    windows: Mapping[str, int]
    sizes: Mapping[str, int]
    batch_sizes: Mapping[str, int]
    steps: int
    rounds: int
    whole: bool
    count: int

    def limited(self, name: str, fraction: float) -> int:
        """The number of a dataset's training windows in a share of them, at least 1."""
        return max(1, round(fraction * self.windows[name]))

    def batches_of(self, name: str, fraction: float) -> int:
        """The batches that draw a dataset's samples of the epoch, of a share of its windows.

        A pass ends with a smaller batch, so that it takes more batches where passes are short.
        """
        if fraction >= 1:
            return self.batches[name]
        size = self.limited(name, fraction) * self.sizes[name] / self.windows[name]
        return round(self.samples[name] / size * math.ceil(size / self.batch_sizes[name]))


def refuse_limits(tree: Mapping[str, Any], name: str) -> None:
    """Raise ``ConfigError`` if a run config has limits other than epochs, with which arms could not be made equal."""
    trainer = tree.get("trainer") or {}
    problems = [
        Problem("a study counts in epochs, so that arms can be made equal: set max_epochs", name, key=f"trainer.{key}")
        for key in _CUTTING
        if trainer.get(key) not in (None, -1)
    ]
    if not isinstance(trainer.get("max_epochs"), int) or trainer["max_epochs"] < 1:
        problems.append(Problem("a study needs the number of epochs", name, key="trainer.max_epochs"))
    if problems:
        raise ConfigError(problems)


def epoch_of(tree: Mapping[str, Any], document: Document) -> Epoch:
    """Plan an epoch of a run config; this lists the windows of its datasets.

    Args:
        tree: the run config, its paths resolved.
        document: its file, for messages.
    """
    from rslp.data.mixture.mixture import plan_epoch
    from rslp.train.build import build_data

    data = build_data(tree, document)
    data.accumulate((tree.get("trainer") or {}).get("accumulate_grad_batches") or 1)
    planned = plan_epoch(
        data.sizes("train"), data.batch_sizes, data.mixture, seed=tree.get("seed") or 0, epoch=0,
        samplings=data.samplings(),
    )  # fmt: skip
    samples = dict.fromkeys(data.data_modules, 0)
    for batch in planned:
        samples[batch.dataset] += batch.global_size
    return Epoch(
        batches=planned.counts,
        samples=samples,
        windows={name: len({s.window(i) for i in range(len(s))}) for name, s in data.sources("train").items()},
        sizes=data.sizes("train"),
        batch_sizes=data.batch_sizes,
        steps=planned.steps,
        rounds=data.mixture.accumulate,
        whole=data.mixture.whole,
        count=tree["trainer"]["max_epochs"],
    )


def needs_epoch(tree: Mapping[str, Any], *, datasets: Sequence[str], fraction: float, budget: Budget) -> bool:
    """Whether a run's config depends on the epoch of the joint training; otherwise it draws the same samples anyway."""
    arguments = pick(tree, ("data", "init_args")) or {}
    part = len(datasets) < len(pick(tree, DATA_MODULES) or {})
    whole = arguments.get("stop") in (None, "all") and not (
        arguments.get("refill_batches") or arguments.get("steps_per_epoch")
    )
    return fraction < 1 or (part and (budget == "steps" or not whole))


def run_tree(
    tree: Mapping[str, Any],
    *,
    datasets: Sequence[str],
    seed: int,
    fraction: float = 1.0,
    budget: Budget = "samples",
    epoch: Epoch | None = None,
) -> dict[str, Any]:
    """The run config of one run: some datasets of a joint config, drawn as the budget says.

    Args:
        tree: the joint run config.
        datasets: the datasets of the run; the others are disabled.
        seed: its seed.
        fraction: share of the training windows.
        budget: ``samples``: it draws as many samples of each of its datasets as the joint run; ``steps``: it takes the
            share of the joint run's optimiser steps that its datasets are of all, so that single models take together
            as many as the joint one.
        epoch: the joint epoch, where ``needs_epoch``.
    """
    result: dict[str, Any] = {**copy.deepcopy(dict(tree)), "seed": seed}
    arguments = result["data"]["init_args"]
    disabled = list(arguments.get("disabled_datasets") or [])
    present = [name for name in arguments["data_modules"] if name not in disabled]
    if others := [name for name in present if name not in datasets]:
        arguments["disabled_datasets"] = [*disabled, *others]
    if isinstance(weights := arguments.get("weights"), Mapping):
        arguments["weights"] = {name: weight for name, weight in weights.items() if name in datasets}
    if (each := arguments.get("datasets_per_step") or 1) > len(datasets):
        arguments["datasets_per_step"] = len(datasets)
    if epoch is None:
        return result
    for name in datasets if fraction < 1 else ():
        split = arguments["data_modules"][name]["init_args"].setdefault("train_config", {})
        split["num_samples"] = epoch.limited(name, fraction)
    for key in _MIXTURE:
        arguments.pop(key, None)
    batches = {name: epoch.batches_of(name, fraction) for name in datasets}
    steps = math.ceil(sum(batches.values()) / (min(each, len(datasets)) * epoch.rounds))
    if budget == "steps":
        steps = max(1, round(epoch.steps * len(datasets) / len(present)))
    arguments |= {"sample_mode": "weights", "weights": batches, "steps_per_epoch": steps}
    return result
