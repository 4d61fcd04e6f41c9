"""Whether a run's checkpoints will fit on the disk: asked before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rslp.run import RunDir
from rslp.train.module import JointModule


def lack_of_room(run: RunDir, module: JointModule, optimizers: Sequence[torch.optim.Optimizer]) -> str | None:
    """What to say if the checkpoints will not fit; None if they will.

    Args:
        run: the run directory; checkpoints that are there already are replaced.
        module: what is saved.
        optimizers: whose state is saved with it.
    """
    weights = bytes_of(module.state_dict())
    states = [
        _states(group) * sum(p.nbytes for p in group["params"]) for one in optimizers for group in one.param_groups
    ]
    best = [run.best(), *map(run.best, module.datasets())]
    there = [path for path in (run.last, run.last.with_name("previous.ckpt"), *best) if path.exists()]
    # The last, the one before it, and one that is being written; the best are weights alone.
    needed = 3 * (weights + sum(states)) + len(best) * weights
    missing = needed - sum(path.stat().st_size for path in there)
    free = shutil.disk_usage(run.path).free
    if missing <= free:
        return None
    what = f"last.ckpt, previous.ckpt, {len(best)} of best weights, and one more during a write"
    return f"{run.checkpoints} needs about {missing:,} bytes more ({what}), and {free:,} bytes are free there"


def _states(group: dict[str, Any]) -> int:
    """How many numbers an optimiser keeps of each weight: Adam and its like two, momentum one."""
    return 2 if "betas" in group else int(bool(group.get("momentum")))


def bytes_of(value: Any) -> int:
    """Bytes of the tensors in a checkpoint, or in a part of it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(bytes_of, parts))
