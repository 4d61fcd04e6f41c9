"""How a joint run balances its datasets: weights of losses, aggregation of gradients, and the affinity of datasets.

``balance`` of ``JointModule`` names one of these ways. ``docs/joint_training.md`` has their formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from rslp.config.merge import pick
from rslp.errors import KeyPath
from rslp.runtime.extras import is_absent, remedy

AggregationName = Literal["upgrad", "pcgrad", "cagrad", "mgda"]
BalanceName = Literal["none", "scale", "uncertainty", "famo", "upgrad", "pcgrad", "cagrad", "mgda"]
AGGREGATIONS: tuple[AggregationName, ...] = get_args(AggregationName)
_KEY: KeyPath = ("model", "init_args", "balance")


def balance_faults(config: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Find why the ``balance`` of a run config can't work: for each reason its key path, and a message.

    Only an aggregation of gradients has such conditions.
    """
    name, trainer, data = pick(config, _KEY), ("trainer",), ("data", "init_args")
    if name not in AGGREGATIONS:
        return
    if is_absent("balance"):
        yield _KEY, f"{name} needs TorchJD, which is not installed; {remedy('balance')}"
    datasets = set(pick(config, (*data, "data_modules")) or ()) - set(pick(config, (*data, "disabled_datasets")) or ())
    rounds = (pick(config, (*data, "datasets_per_step")), pick(config, (*trainer, "accumulate_grad_batches")))
    if len(datasets) == 1:
        yield _KEY, f"{name} aggregates gradients of several datasets, and the run has one"
    elif all(number in (None, 1) for number in rounds):
        message = f"{name} aggregates the gradients of a step's datasets, and each step has one dataset"
        yield _KEY, f"{message}; set data.init_args.datasets_per_step to 2 or more"
    if str(pick(config, (*trainer, "precision"))) in ("16", "16-mixed"):
        yield _KEY, f"{name} needs gradients that are not scaled; set trainer.precision to bf16-mixed or 32-true"
    callbacks = pick(config, (*trainer, "callbacks"))
    for position, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        path = callback.get("class_path") if isinstance(callback, Mapping) else callback
        if str(path).endswith(".MiniPCGrad"):
            message = f"MiniPCGrad changes the gradients that balance: {name} aggregates; leave one of them out"
            yield (*trainer, "callbacks", position), message
