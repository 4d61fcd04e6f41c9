"""From a run directory's config to trainer, model and data: the one parser that every run goes through."""

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
from rslp.data.samples import seeded, stable_seed
from rslp.errors import ConfigError, KeyPath, Problem, UserError, chain, dotted
from rslp.io import read_yaml, resolve_paths
from rslp.models.optim import Freeze
from rslp.rundir import RunDir
from rslp.runtime.class_paths import refuse_untrusted
from rslp.runtime.world import read_world
from rslp.train.callbacks import MetricsLog
from rslp.train.checkpoints import RunCheckpoints
from rslp.train.instantiate import AmbiguousValue, PlannedCall, construct, plan_call, plan_value
from rslp.train.module import JointModule
from rslp.train.quiet import RunProgress, quiet_libraries
from rslp.train.strategy import trainer_for_world

_OWN = "is not supported: a run writes checkpoints, metrics and its progress by itself; leave it out"
_NOTHING = "means that nothing is trained; helios check looks at a config without a run"
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
# Callbacks that can't do in a joint run what they are for.
_CALLBACKS = {
    "BatchSizeFinder": "a run has a batch size for each dataset: set `batch_sizes` of the data module",
    "LearningRateFinder": "the learning rate is the optimizer's: set `lr` of `model.init_args.optimizer`",
    "GradientAccumulationScheduler": "the length of a step is part of the mixture: set `accumulate_grad_batches`",
    "StochasticWeightAveraging": "its average is never validated, so that no best checkpoint could hold it; "
    "WeightAveraging and EMAWeightAveraging validate theirs",
}


def trainer_faults(trainer: Any) -> list[tuple[KeyPath, str]]:
    """What a run refuses of the ``trainer`` section of its config.

    Args:
        trainer: the section.

    Returns:
        For each fault its key path in the run config, and what is wrong with what to do instead.
    """
    if not isinstance(trainer, Mapping):
        return []
    faults: list[tuple[KeyPath, str]] = [
        (("trainer", key), f"{trainer[key]} {what}") for key, wrong, what in _REFUSED if wrong(trainer.get(key))
    ]
    callbacks = trainer.get("callbacks")
    for position, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        name = str(callback.get("class_path") if isinstance(callback, Mapping) else "").rpartition(".")[2]
        if name in _CALLBACKS:
            faults.append((("trainer", "callbacks", position), f"{name} is not supported: {_CALLBACKS[name]}"))
    return faults


_log = logging.getLogger(__name__)
# What constructors raise at arguments that they do not like; the parser finds the words for it.
_REFUSALS = (
    *(ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError, OSError, ImportError),
    MisconfigurationException,
)
_PARTS = {"trainer", "model", "data"}


@dataclass(frozen=True)
class InstantiatedRun:
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


def instantiate_directly(
    config: Mapping[str, Any], *, trainer_defaults: Mapping[str, Any], own_keys: Mapping[str, Any]
) -> InstantiatedRun | None:
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
    except AmbiguousValue as unsure:
        _log.debug("the config is left to the parser: %s", unsure)
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
    # The command line always hands a list of callbacks on.
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


# What every run needs of the trainer, unless its config says otherwise.
TRAINER_DEFAULTS = {
    # The batch sampler already gives each process its share.
    "use_distributed_sampler": False,
    # A check of two validation batches before training would only delay the first step.
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
# The keys of a run config beside model, data and trainer.
OWN_KEYS: dict[str, Any] = {
    "rslp_project": str | None,
    "rslp_experiment": str | None,
    "rslp_description": str | None,
    "seed": int,
}

# A None that a union also tried is never the cause.
_TELLING = re.compile(
    r"does not accept|[Nn]ot a valid|Expected (?!a <class 'NoneType'>)|[Uu]nable to import|is required|[Uu]nexpected"
    r"|[Nn]o module|must be|has no attribute|[Ii]mport"
)


class RunCLI(LightningCLI):
    """Lightning's parser and instantiator, for the keys that run configs carry beside model, data and trainer."""

    model: JointModule
    datamodule: MultiDatasetDataModule
    trainer: Trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the config as it is; Lightning would also look at the process's command line, which is not ours."""
        self._numbers = {key: value for key, value in (args.get("trainer") or {}).items() if type(value) is int}
        self.config = parser.parse_object(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; a whole number in its config stays one.

        Of a union, the parser takes the first kind of number, which depends on what was imported before: 1 batch would
        become 1.0, all batches.
        """
        parsed = self.config_init["trainer"]
        whole = {key: value for key, value in self._numbers.items() if type(parsed.get(key)) is float}
        return super().instantiate_trainer(**whole, **kwargs)

    def _dump_config(self) -> None:
        """Lightning would write the parsed config out again as hyperparameters; the run directory holds it already."""
        self.config_dump: dict[str, Any] = {}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept the run's own keys, and set what every run needs of the trainer."""
        for key, kind in OWN_KEYS.items():
            parser.add_argument(f"--{key}", type=kind, default=0 if kind is int else None)
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})


CLI = TypeVar("CLI", bound=RunCLI)


def build(run: RunDir, *, training: bool, predicting: bool = False) -> InstantiatedRun:
    """Make everything in a run's config: directly if it has only one reading, or else by the parser.

    Args:
        run: the run directory; its ``config.yaml`` is the only file that is parsed.
        training: whether metrics and checkpoints are to be written.
        predicting: whether it is to predict: the config of the prediction is parsed, if there is one, and of the
            callbacks those that write predictions are kept.

    Raises:
        ConfigError: the config is missing, or does not describe a joint run.
    """
    path = config_for(run, predicting=predicting)
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise ConfigError(Problem("is no run config: it holds no mapping", file=str(path)))
    config = resolve_paths(document.data, run.path, name=document.name, line=document.line)
    if training and (faults := trainer_faults(config.get("trainer"))):
        raise ConfigError(
            Problem(what, file=document.name, line=document.nearest_line(at), key=dotted(at)) for at, what in faults
        )
    world = read_world(os.environ)
    quiet_libraries(world)
    # Lightning guesses it from variables that may be inherited from a job that is not ours.
    rank_zero_only.rank = world.rank  # type: ignore[attr-defined]
    refuse_untrusted(config, [document])
    upstream.prepare_parser()
    described = deepcopy(config)  # the parser writes into what it is given
    # Weights that are drawn, not loaded, belong to the run's randomness too.
    with seeded(weights := stable_seed(config.get("seed", 0), "weights")):
        whole = _for_run(config, run=run, training=training, predicting=predicting)
        made = instantiate_directly(whole, trainer_defaults=TRAINER_DEFAULTS, own_keys=OWN_KEYS)
    if made is None:
        with seeded(weights):
            made = _parse(whole, name=path)
    # Lightning's accumulation knows no counts, so the mixture takes it over.
    made.datamodule.accumulate(made.trainer.accumulate_grad_batches)
    made.trainer.accumulate_grad_batches = 1
    made.datamodule.seed = made.model.seed = made.seed
    made.datamodule.frozen.describe(described)
    _leave_room_for_workers(made.datamodule.num_workers)
    _checkpoints_first(made.trainer)
    upstream.average_numbers_alone(_callbacks(made.trainer))
    return made


def config_for(run: RunDir, *, predicting: bool) -> Path:
    """The config that a job reads: a prediction's own, if there is one, or that of the run."""
    own = run.config_of("predict")
    return own if predicting and own.is_file() else run.config


def _leave_room_for_workers(workers: int) -> None:
    """Give torch the processors that reading does not need: threads that wait for each other cost more than they do."""
    if "OMP_NUM_THREADS" not in os.environ:
        processors = len(os.sched_getaffinity(0)) // read_world(os.environ).local_size
        torch.set_num_threads(max(1, processors - workers))


def _for_run(config: Mapping[str, Any], *, run: RunDir, training: bool, predicting: bool = False) -> dict[str, Any]:
    """The config with the run's logger and callbacks put into its trainer."""
    trainer = trainer_for_world(config.get("trainer") or {}, read_world(os.environ))
    callbacks = list(trainer.get("callbacks") or [])
    # It looks for one dataset's path wherever it is, and has nothing to do but in a prediction.
    writers = [callback for callback in callbacks if _is_class(callback, RslearnWriter)]
    if training:
        callbacks = [callback for callback in callbacks if callback not in writers]
        callbacks = [_taken_over(callback, folder=run.checkpoints) for callback in callbacks]
        if not any(_is_class(callback, RunCheckpoints) for callback in callbacks):
            callbacks.append({"class_path": _path_of(RunCheckpoints), "init_args": {"run_dir": str(run.path)}})
        log = {"class_path": _path_of(MetricsLog), "init_args": {"path": str(run.metrics)}}
        asked = trainer.get("logger")
        trainer["logger"] = [log, *_as_list(asked)]
    else:
        callbacks, trainer["logger"] = writers if predicting else [], False
        trainer["enable_checkpointing"] = False
    shown = trainer.get("enable_progress_bar") is not False
    if shown and not any("ProgressBar" in str(callback.get("class_path")) for callback in callbacks):
        callbacks.append({"class_path": _path_of(RunProgress)})
    trainer |= {"callbacks": callbacks, "default_root_dir": str(run.path)}
    return {**config, "trainer": trainer}


def _taken_over(callback: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """An existing config's callback, doing what it always meant.

    ModelCheckpoint's files lie beside ours, and ``last.ckpt`` is ours; FreezeUnfreeze is our ``Freeze``.
    """
    init_args = callback.get("init_args") or {}
    if _is_class(callback, ModelCheckpoint):
        return {**callback, "init_args": {"dirpath": str(folder), **init_args, "save_last": False}}
    if _is_class(callback, FreezeUnfreeze) and not set(init_args) - set(signature(FreezeUnfreeze).parameters):
        return {"class_path": _path_of(Freeze), "init_args": Freeze.settings_of(init_args)}
    return callback


def _is_class(callback: Mapping[str, Any], wanted: type) -> bool:
    return str(callback.get("class_path", "")).rpartition(".")[2] == wanted.__name__


def _path_of(wanted: type) -> str:
    return f"{wanted.__module__}.{wanted.__qualname__}"


def _as_list(logger: Any) -> list[Any]:
    return [] if logger in (None, True, False) else logger if isinstance(logger, list) else [logger]


def _checkpoints_first(trainer: Trainer) -> None:
    """Lightning puts checkpoint callbacks last; ours has to see an epoch's start before any callback changes it."""
    ours = [callback for callback in _callbacks(trainer) if isinstance(callback, RunCheckpoints)]
    trainer.callbacks = [*ours, *(c for c in _callbacks(trainer) if c not in ours)]  # type: ignore[attr-defined]


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _parse(config: dict[str, Any], *, name: Path) -> InstantiatedRun:
    """Run Lightning's parser; its pages of context are cut to the cause.

    Raises:
        ConfigError: what the parser found, without its listing of the whole config; or model or data are not ours.
    """
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            cli = run_parser(config, RunCLI)
    except (argparse.ArgumentError, SystemExit) as error:
        raise ConfigError(Problem(_cause(noise.getvalue() or str(error)), file=str(name))) from error
    except (ValueError, TypeError, MisconfigurationException) as error:
        # jsonargparse wraps what a constructor raises into listings of everything that it tried.
        if (cause := as_user_error(error)) is not None:
            raise cause from None
        if (refusal := _refusal(error)) is None:
            raise
        raise ConfigError(Problem(refusal, file=str(name))) from error
    for what, got, wanted in (("data", cli.datamodule, MultiDatasetDataModule), ("model", cli.model, JointModule)):
        if not isinstance(got, wanted):
            message = f"{type(got).__name__} can't train on several datasets; use rslp.train.{wanted.__name__}"
            raise ConfigError(Problem(message, file=str(name), key=f"{what}.class_path"))
    return InstantiatedRun(model=cli.model, datamodule=cli.datamodule, trainer=cli.trainer, seed=cli.config.seed)


def run_parser(config: dict[str, Any], cls: type[CLI]) -> CLI:
    """Parse a config as a run does and make everything in it.

    Args:
        config: the config; the parser writes into it.
        cls: the command line to use, ``RunCLI`` or one made from it.
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
    """The user's mistake at the root of an exception, if it is one; the parser wraps what a constructor raises."""
    return next((one for one in chain(error) if isinstance(one, UserError)), None)


def _refusal(error: BaseException) -> str | None:
    """What a library says of arguments that its constructor refuses; None where the fault may be ours."""
    *_, error = chain(error)
    frames = traceback.extract_tb(error.__traceback__)
    ours = not frames or Path(frames[-1].filename).is_relative_to(Path(rslp.__file__).parent)
    refused = isinstance(error, ValueError | TypeError | MisconfigurationException) and not ours
    return f"{frames[-1].name}: {_cause(str(error))}" if refused else None


def _cause(message: str) -> str:
    """The line of jsonargparse's message that says what is wrong: the deepest of those that tell."""
    key = re.search(r"[Pp]arser key \"([\w.+]+)\"", message)
    lines = [line.strip(" -\t") for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    what = (telling or lines or ["can't be parsed"])[-1][:300]
    return f"{key.group(1)}: {what}" if key and key.group(1) not in what else what
