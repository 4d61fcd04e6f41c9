"""What only the first step or the first epoch would find: optimiser, scheduler, frozen modules, watched values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from rslp.check.findings import Finding, KeyPath, listed, warning
from rslp.check.making import MADE_WRONG
from rslp.compose import pick
from rslp.errors import ConfigError, UserError
from rslp.suggest import did_you_mean, nearest
from rslp.train.freezing import Freeze
from rslp.train.module import JointModule
from rslp.train.restoring import weights_of

_OPTIMIZER: KeyPath = ("model", "init_args", "optimizer")
_SCHEDULER: KeyPath = ("model", "init_args", "scheduler")
_CALLBACKS: KeyPath = ("trainer", "callbacks")
_NO_VALIDATION: KeyPath = ("trainer", "limit_val_batches")
_LOGGED = ("train_loss", "val_loss", "test_loss", "val/score", "val/score_loss", "epoch", "step")


def training_faults(config: Mapping[str, Any], module: JointModule, tasks: Mapping[str, list[str]]) -> list[Finding]:
    """Make optimiser and scheduler, and look up what callbacks name.

    Args:
        config: the run config.
        module: the module that was made from it; its weights are left as they are.
        tasks: the tasks of each dataset.
    """
    return [*_restore_faults(module), *_optimizer_faults(config, module), *_callback_faults(config, module, tasks)]


def _restore_faults(module: JointModule) -> Iterator[Finding]:
    """Weights to start from that are not there, or are of another model."""
    try:
        if module.restore_config is not None:
            weights_of(module.restore_config, module.model)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding(problem.what, tuple(problem.key.split(".")))


def _optimizer_faults(config: Mapping[str, Any], module: JointModule) -> Iterator[Finding]:
    place = _OPTIMIZER
    try:
        optimizer = module.optimizer_factory.build(module)
        place = _SCHEDULER
        if module.scheduler_factory is not None:
            scheduler = module.scheduler_factory.build(optimizer)
            if isinstance(scheduler, ReduceLROnPlateau) and pick(config, ("trainer", "limit_val_batches")) == 0:
                yield Finding(
                    "a plateau scheduler follows the validation score, and there is no validation", _NO_VALIDATION
                )
    except ConfigError as error:
        for problem in error.problems:
            yield Finding(problem.what, tuple(problem.key.split(".")) if problem.key else place)
    except (*MADE_WRONG, UserError) as error:
        what = " ".join(str(error).split())[:300]
        at = (*place, *_quoted(pick(config, (*place, "init_args")), what))
        yield Finding(f"the {place[-1]} can't be made: {what or type(error).__name__}", at)


def _quoted(arguments: Any, message: str) -> KeyPath:
    """The argument whose value a message quotes."""
    values = arguments if isinstance(arguments, Mapping) else {}
    found = [name for name, value in values.items() if len(str(value)) > 1 and str(value) in message]
    return ("init_args", found[0]) if found else ()


def _callback_faults(
    config: Mapping[str, Any], module: JointModule, tasks: Mapping[str, list[str]]
) -> Iterator[Finding]:
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    for position, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        arguments = callback.get("init_args") if isinstance(callback, Mapping) else None
        if not isinstance(arguments, Mapping):
            continue
        at = (*_CALLBACKS, position, "init_args")
        yield from _frozen(str(callback.get("class_path")), arguments, module, at)
        if isinstance(watched := arguments.get("monitor"), str):
            yield from _watched(watched, tasks, (*at, "monitor"))


def _frozen(path: str, arguments: Mapping[str, Any], module: JointModule, at: KeyPath) -> Iterator[Finding]:
    """Modules that a freezing callback names, and the model has not."""
    name = path.rpartition(".")[2]
    if name not in ("Freeze", "FreezeUnfreeze"):
        return
    key = "modules" if name == "Freeze" else "module_selector"
    given = arguments.get("modules") if name == "Freeze" else Freeze.settings_of(arguments)["modules"]
    known = [inside for inside, _ in module.named_modules() if inside]
    for modules in [given] if isinstance(given, str) else given or []:
        if modules not in known:
            hint = did_you_mean(modules, known) or f"; it has {listed([k for k in known if k.count('.') < 2])}"
            yield Finding(f"{name}: the model has no module {modules!r}{hint}", (*at, key))


def _watched(name: str, tasks: Mapping[str, list[str]], at: KeyPath) -> Iterator[Finding]:
    """A value that a callback follows, and nothing logs."""
    starts = [f"{split}_{task}" for split in ("train", "val") for names in tasks.values() for task in names]
    starts += [f"{split}/{dataset}/" for split in ("train", "val") for dataset in tasks]
    if name in _LOGGED or any(name.startswith(start) for start in starts):
        return
    if near := nearest(name, [*_LOGGED, *starts], cutoff=0.7):
        yield Finding(f"nothing logs {name!r}; did you mean {near}{'…' if near in starts else ''}?", at)
    else:
        yield warning(f"nothing of a joint run logs {name!r}; it logs val_loss, val/score, val/<dataset>/…", at)
