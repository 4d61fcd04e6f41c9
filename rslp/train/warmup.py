"""Warm-up: a learning rate that rises over a parameter group's first steps.

A group's rate at its k-th step (from 1) is min(1, k / w) times what its scheduler says, w being its ``warmup_steps``.
Steps are counted by group and only while it trains, so a group that is thawed late warms up then. The count is an entry
of the group, hence of the optimiser's state: a resumed run goes on with it. The rate itself is the scheduler's outside
of the step, so that warm-up goes with any scheduler.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

STEPS = "warmup_steps"
DONE = "warmup_done"


def attach(optimizer: Optimizer) -> None:
    """Let an optimiser's groups warm up, if any of them asks for it in ``warmup_steps``."""
    if not any(group.get(STEPS) for group in optimizer.param_groups):
        return
    for group in optimizer.param_groups:
        group.setdefault(STEPS, 0)
        group.setdefault(DONE, 0)
    held: list[float] = []

    def lower(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        held[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if _warms(group):
                group["lr"] *= (group[DONE] + 1) / group[STEPS]

    def restore(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        for group, rate in zip(optimizer.param_groups, held, strict=True):
            group["lr"] = rate
            group[DONE] += _warms(group)

    optimizer.register_step_pre_hook(lower)
    optimizer.register_step_post_hook(restore)


def _warms(group: dict[str, Any]) -> bool:
    return group[DONE] < group[STEPS] and any(parameter.requires_grad for parameter in group["params"])
