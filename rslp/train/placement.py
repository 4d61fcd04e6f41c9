"""The trainer's settings for the processes that a job was started with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rslp.errors import ConfigError, Problem
from rslp.train.world import VARIABLE, World

_STRATEGY = "rslp.train.strategy.SummedGradients"
_ENVIRONMENT = "rslp.train.strategy.RanksEnvironment"
# Strategies of existing configs that ask for what ours does.
_REPLACED = ("auto", "ddp", "singledevice", "single_device")


def placed(trainer: Mapping[str, Any], world: World) -> dict[str, Any]:
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
            faults.append((key, f"{what}, but the job was started with {started} {several}; leave it to {VARIABLE}"))
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
