"""From the config in a run directory to its trainer, model and data module."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import traceback
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rslearn.train.callbacks.freeze_unfreeze import FreezeUnfreeze
from rslearn.train.prediction_writer import RslearnWriter

import rslp
from rslp import upstream
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import ConfigError, KeyPath, Problem, UserError, chain, dotted
from rslp.io import read_yaml, resolve_paths
from rslp.models.optim import Freeze
from rslp.rundir import RunDir
from rslp.runtime.class_paths import refuse_untrusted
from rslp.runtime.seeds import seeded, stable_seed
from rslp.runtime.world import read_world
from rslp.train.callbacks import MetricsLog
from rslp.train.checkpoints import RunCheckpoints
from rslp.train.instantiate import AmbiguousValue, PlannedCall, construct, plan_call, plan_value
from rslp.train.module import JointModule
from rslp.train.quiet import RunProgress, quiet_libraries
from rslp.train.strategy import trainer_for_world

# Defaults of the trainer in every run; the run config may change them.
TRAINER_DEFAULTS = {
    # The batch sampler already gives each rank its own batches.
    "use_distributed_sampler": False,
    # Lightning's two validation batches before training would delay the first step.
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
# Types of a run config's keys beside model, data and trainer.
OWN_KEYS: dict[str, Any] = {
    "rslp_project": str | None,
    "rslp_experiment": str | None,
    "rslp_description": str | None,
    "seed": int,
}


@dataclass(frozen=True)
class InstantiatedRun:
    """The objects that a run config describes.

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


def build(run: RunDir, *, training: bool, predicting: bool = False) -> InstantiatedRun:
    """Instantiate the run config: directly where each value has one reading, otherwise by Lightning's parser.

    Args:
        run: the run directory; its ``config.yaml`` is the only file that is parsed.
        training: add the callbacks and the logger that write checkpoints and metrics.
        predicting: use the prediction's own config if there is one, and only the callbacks that write predictions.

    Raises:
        ConfigError: the config is missing or invalid, or is not one of joint training.
    """
    path = config_for(run, predicting=predicting)
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise ConfigError(Problem("is no run config: it holds no mapping", file=str(path)))
    config = resolve_paths(document.data, run.path, name=document.name, line=document.line)
    if training and (faults := trainer_faults(config.get("trainer"))):
        raise ConfigError(
            Problem(message, file=document.name, line=document.nearest_line(path), key=dotted(path))
            for path, message in faults
        )
    world = read_world(os.environ)
    quiet_libraries(world)
    # Lightning would guess the rank from environment variables, which may come from another job.
    rank_zero_only.rank = world.rank  # type: ignore[attr-defined]
    refuse_untrusted(config, [document])
    upstream.prepare_parser()
    original = deepcopy(config)  # the parser changes its argument
    # Initial weights that are not loaded are drawn from the run's seed.
    with seeded(weights := stable_seed(config.get("seed", 0), "weights")):
        completed = _for_run(config, run=run, training=training, predicting=predicting)
        parts = instantiate_directly(completed, trainer_defaults=TRAINER_DEFAULTS, own_keys=OWN_KEYS)
    if parts is None:
        with seeded(weights):
            parts = _parse(completed, name=path)
    # The mixture accumulates instead of Lightning, which would not weight batches by their loss denominators.
    parts.datamodule.accumulate(parts.trainer.accumulate_grad_batches)
    parts.trainer.accumulate_grad_batches = 1
    parts.datamodule.seed = parts.model.seed = parts.seed
    parts.datamodule.frozen.describe(original)
    _leave_room_for_workers(parts.datamodule.num_workers)
    _checkpoints_first(parts.trainer)
    upstream.average_numbers_alone(_callbacks(parts.trainer))
    return parts


def config_for(run: RunDir, *, predicting: bool) -> Path:
    """The path of the config that a job reads: the prediction's prediction if there is one, otherwise the run's."""
    prediction = run.config_of("predict")
    return prediction if predicting and prediction.is_file() else run.config


def _leave_room_for_workers(workers: int) -> None:
    """Limit torch's threads to the processors that loader workers leave free; oversubscribed threads are slow."""
    if "OMP_NUM_THREADS" not in os.environ:
        processors = len(os.sched_getaffinity(0)) // read_world(os.environ).local_size
        torch.set_num_threads(max(1, processors - workers))


def _for_run(config: Mapping[str, Any], *, run: RunDir, training: bool, predicting: bool = False) -> dict[str, Any]:
    """The config with the run's logger and callbacks added to its trainer."""
    trainer = trainer_for_world(config.get("trainer") or {}, read_world(os.environ))
    callbacks = list(trainer.get("callbacks") or [])
    # RslearnWriter looks up the path of a single dataset in the config, which only a prediction provides.
    writers = [callback for callback in callbacks if _is_class(callback, RslearnWriter)]
    if training:
        callbacks = [callback for callback in callbacks if callback not in writers]
        callbacks = [_adapted(callback, folder=run.checkpoints) for callback in callbacks]
        if not any(_is_class(callback, RunCheckpoints) for callback in callbacks):
            callbacks.append({"class_path": _path_of(RunCheckpoints), "init_args": {"run_dir": str(run.path)}})
        log = {"class_path": _path_of(MetricsLog), "init_args": {"path": str(run.metrics)}}
        trainer["logger"] = [log, *_as_list(trainer.get("logger"))]
    else:
        callbacks, trainer["logger"] = writers if predicting else [], False
        trainer["enable_checkpointing"] = False
    shown = trainer.get("enable_progress_bar") is not False
    if shown and not any("ProgressBar" in str(callback.get("class_path")) for callback in callbacks):
        callbacks.append({"class_path": _path_of(RunProgress)})
    trainer |= {"callbacks": callbacks, "default_root_dir": str(run.path)}
    return {**config, "trainer": trainer}


def _adapted(callback: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """A callback of a config, adapted to a run directory.

    ModelCheckpoint writes no ``last.ckpt``, which is that of ``RunCheckpoints``; FreezeUnfreeze becomes ``Freeze``.
    """
    init_args = callback.get("init_args") or {}
    if _is_class(callback, ModelCheckpoint):
        return {**callback, "init_args": {"dirpath": str(folder), **init_args, "save_last": False}}
    if _is_class(callback, FreezeUnfreeze) and not set(init_args) - set(signature(FreezeUnfreeze).parameters):
        return {"class_path": _path_of(Freeze), "init_args": Freeze.settings_of(init_args)}
    return callback


def _is_class(callback: Mapping[str, Any], kind: type) -> bool:
    return str(callback.get("class_path", "")).rpartition(".")[2] == kind.__name__


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _as_list(logger: Any) -> list[Any]:
    return [] if logger in (None, True, False) else logger if isinstance(logger, list) else [logger]


def _checkpoints_first(trainer: Trainer) -> None:
    """Move ``RunCheckpoints`` from last to first: it saves an epoch's start before other callbacks change the state."""
    ours = [callback for callback in _callbacks(trainer) if isinstance(callback, RunCheckpoints)]
    trainer.callbacks = [*ours, *(c for c in _callbacks(trainer) if c not in ours)]  # type: ignore[attr-defined]


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


_OWN = "is not supported: a run writes checkpoints, metrics and its progress by itself; leave it out"
_NOTHING = "means that nothing is trained; helios check examines a config without a run"
# Lightning's names of weights in another format than float32; images and an encoder's own tables are float32.
_OTHER_WEIGHTS = ("64", "64-true", "16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_epochs", _is_zero, _NOTHING),
    ("max_steps", _is_zero, _NOTHING),
    ("limit_train_batches", _is_zero, _NOTHING),
    ("enable_checkpointing", lambda value: value is False, _OWN),
    ("barebones", lambda value: value is True, _OWN),
    ("fast_dev_run", bool, "is not supported: the run would count as done; set `max_steps` in a run of its own"),
    (
        "overfit_batches",
        bool,
        "is not supported: each epoch draws other samples; set `num_samples` of the splits to train on the same few",
    ),
    (
        "precision",
        lambda value: str(value) in _OTHER_WEIGHTS,
        "is not supported: weights and images are float32; use bf16-mixed or 32-true",
    ),
    ("accumulate_grad_batches", lambda value: isinstance(value, int) and value < 1, "must be a whole number from 1"),
)
# Callbacks that do not work in joint training, and what to do instead.
_CALLBACKS = {
    "BatchSizeFinder": "a run has a batch size for each dataset: set `batch_sizes` of the data module",
    "LearningRateFinder": "the learning rate is the optimizer's: set `lr` of `model.init_args.optimizer`",
    "GradientAccumulationScheduler": "the length of a step is part of the mixture: set `accumulate_grad_batches`",
    "StochasticWeightAveraging": "its average is never validated, so that no best checkpoint could hold it; "
    "WeightAveraging and EMAWeightAveraging validate theirs",
}


def trainer_faults(trainer: Any) -> list[tuple[KeyPath, str]]:
    """Find the settings in the ``trainer`` section of a run config that a run does not support.

    Args:
        trainer: the section.

    Returns:
        For each fault its key path in the run config, and a message that says message to do instead.
    """
    if not isinstance(trainer, Mapping):
        return []
    faults: list[tuple[KeyPath, str]] = [
        (("trainer", key), f"{trainer[key]} {message}")
        for key, is_refused, message in _REFUSED
        if is_refused(trainer.get(key))
    ]
    callbacks = trainer.get("callbacks")
    for position, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        name = str(callback.get("class_path") if isinstance(callback, Mapping) else "").rpartition(".")[2]
        if name in _CALLBACKS:
            faults.append((("trainer", "callbacks", position), f"{name} is not supported: {_CALLBACKS[name]}"))
    return faults


_log = logging.getLogger(__name__)
# What constructors raise for invalid arguments; the parser is then run for its message.
_REFUSALS = (
    *(ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError, OSError, ImportError),
    MisconfigurationException,
)
_PARTS = {"trainer", "model", "data"}


def instantiate_directly(
    config: Mapping[str, Any], *, trainer_defaults: Mapping[str, Any], own_keys: Mapping[str, Any]
) -> InstantiatedRun | None:
    """Instantiate a run config without the parser, with the same result.

    Args:
        config: the config, its paths resolved.
        trainer_defaults: arguments of the trainer in place of Lightning's defaults.
        own_keys: types of the keys beside model, data and trainer.

    Returns:
        None where a value is ambiguous or invalid, so that the parser has to be used.

    Raises:
        UserError: a constructor rejects its arguments as a user's mistake.
    """
    try:
        plans = _plan(config, trainer_defaults=trainer_defaults, own_keys=own_keys)
    except AmbiguousValue as error:
        _log.debug("the config is left to the parser: %s", error)
        return None
    try:
        # Arguments of the trainer, then the model: the parser's order, and so the same random numbers for the weights.
        trainer = {name: construct(argument) for name, argument in plans["trainer"].arguments.items()}
        model, data = construct(plans["model"]), construct(plans["data"])
        return InstantiatedRun(model=model, datamodule=data, trainer=Trainer(**trainer), seed=config.get("seed", 0))
    except _REFUSALS as error:
        _log.debug("the config is left to the parser, which will refuse it too: %s", error)
        return None


def _plan(
    config: Mapping[str, Any], *, trainer_defaults: Mapping[str, Any], own_keys: Mapping[str, Any]
) -> dict[str, PlannedCall]:
    if not {"model", "data"} <= set(config) or not set(config) <= _PARTS | set(own_keys):
        raise AmbiguousValue(f"its keys are {sorted(config)}")
    for key in sorted(set(config) - _PARTS):
        plan_value(config[key], own_keys[key])
    trainer = plan_call(Trainer, config.get("trainer") or {}, trainer_defaults)
    trainer_arguments = dict(trainer.arguments)
    # LightningCLI always passes a list of callbacks.
    callbacks = trainer_arguments["callbacks"]
    trainer_arguments["callbacks"] = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    plans = {
        "trainer": PlannedCall(Trainer, trainer_arguments),
        "model": plan_value(config["model"], L.LightningModule),
        "data": plan_value(config["data"], L.LightningDataModule),
    }
    for key, kind in (("model", JointModule), ("data", MultiDatasetDataModule)):
        if plans[key].kind is not kind:
            raise AmbiguousValue(f"{plans[key].kind} is not {kind.__name__} itself")
    return plans


# Lines of jsonargparse's message that state a cause; that a union's None does not match is never one.
_TELLING = re.compile(
    r"does not accept|[Nn]ot a valid|Expected (?!a <class 'NoneType'>)|[Uu]nable to import|is required|[Uu]nexpected"
    r"|[Nn]o module|must be|has no attribute|[Ii]mport"
)


class RunCLI(LightningCLI):
    """Lightning's parser and instantiator with the keys of a run config beside model, data and trainer."""

    model: JointModule
    datamodule: MultiDatasetDataModule
    trainer: Trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the config alone; Lightning would also parse the arguments of the process."""
        self._numbers = {key: value for key, value in (args.get("trainer") or {}).items() if type(value) is int}
        self.config = parser.parse_object(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, and keep numbers numbers of its config numbers.

        Of ``int | float`` the parser takes the member that comes first, which depends on what was imported before:
        ``limit_train_batches: 1``, one batch, would become 1.0, all batches.
        """
        parsed = self.config_init["trainer"]
        numbers = {key: value for key, value in self._numbers.items() if type(parsed.get(key)) is float}
        return super().instantiate_trainer(**numbers, **kwargs)

    def _dump_config(self) -> None:
        """Do not let Lightning log the parsed config as hyperparameters: the run directory has it already."""
        self.config_dump: dict[str, Any] = {}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept the run's own keys, and set the trainer's defaults."""
        for key, kind in OWN_KEYS.items():
            parser.add_argument(f"--{key}", type=kind, default=0 if kind is int else None)
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})


CLI = TypeVar("CLI", bound=RunCLI)


def _parse(config: dict[str, Any], *, name: Path) -> InstantiatedRun:
    """Instantiate a config by Lightning's parser.

    Raises:
        ConfigError: the parser or a constructor rejects it (the message is cut down to the cause), or model or data
            are of other classes than a joint run's.
    """
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            cli = run_parser(config, RunCLI)
    except (argparse.ArgumentError, SystemExit) as error:
        raise ConfigError(Problem(_cause(noise.getvalue() or str(error)), file=str(name))) from error
    except (ValueError, TypeError, MisconfigurationException) as error:
        if (cause := as_user_error(error)) is not None:
            raise cause from None
        if (refusal := _refusal(error)) is None:
            raise
        raise ConfigError(Problem(refusal, file=str(name))) from error
    for key, part, kind in (("data", cli.datamodule, MultiDatasetDataModule), ("model", cli.model, JointModule)):
        if not isinstance(part, kind):
            message = f"{type(part).__name__} can't train on several datasets; use rslp.train.{kind.__name__}"
            raise ConfigError(Problem(message, file=str(name), key=f"{key}.class_path"))
    return InstantiatedRun(model=cli.model, datamodule=cli.datamodule, trainer=cli.trainer, seed=cli.config.seed)


def run_parser(config: dict[str, Any], cls: type[CLI]) -> CLI:
    """Parse and instantiate a config as a run does.

    Args:
        config: the config; the parser writes into it.
        cls: ``RunCLI`` or a subclass.
    """
    return cls(
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=False,
        run=False,
        args=config,
        parser_kwargs={"exit_on_error": False},
    )


def as_user_error(error: BaseException | None) -> UserError | None:
    """The ``UserError`` among an exception's causes, if there is one: the parser wraps what constructors raise."""
    return next((cause for cause in chain(error) if isinstance(cause, UserError)), None)


def _refusal(error: BaseException) -> str | None:
    """The message of a library's constructor that rejects its arguments; None where rslp itself raised the error."""
    *_, error = chain(error)
    frames = traceback.extract_tb(error.__traceback__)
    ours = not frames or Path(frames[-1].filename).is_relative_to(Path(rslp.__file__).parent)
    rejected = isinstance(error, ValueError | TypeError | MisconfigurationException) and not ours
    return f"{frames[-1].name}: {_cause(str(error))}" if rejected else None


def _cause(message: str) -> str:
    """The last line of jsonargparse's message that states a cause, which is that of the deepest value."""
    key = re.search(r"[Pp]arser key \"([\w.+]+)\"", message)
    lines = [line.strip(" -\t") for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    cause = (telling or lines or ["can't be parsed"])[-1][:300]
    return f"{key.group(1)}: {cause}" if key and key.group(1) not in cause else cause
