"""From the config in a run directory to its trainer, model and data module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from rslearn.train.callbacks.freeze_unfreeze import FreezeUnfreeze
from rslearn.train.prediction_writer import RslearnWriter

from rslp import upstream
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import ConfigError, KeyPath, Problem, dotted
from rslp.io import Document, read_yaml, resolve_paths
from rslp.models.optim import Freeze
from rslp.rundir import RunDir
from rslp.runtime.class_paths import refuse_untrusted
from rslp.runtime.extras import refuse_absent
from rslp.runtime.seeds import seeded, stable_seed
from rslp.runtime.world import read_world
from rslp.suggest import did_you_mean
from rslp.train.balance import balance_faults
from rslp.train.callbacks import MetricsLog
from rslp.train.checkpoints import RunCheckpoints
from rslp.train.instantiate import Construction, Invalid, plan, plan_call, problems
from rslp.train.module import JointModule
from rslp.train.quiet import RunProgress, quiet_libraries
from rslp.train.strategy import trainer_for_world
from rslp.train.trackers import CLASSES

# Defaults of the trainer in every run; the run config may change them.
TRAINER_DEFAULTS = {
    # The batch sampler already gives each rank its own batches.
    "use_distributed_sampler": False,
    # Lightning's two validation batches before training would delay the first step.
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
# The classes of a run config's parts, or subclasses of them.
_PARTS: dict[str, type] = {"model": JointModule, "data": MultiDatasetDataModule}
# Types of a run config's other keys, beside the trainer's.
OWN_KEYS: dict[str, Any] = {
    "rslp_project": str | None,
    "rslp_experiment": str | None,
    "rslp_description": str | None,
    # Trackers that get the run's metrics, see rslp.train.trackers.
    "rslp_trackers": list[str] | None,
    "seed": int,
    # Lightning's; it changes the initial weights alone, and the rest of a run is seeded by `seed`.
    "seed_everything": bool | int,
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
    """Make the objects of the run config.

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
    if training:
        faults = [*trainer_faults(config.get("trainer")), *balance_faults(config)]
        _refuse([Invalid(message, key_path) for key_path, message in faults], document)
    world = read_world(os.environ)
    quiet_libraries(world)
    # Lightning would guess the rank from environment variables, which may come from another job.
    rank_zero_only.rank = world.rank  # type: ignore[attr-defined]
    refuse_untrusted(config, [document])
    planned = plan_run(_for_run(config, run=run, training=training, predicting=predicting))
    _refuse(problems(planned), document)
    construction = Construction()
    # Initial weights that are not loaded are drawn from the run's seed.
    with seeded(stable_seed(config.get("seed", 0), "weights")):
        if (given := planned.get("seed_everything", False)) is not False:
            seed_everything(None if given is True else given, workers=True, verbose=False)
        made = {key: construction.make(planned[key]) for key in ("model", "data", "trainer")}
        _refuse(construction.problems, document)
        parts = InstantiatedRun(made["model"], made["data"], made["trainer"], seed=planned.get("seed", 0))
        # Here, and not in the training: weights of a checkpoint are loaded before it, also those of datasets' adapters.
        parts.model.model.set_datasets(parts.datamodule.tasks())
    # The mixture accumulates instead of Lightning, which would not weight batches by their loss denominators.
    parts.datamodule.accumulate(parts.trainer.accumulate_grad_batches)
    parts.trainer.accumulate_grad_batches = 1
    parts.datamodule.seed = parts.model.seed = parts.seed
    parts.datamodule.frozen.describe(config)
    _leave_room_for_workers(parts.datamodule.num_workers)
    _checkpoints_first(parts.trainer)
    upstream.average_numbers_alone(_callbacks(parts.trainer))
    return parts


def plan_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Plan the objects of a run config.

    Args:
        config: the config, its paths resolved.

    Returns:
        The plan of each key; ``problems`` lists what is wrong with it.
    """
    known = (*_PARTS, "trainer", *OWN_KEYS)
    planned = {key: plan_part(config, key) for key in _PARTS}
    trainer = config.get("trainer") or {}
    if isinstance(trainer, Mapping):
        planned["trainer"] = plan_call(Trainer, {**TRAINER_DEFAULTS, **trainer}, ("trainer",))
    else:
        planned["trainer"] = Invalid(f"expected arguments of the trainer; got {trainer!r}", ("trainer",))
    for key in [key for key in config if key not in planned]:
        unknown = Invalid(f"unknown key{did_you_mean(key, known, otherwise='known')}", (key,))
        planned[key] = plan(config[key], OWN_KEYS[key], (key,)) if key in OWN_KEYS else unknown
    return planned


def plan_part(config: Mapping[str, Any], key: str) -> Any:
    """Plan the ``model`` or the ``data`` of a run config."""
    kind = _PARTS[key]
    if config.get(key) is None:
        return Invalid(f"is missing; name rslp.train.{kind.__name__} with its arguments", (key,))
    planned = plan(config[key], kind, (key,))
    if isinstance(planned, Invalid) and planned.at == (key,) and isinstance(config[key], Mapping):
        name = str(config[key].get("class_path")).rpartition(".")[2]
        return Invalid(f"{name} can't train on several datasets; use rslp.train.{kind.__name__}", (key, "class_path"))
    return planned


def build_data(config: Mapping[str, Any], document: Document) -> MultiDatasetDataModule:
    """Make the data module of a run config alone.

    Args:
        config: the config, its paths resolved.
        document: its file, for messages.

    Raises:
        ConfigError: the section ``data`` is invalid.
    """
    data: MultiDatasetDataModule = _build_part(config, "data", document)
    return data


def build_model(config: Mapping[str, Any], document: Document) -> JointModule:
    """Make the model of a run config alone; arguments as of ``build_data``.

    Raises:
        ConfigError: the section ``model`` is invalid.
    """
    model: JointModule = _build_part(config, "model", document)
    return model


def _build_part(config: Mapping[str, Any], key: str, document: Document) -> Any:
    planned, construction = plan_part(config, key), Construction()
    _refuse(problems(planned), document)
    made = construction.make(planned)
    _refuse(construction.problems, document)
    return made


def _refuse(invalid: Iterable[Invalid], document: Document) -> None:
    """Raise ``ConfigError`` if there are any problems."""
    found = [Problem(p.what, document.name, document.nearest_line(p.at), dotted(p.at)) for p in invalid]
    if found:
        raise ConfigError(dict.fromkeys(found))


def config_for(run: RunDir, *, predicting: bool) -> Path:
    """The path of the config that a job reads: the prediction's own if there is one, otherwise the run's."""
    prediction = run.config_of("predict")
    return prediction if predicting and prediction.is_file() else run.config


def _leave_room_for_workers(workers: int) -> None:
    """Limit torch's threads to the processors that loader workers leave free; oversubscribed threads are slow."""
    if "OMP_NUM_THREADS" not in os.environ:
        processors = len(os.sched_getaffinity(0)) // read_world(os.environ).local_size
        torch.set_num_threads(max(1, processors - workers))


def _for_run(config: Mapping[str, Any], *, run: RunDir, training: bool, predicting: bool = False) -> dict[str, Any]:
    """The config with the run's logger and callbacks added to its trainer."""
    if not isinstance(config.get("trainer") or {}, Mapping):
        return dict(config)
    trainer = trainer_for_world(config.get("trainer") or {}, read_world(os.environ))
    callbacks = _as_list(trainer.get("callbacks"))
    # RslearnWriter looks up the path of a single dataset in the config, which only a prediction provides.
    writers = [callback for callback in callbacks if _is_class(callback, RslearnWriter)]
    if training:
        callbacks = [callback for callback in callbacks if callback not in writers]
        callbacks = [_adapted(callback, folder=run.checkpoints) for callback in callbacks]
        if not any(_is_class(callback, RunCheckpoints) for callback in callbacks):
            callbacks.append({"class_path": _path_of(RunCheckpoints), "init_args": {"run_dir": str(run.path)}})
        log = {"class_path": _path_of(MetricsLog), "init_args": {"path": str(run.metrics)}}
        trackers = config.get("rslp_trackers") or []
        refuse_absent(trackers)
        tracked = [
            {"class_path": _path_of(CLASSES[name]), "init_args": {"run_dir": str(run.path)}} for name in trackers
        ]
        trainer["logger"] = [log, *tracked, *_as_list(trainer.get("logger"))]
    else:
        callbacks, trainer["logger"] = writers if predicting else [], False
        trainer["enable_checkpointing"] = False
    shown = trainer.get("enable_progress_bar") is not False
    if shown and not any("ProgressBar" in _class_name(callback) for callback in callbacks):
        callbacks.append({"class_path": _path_of(RunProgress)})
    trainer |= {"callbacks": callbacks, "default_root_dir": str(run.path)}
    return {**config, "trainer": trainer}


def _adapted(callback: Any, *, folder: Path) -> Any:
    """A callback of a config, adapted to a run directory.

    ModelCheckpoint writes no ``last.ckpt``, which is that of ``RunCheckpoints``; FreezeUnfreeze becomes ``Freeze``.
    """
    init_args = callback.get("init_args") or {} if isinstance(callback, Mapping) else {}
    if _is_class(callback, ModelCheckpoint):
        return {
            "class_path": _path_of(ModelCheckpoint),
            "init_args": {"dirpath": str(folder), **init_args, "save_last": False},
        }
    if _is_class(callback, FreezeUnfreeze) and not set(init_args) - set(signature(FreezeUnfreeze).parameters):
        return {"class_path": _path_of(Freeze), "init_args": Freeze.settings_of(init_args)}
    return callback


def _is_class(callback: Any, kind: type) -> bool:
    return _class_name(callback) == kind.__name__


def _class_name(callback: Any) -> str:
    path = callback.get("class_path") if isinstance(callback, Mapping) else callback
    return str(path).rpartition(".")[2]


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _as_list(value: Any) -> list[Any]:
    """The callbacks or loggers of a config, which may give one, several or none."""
    return [] if value in (None, True, False) else list(value) if isinstance(value, list) else [value]


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
        For each fault its key path in the run config, and a message that says what to do instead.
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
        if (name := _class_name(callback)) in _CALLBACKS:
            faults.append((("trainer", "callbacks", position), f"{name} is not supported: {_CALLBACKS[name]}"))
    return faults
