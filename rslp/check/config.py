"""Check a run config: plan and make all its objects, also optimiser and scheduler, and look up names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Trainer
from rslearn.train.data_module import RslearnDataModule
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rslp.check.findings import Finding, listed, warning
from rslp.config import class_faults, head_faults, pick, without_effect
from rslp.config.datasets import DATA_MODULES
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.data.mixture.settings import check_fit
from rslp.errors import ConfigError, KeyPath, UserError
from rslp.models.optim import IDLE_ADAPTERS, Freeze, has_adapters
from rslp.models.restoring import weights_of
from rslp.suggest import did_you_mean, nearest
from rslp.train.balance import balance_faults
from rslp.train.build import plan_run, trainer_faults
from rslp.train.instantiate import CONSTRUCTOR_ERRORS, Call, Construction, argument_of, plan_call, problems
from rslp.train.module import JointModule
from rslp.train.quiet import silenced

_OPTIMIZER: KeyPath = ("model", "init_args", "optimizer")
_SCHEDULER: KeyPath = ("model", "init_args", "scheduler")
_CALLBACKS: KeyPath = ("trainer", "callbacks")
_LIMIT_VAL_BATCHES: KeyPath = ("trainer", "limit_val_batches")
_LOGGED = ("train_loss", "val_loss", "test_loss", "val/score", "val/score_loss", "epoch", "step")
# Settings of the trainer under which it can be made on any machine, whatever machine and logger the run is meant for.
_ANY_MACHINE: Mapping[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    # One process: without an environment of its own, Lightning looks for variables of clusters, which may be inherited.
    "plugins": [{"class_path": "rslp.train.strategy.RanksEnvironment"}],
    "logger": False,
}


@dataclass(frozen=True)
class ParsedConfig:
    """The objects that a run config describes.

    Attributes:
        modules: the data modules that could be made, by dataset.
        module: model and losses; None if they could not be made.
        findings: what is wrong with the config.
    """

    modules: Mapping[str, RslearnDataModule]
    module: JointModule | None
    findings: tuple[Finding, ...]


def parse(config: Mapping[str, Any]) -> ParsedConfig:
    """Make model, data modules and trainer of a run config.

    Args:
        config: the run config, its paths resolved.

    Returns:
        The objects, and everything that is wrong with the config.
    """
    faults = (*head_faults(config), *class_faults(config))
    heads = tuple(Finding(fault.what, fault.key_path) for fault in faults if not fault.harmless)
    found = (*trainer_faults(config.get("trainer")), *balance_faults(config))
    trainer = tuple(Finding(message, key_path) for key_path, message in found)
    parsed = _parse(config)
    # Constructors report some of these too, in words that are less clear.
    known = {finding.at for finding in trainer}
    others = tuple(finding for finding in parsed.findings if finding.at not in known)
    return replace(parsed, findings=(*others, *heads, *trainer, *_without_effect(config)))


def _without_effect(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Warn of arguments that have no effect in a joint run: once for each kind, at its first place."""
    for rule, key_paths in without_effect(config):
        more = f" (and in {len(key_paths) - 1} more places)" if len(key_paths) > 1 else ""
        yield warning(rule.message() + more, key_paths[0], id="no-effect")


def _parse(config: Mapping[str, Any]) -> ParsedConfig:
    planned, construction = plan_run(config), Construction()
    invalid = list(problems(planned))
    if isinstance(trainer := planned["trainer"], Call):
        anywhere = plan_call(Trainer, _ANY_MACHINE).arguments
        planned["trainer"] = replace(trainer, arguments={**trainer.arguments, **anywhere})
    with silenced():
        data, module, _ = (construction.make(planned[key]) for key in ("data", "model", "trainer"))
        if invalid := [*invalid, *construction.problems]:
            findings = dict.fromkeys(Finding(problem.what, problem.at) for problem in invalid)
            return ParsedConfig(_modules(construction), None, tuple(findings))
        return ParsedConfig(data.data_modules, module, tuple(_findings(data, module, config)))


def _modules(construction: Construction) -> dict[str, RslearnDataModule]:
    """The datasets that could be made, by key."""
    depth = len(DATA_MODULES)
    return {
        str(key_path[depth]): module
        for key_path, module in construction.objects.items()
        if isinstance(module, RslearnDataModule) and key_path[:depth] == DATA_MODULES and len(key_path) == depth + 2
    }


def _findings(data: MultiDatasetDataModule, module: JointModule, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Check objects that could all be made."""
    try:
        module.model.set_datasets(data.tasks())
    except ConfigError as error:
        yield from _findings_of(error)
    try:
        # With one window per dataset this checks only that options which name datasets name these.
        check_fit(dict.fromkeys(data.data_modules, 1), data.batch_sizes, data.mixture)
    except ConfigError as error:
        yield from (Finding(p.what, _data_key_path(config, argument_of(p.key))) for p in error.problems)
    yield from _restore_faults(module)
    yield from _optimizer_faults(config, module)
    yield from _callback_faults(config, module, data.tasks())


def _data_key_path(config: Mapping[str, Any], argument: KeyPath) -> KeyPath:
    """Where a config sets an argument of the outer data module; each dataset may set its own batch size."""
    key_path = ("data", "init_args", *argument)
    sizes = pick(config, ("data", "init_args", "batch_sizes"))
    if argument[:1] == ("batch_sizes",) and (not isinstance(sizes, Mapping) or argument[-1] not in sizes):
        return key_path[:3] if isinstance(sizes, int) else (*DATA_MODULES, argument[-1], "init_args", "batch_size")
    return key_path


def _findings_of(error: ConfigError, default: KeyPath = ()) -> list[Finding]:
    """A finding for each problem of an error, at its own key or else at the default one."""
    return [Finding(p.what, tuple(p.key.split(".")) if p.key else default) for p in error.problems]


def _restore_faults(module: JointModule) -> Iterator[Finding]:
    """Find weights to start from that are missing, or belong to another model."""
    try:
        if module.restore_config is not None:
            weights_of(module.restore_config, module.model)
    except ConfigError as error:
        yield from _findings_of(error)


def _optimizer_faults(config: Mapping[str, Any], module: JointModule) -> Iterator[Finding]:
    """Make optimiser and scheduler, and report why one can't be made; the module's weights stay as they are."""
    key_path = _OPTIMIZER
    try:
        optimizer = module.optimizer_factory.build(module)
        key_path = _SCHEDULER
        if module.scheduler_factory is not None:
            scheduler = module.scheduler_factory.build(optimizer)
            if isinstance(scheduler, ReduceLROnPlateau) and pick(config, _LIMIT_VAL_BATCHES) == 0:
                message = "a plateau scheduler follows the validation score, and there is no validation"
                yield Finding(message, _LIMIT_VAL_BATCHES)
    except ConfigError as error:
        yield from _findings_of(error, key_path)
    except (*CONSTRUCTOR_ERRORS, UserError) as error:
        reason = " ".join(str(error).split())[:300]
        argument = _quoted_argument(pick(config, (*key_path, "init_args")), reason)
        message = f"the {key_path[-1]} can't be made: {reason or type(error).__name__}"
        yield Finding(message, (*key_path, *argument))


def _quoted_argument(arguments: Any, message: str) -> KeyPath:
    """The first argument whose value a message quotes."""
    values = arguments if isinstance(arguments, Mapping) else {}
    quoted = [name for name, value in values.items() if len(str(value)) > 1 and str(value) in message]
    return ("init_args", quoted[0]) if quoted else ()


def _callback_faults(
    config: Mapping[str, Any], module: JointModule, tasks: Mapping[str, list[str]]
) -> Iterator[Finding]:
    callbacks = pick(config, _CALLBACKS)
    for position, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        arguments = callback.get("init_args") if isinstance(callback, Mapping) else None
        if not isinstance(arguments, Mapping):
            continue
        key_path = (*_CALLBACKS, position, "init_args")
        yield from _freeze_faults(str(callback.get("class_path")), arguments, module, key_path)
        if isinstance(monitor := arguments.get("monitor"), str):
            yield from _monitor_faults(monitor, tasks, (*key_path, "monitor"))


def _freeze_faults(
    class_path: str, arguments: Mapping[str, Any], module: JointModule, key_path: KeyPath
) -> Iterator[Finding]:
    """Find modules that a freezing callback names and the model lacks."""
    name = class_path.rpartition(".")[2]
    if name not in ("Freeze", "FreezeUnfreeze"):
        return
    key = "modules" if name == "Freeze" else "module_selector"
    given = arguments.get("modules") if name == "Freeze" else Freeze.settings_of(arguments)["modules"]
    known = [child for child, _ in module.named_modules() if child]
    for frozen in [given] if isinstance(given, str) else given or []:
        if frozen not in known:
            hint = did_you_mean(frozen, known) or f"; it has {listed([k for k in known if k.count('.') < 2])}"
            yield Finding(f"{name}: the model has no module {frozen!r}{hint}", (*key_path, key))
    thaw = arguments.get("thaw_at_epoch" if name == "Freeze" else "unfreeze_at_epoch")
    if thaw is None and has_adapters(module, [given] if isinstance(given, str) else given or []):
        yield Finding(f"{name}: {IDLE_ADAPTERS}", (*key_path, key))


def _monitor_faults(monitor: str, tasks: Mapping[str, list[str]], key_path: KeyPath) -> Iterator[Finding]:
    """Find a value that a callback follows and nothing logs."""
    prefixes = [f"{split}_{task}" for split in ("train", "val") for names in tasks.values() for task in names]
    prefixes += [f"{split}/{dataset}/" for split in ("train", "val") for dataset in tasks]
    if monitor in _LOGGED or monitor.startswith(tuple(prefixes)):
        return
    if near := nearest(monitor, [*_LOGGED, *prefixes], cutoff=0.7):
        hint = f"did you mean {near}{'…' if near in prefixes else ''}?"
        yield Finding(f"nothing logs {monitor!r}; {hint}", key_path)
    else:
        yield warning(f"a joint run does not log {monitor!r}; it logs val_loss, val/score, val/<dataset>/…", key_path)
