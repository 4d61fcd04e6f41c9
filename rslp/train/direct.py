"""Make trainer, model and data of a run config without the parser, where the config has only one reading."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from rslp.train.blueprint import Call, Unsure, blueprint, call, construct
from rslp.train.data import MultiDatasetDataModule
from rslp.train.module import JointModule

_log = logging.getLogger(__name__)
# What constructors raise at arguments that they do not like; the parser finds the words for it.
_REFUSALS = (
    *(ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError, OSError, ImportError),
    MisconfigurationException,
)
_PARTS = {"trainer", "model", "data"}


@dataclass(frozen=True)
class Made:
    """What a run config describes.

    Attributes:
        model: the joint model with its losses and metrics.
        datamodule: the datasets.
        trainer: Lightning's trainer with the run's callbacks and loggers.
        seed: the run's seed.
    """

    model: JointModule
    datamodule: MultiDatasetDataModule
    trainer: Trainer
    seed: int


def make_directly(
    config: Mapping[str, Any], *, trainer_defaults: Mapping[str, Any], own_keys: Mapping[str, Any]
) -> Made | None:
    """Make everything in a run config, as the parser would have.

    Args:
        config: the config, its paths resolved.
        trainer_defaults: arguments of the trainer in place of Lightning's defaults.
        own_keys: the types of the keys beside model, data and trainer.

    Returns:
        None if the parser has to decide, or to say what is wrong.

    Raises:
        UserError: a class refuses its arguments as a mistake of the user's.
    """
    try:
        plans = _plan(config, trainer_defaults=trainer_defaults, own_keys=own_keys)
    except Unsure as unsure:
        _log.debug("the config is left to the parser: %s", unsure)
        return None
    try:
        # Arguments of the trainer, then the model: the parser's order, and so the same random numbers for the weights.
        trainer = {name: construct(argument) for name, argument in plans["trainer"].arguments.items()}
        model, data = construct(plans["model"]), construct(plans["data"])
        return Made(model=model, datamodule=data, trainer=Trainer(**trainer), seed=config.get("seed", 0))
    except _REFUSALS as error:
        _log.debug("the config is left to the parser, which will refuse it too: %s", error)
        return None


def _plan(
    config: Mapping[str, Any], *, trainer_defaults: Mapping[str, Any], own_keys: Mapping[str, Any]
) -> dict[str, Call]:
    if not {"model", "data"} <= set(config) or not set(config) <= _PARTS | set(own_keys):
        raise Unsure(f"its keys are {sorted(config)}")
    for key in sorted(set(config) - _PARTS):
        blueprint(config[key], own_keys[key])
    trainer = call(Trainer, config.get("trainer") or {}, trainer_defaults)
    trainer_arguments = dict(trainer.arguments)
    # The command line always hands a list of callbacks on.
    callbacks = trainer_arguments["callbacks"]
    trainer_arguments["callbacks"] = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    plans = {
        "trainer": Call(Trainer, trainer_arguments),
        "model": blueprint(config["model"], L.LightningModule),
        "data": blueprint(config["data"], L.LightningDataModule),
    }
    for key, kind in (("model", JointModule), ("data", MultiDatasetDataModule)):
        if plans[key].kind is not kind:
            raise Unsure(f"{plans[key].kind} is not {kind.__name__} itself")
    return plans
