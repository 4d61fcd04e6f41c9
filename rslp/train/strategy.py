"""Several ranks under Lightning: their numbers, and gradients that are summed once per optimiser step."""

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
# Strategies of existing configs that ``SummedGradients`` replaces.
_REPLACED = ("auto", "ddp", "singledevice", "single_device")


def trainer_for_world(trainer: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Set devices, nodes and strategy of a trainer's config; ``SummedGradients`` replaces strategies of the DDP family.

    Args:
        trainer: the ``trainer`` section of a run config.
        world: the ranks of the job.

    Raises:
        ConfigError: it asks for another number of processes than were started, or for a sharded model.
    """
    problems = [Problem(message, key=f"trainer.{key}") for key, message in _faults(trainer, world)]
    if problems:
        raise ConfigError(problems)
    settings = {key: value for key, value in trainer.items() if key not in ("strategy", "num_nodes")}
    if world.size == 1:
        # Without this environment, Lightning would detect that of a cluster.
        plugins = _as_list(trainer.get("plugins"))
        return {**settings, "devices": _devices(trainer), "plugins": [*plugins, {"class_path": _ENVIRONMENT}]}
    return {**settings, "devices": world.local_size, "num_nodes": world.nodes, "strategy": {"class_path": _STRATEGY}}


def _faults(trainer: Mapping[str, Any], world: World) -> list[tuple[str, str]]:
    faults = []
    for key, started, noun in (("devices", world.local_size, "process"), ("num_nodes", world.nodes, "machine")):
        count = _number(trainer.get(key))
        if count not in (None, 1, started):
            plural = noun + ("es" if noun == "process" else "s")
            got = f"the job was started with {started} {plural if started > 1 else noun}"
            faults.append((key, f"{count} {plural} asked for, but {got}; leave it to {RANKS_VARIABLE}"))
    name = _name(trainer.get("strategy")).lower()
    if not name.startswith(_REPLACED):
        faults.append(("strategy", f"got {name}; every process holds the whole model here, leave the strategy out"))
    if trainer.get("sync_batchnorm") and world.size > 1:
        faults.append(("sync_batchnorm", "is not supported: a process may have no sample of a batch"))
    return faults


def _number(value: Any) -> Any:
    """The number that ``devices`` or ``num_nodes`` asks for; None where it leaves that open."""
    if isinstance(value, list | tuple):
        return len(value)
    if isinstance(value, str):
        return int(value) if value.isdecimal() else None
    return value if isinstance(value, int) and value > 0 else None


def _devices(trainer: Mapping[str, Any]) -> Any:
    """The device of a single process: a list with one number chooses it."""
    devices = trainer.get("devices")
    return devices if isinstance(devices, list) and len(devices) == 1 else 1


def _name(strategy: Any) -> str:
    path = strategy.get("class_path", "") if isinstance(strategy, Mapping) else strategy or "auto"
    return str(path).rpartition(".")[2]


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


class RanksEnvironment(ClusterEnvironment):
    """Gives Lightning the ranks of ``RSLP_RANKS``, whatever a cluster's other variables say."""

    def __init__(self) -> None:
        super().__init__()
        self._world = read_world(os.environ)

    @property
    def creates_processes_externally(self) -> bool:
        """True, so that Lightning starts no processes."""
        return True

    @property
    def main_address(self) -> str:
        """Host name of the machine of rank 0."""
        return self._world.address

    @property
    def main_port(self) -> int:
        """Port on which rank 0 listens."""
        return self._world.port

    @staticmethod
    def detect() -> bool:
        """False: it is chosen in the trainer's config, never detected."""
        return False

    def world_size(self) -> int:
        """Number of ranks."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """Do nothing: ``RSLP_RANKS`` has the number."""

    def global_rank(self) -> int:
        """Number of this rank."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: ``RSLP_RANKS`` has the number."""

    def local_rank(self) -> int:
        """Number of this rank on its machine."""
        return self._world.local_rank

    def node_rank(self) -> int:
        """Number of this machine."""
        return self._world.node


class SummedGradients(DDPStrategy):
    """Data parallelism that sums gradients over ranks once per optimiser step, without DDP's wrapper.

    Losses are divided by denominators over all ranks before the backward pass, so gradients are summed, not averaged.
    Decoders have no gradient in steps without their dataset, and a rank may have no sample of a batch.
    """

    def __init__(self) -> None:
        super().__init__(cluster_environment=RanksEnvironment())

    def configure_ddp(self) -> None:
        """Broadcast the weights and buffers of rank 0, and leave the model unwrapped."""
        model = self._module()
        collectives.broadcast(chain(model.parameters(), model.buffers()))

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Sum the gradients after the backward passes, before clipping and callbacks read them."""

        def summing() -> Any:
            result = closure()
            collectives.sum_gradients(self._module().parameters())
            return result

        return super().optimizer_step(optimizer, summing, model, **kwargs)

    def on_validation_start(self) -> None:
        """Broadcast rank 0's buffers, since running statistics differ between ranks."""
        collectives.broadcast(self._module().buffers())

    def _module(self) -> Module:
        if self.model is None:
            raise RuntimeError("the strategy has no model yet")
        return self.model
