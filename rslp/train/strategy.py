"""Several processes under Lightning: who is who, and gradients that are summed once per optimiser step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Module
from torch.optim import Optimizer

from rslp.errors import ConfigError, Problem
from rslp.runtime import collectives
from rslp.runtime.world import RANKS_VARIABLE, World, read_world

_STRATEGY = "rslp.train.strategy.SummedGradients"
_ENVIRONMENT = "rslp.train.strategy.RanksEnvironment"
# Strategies of existing configs that ask for what ours does.
_REPLACED = ("auto", "ddp", "singledevice", "single_device")


def trainer_for_world(trainer: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Lay a trainer's config out over the processes; a strategy of the DDP family gives way to ours.

    Args:
        trainer: the ``trainer`` section of a run config.
        world: the processes.

    Raises:
        ConfigError: it asks for other processes than were started, or for a strategy that shares the model differently.
    """
    problems = [Problem(what, key=f"trainer.{key}") for key, what in _faults(trainer, world)]
    if problems:
        raise ConfigError(problems)
    kept = {key: value for key, value in trainer.items() if key not in ("strategy", "num_nodes")}
    if world.size == 1:
        # Without an environment of its own, Lightning looks for those of clusters.
        plugins = _as_list(trainer.get("plugins"))
        return {**kept, "devices": _devices(trainer), "plugins": [*plugins, {"class_path": _ENVIRONMENT}]}
    return {**kept, "devices": world.local_size, "num_nodes": world.nodes, "strategy": {"class_path": _STRATEGY}}


def _faults(trainer: Mapping[str, Any], world: World) -> list[tuple[str, str]]:
    faults = []
    for key, started, noun in (("devices", world.local_size, "process"), ("num_nodes", world.nodes, "machine")):
        asked = _asked(trainer.get(key))
        if asked not in (None, 1, started):
            what = f"{asked} processes asked for" if key == "devices" else f"{asked} machines asked for"
            several = noun + ("es" if noun == "process" else "s") if started > 1 else noun
            faults.append(
                (key, f"{what}, but the job was started with {started} {several}; leave it to {RANKS_VARIABLE}")
            )
    name = _name(trainer.get("strategy")).lower()
    if not name.startswith(_REPLACED):
        faults.append(("strategy", f"got {name}; every process holds the whole model here, leave the strategy out"))
    if trainer.get("sync_batchnorm") and world.size > 1:
        faults.append(("sync_batchnorm", "is not supported: a process may have no sample of a batch"))
    return faults


def _asked(value: Any) -> Any:
    """The number that a setting asks for; None where it leaves that open."""
    if isinstance(value, list | tuple):
        return len(value)
    if isinstance(value, str):
        return int(value) if value.isdecimal() else None
    return value if isinstance(value, int) and value > 0 else None


def _devices(trainer: Mapping[str, Any]) -> Any:
    """Which device a single process takes: a list with one number chooses it."""
    asked = trainer.get("devices")
    return asked if isinstance(asked, list) and len(asked) == 1 else 1


def _name(strategy: Any) -> str:
    path = strategy.get("class_path", "") if isinstance(strategy, Mapping) else strategy or "auto"
    return str(path).rpartition(".")[2]


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


class RanksEnvironment(ClusterEnvironment):
    """Tells Lightning what ``RSLP_RANKS`` says, whatever other variables a process has inherited."""

    def __init__(self) -> None:
        super().__init__()
        self._world = read_world(os.environ)

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts no process of its own."""
        return True

    @property
    def main_address(self) -> str:
        """Host name of the machine of rank 0."""
        return self._world.address

    @property
    def main_port(self) -> int:
        """Where rank 0 listens."""
        return self._world.port

    @staticmethod
    def detect() -> bool:
        """It is chosen, never guessed."""
        return False

    def world_size(self) -> int:
        """Number of processes."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """Nothing: the environment says it."""

    def global_rank(self) -> int:
        """Number of this process."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: the environment says it."""

    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return self._world.local_rank

    def node_rank(self) -> int:
        """Number of the machine."""
        return self._world.node


class SummedGradients(DDPStrategy):
    """Data parallelism without the wrapper around the model.

    Losses are divided by counts over all processes before they are differentiated, so gradients are to be summed, not
    averaged, and once per optimiser step, after the backward pass of its last batch. Parameters may have gradients in
    some steps only (decoders of datasets that are not in a step), and a process may have no sample of a batch.
    """

    def __init__(self) -> None:
        super().__init__(cluster_environment=RanksEnvironment())

    def configure_ddp(self) -> None:
        """Begin with the weights and buffers of rank 0, in place of wrapping the model."""
        model = self._module()
        collectives.broadcast(chain(model.parameters(), model.buffers()))

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Sum the gradients between the backward pass and everything that looks at them (clipping, callbacks).

        Args:
            optimizer: the optimiser.
            closure: does the forward and backward passes.
            model: the module, for the precision plugin.
            **kwargs: of Lightning, handed on.
        """

        def summing() -> Any:
            result = closure()
            collectives.sum_gradients(self._module().parameters())
            return result

        return super().optimizer_step(optimizer, summing, model, **kwargs)

    def on_validation_start(self) -> None:
        """Judge one model: running statistics have gone different ways since the start."""
        collectives.broadcast(self._module().buffers())

    def _module(self) -> Module:
        if self.model is None:
            raise RuntimeError("the strategy has no model yet")
        return self.model
