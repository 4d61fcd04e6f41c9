"""Check a run config: parse it with the run's own parser, make every class, optimiser and scheduler, look up names."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from rslearn.train.data_module import RslearnDataModule
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rslp import upstream
from rslp.check.config_errors import CONSTRUCTOR_ERRORS, argument_of, argument_problems, constructor_faults
from rslp.check.findings import Finding, listed, warning
from rslp.config import class_faults, head_faults, pick, without_effect
from rslp.config.datasets import DATA_MODULES
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.data.mixture.settings import check_fit
from rslp.errors import ConfigError, KeyPath, UserError
from rslp.models.optim import Freeze
from rslp.models.restoring import weights_of
from rslp.suggest import did_you_mean, nearest
from rslp.train.build import RunCLI, run_parser, trainer_faults
from rslp.train.module import JointModule
from rslp.train.quiet import silenced
from rslp.train.strategy import RanksEnvironment

_OPTIMIZER: KeyPath = ("model", "init_args", "optimizer")
_SCHEDULER: KeyPath = ("model", "init_args", "scheduler")
_CALLBACKS: KeyPath = ("trainer", "callbacks")
_LIMIT_VAL_BATCHES: KeyPath = ("trainer", "limit_val_batches")
_LOGGED = ("train_loss", "val_loss", "test_loss", "val/score", "val/score_loss", "epoch", "step")
# Settings of the trainer under which it can be made on any machine, whatever machine the run is meant for.
_ANY_MACHINE: Mapping[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    # One process: without an environment of its own, Lightning looks for variables of clusters, which may be inherited.
    "plugins": [{"class_path": "rslp.train.strategy.RanksEnvironment"}],
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


class CheckCLI(RunCLI):
    """The run's parser, with a trainer that does not need the run's hardware."""

    def before_instantiate_classes(self) -> None:
        """Replace the trainer's hardware settings and its logger."""
        for key, value in _ANY_MACHINE.items():
            self.config[f"trainer.{key}"] = [RanksEnvironment()] if key == "plugins" else value
        self.config["trainer.logger"] = False


def parse(config: Mapping[str, Any]) -> ParsedConfig:
    """Parse a run config and make model, data modules and trainer.

    Args:
        config: the run config, its paths resolved.

    Returns:
        The objects, and everything that is wrong with the config, deepest keys first.
    """
    faults = (*head_faults(config), *class_faults(config))
    heads = tuple(Finding(fault.what, fault.key_path) for fault in faults if not fault.harmless)
    trainer = tuple(Finding(message, key_path) for key_path, message in trainer_faults(config.get("trainer")))
    parsed = _parse(config)
    # The parser reports some of these too, in words that are less clear.
    known = {finding.at for finding in trainer}
    others = tuple(finding for finding in parsed.findings if finding.at not in known)
    return replace(parsed, findings=(*others, *heads, *trainer, *_without_effect(config)))


def _without_effect(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Warn of arguments that have no effect in a joint run: once for each kind, at its first place."""
    for rule, key_paths in without_effect(config):
        more = f" (and in {len(key_paths) - 1} more places)" if len(key_paths) > 1 else ""
        yield warning(rule.message() + more, key_paths[0], id="no-effect")


def _parse(config: Mapping[str, Any]) -> ParsedConfig:
    upstream.prepare_parser()
    with silenced():
        try:
            cli = _run_parser(config)
        except (argparse.ArgumentError, SystemExit, UserError, MisconfigurationException, *CONSTRUCTOR_ERRORS) as error:
            refusal: BaseException = error
        else:
            return _accepted(cli, config)
        # Outside of the handler: there this error would become the context of all that are raised next, and be
        # reported in their place (`as_user_error` looks for the user's mistake among the contexts).
        return _refused(config, refusal)


def _run_parser(config: Mapping[str, Any]) -> CheckCLI:
    noise = io.StringIO()
    with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise):
        # The parser writes into the config that it gets.
        return run_parser(copy.deepcopy(dict(config)), CheckCLI)


def _accepted(cli: CheckCLI, config: Mapping[str, Any]) -> ParsedConfig:
    """Check the objects that the parser made."""
    findings = []
    data, module = cli.datamodule, cli.model
    for key, value, wanted in (("data", data, MultiDatasetDataModule), ("model", module, JointModule)):
        if not isinstance(value, wanted):
            message = f"{type(value).__name__} can't train on several datasets; use rslp.train.{wanted.__name__}"
            findings.append(Finding(message, (key, "class_path")))
    if findings:
        return ParsedConfig({}, None, tuple(findings))
    try:
        module.model.set_datasets(data.tasks())
    except ConfigError as error:
        findings = _findings_of(error)
    try:
        # With one window per dataset this checks only that options which name datasets name these.
        check_fit(dict.fromkeys(data.data_modules, 1), data.batch_sizes, data.mixture)
    except ConfigError as error:
        findings += [Finding(p.what, _data_key_path(config, argument_of(p.key))) for p in error.problems]
    findings += [*_restore_faults(module), *_optimizer_faults(config, module)]
    findings += _callback_faults(config, module, data.tasks())
    return ParsedConfig(data.data_modules, module, tuple(findings))


def _data_key_path(config: Mapping[str, Any], argument: KeyPath) -> KeyPath:
    """Where a config sets an argument of the outer data module; each dataset may set its own batch size."""
    key_path = ("data", "init_args", *argument)
    sizes = pick(config, ("data", "init_args", "batch_sizes"))
    if argument[:1] == ("batch_sizes",) and (not isinstance(sizes, Mapping) or argument[-1] not in sizes):
        return key_path[:3] if isinstance(sizes, int) else (*DATA_MODULES, argument[-1], "init_args", "batch_size")
    return key_path


def _refused(config: Mapping[str, Any], error: BaseException) -> ParsedConfig:
    """Find everything that is wrong with a config that the parser refused, and make the data modules that are right."""
    findings: list[Finding] = []
    objects: dict[KeyPath, Any] = {}
    kinds = {"model": L.LightningModule, "data": L.LightningDataModule, "trainer": Trainer}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), Mapping):
            continue
        problems = argument_problems(config[key], kind, (key,))
        part = {**config[key], **_ANY_MACHINE, "logger": False} if key == "trainer" else config[key]
        raised, parts = constructor_faults(part, kind, (key,))
        known = {finding.at for finding in problems}
        findings += [*problems, *(finding for finding in raised if finding.at not in known)]
        objects |= parts
    depth = len(DATA_MODULES)
    modules = {
        str(key_path[depth]): module
        for key_path, module in objects.items()
        if isinstance(module, RslearnDataModule) and key_path[:depth] == DATA_MODULES and len(key_path) == depth + 2
    }
    return ParsedConfig(modules, None, tuple(findings) or (_parser_finding(config, error),))


def _parser_finding(config: Mapping[str, Any], error: BaseException) -> Finding:
    """The last line of the parser's message, at the key of the config that it quotes."""
    lines = [line.strip(" -\t") for line in str(error).splitlines() if line.strip(" -\t")]
    message = lines[-1][:300] if lines else type(error).__name__
    quoted = [key for key in config if f"'{key}'" in message or f'"{key}"' in message]
    return Finding(message, tuple(quoted[:1]))


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
