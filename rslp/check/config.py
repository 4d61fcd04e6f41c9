"""Is a run config sound? Parsed by the run's own parser, every class made, and what only the first step would find."""

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
from rslp.check.config_errors import MADE_WRONG, argument_of, argument_problems, constructor_faults
from rslp.check.findings import Finding, listed, warning
from rslp.config import class_faults, head_faults, pick, without_effect
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


DATA_MODULES: KeyPath = ("data", "init_args", "data_modules")
# What a laptop lacks of the machine that the run is meant for.
_HERE: Mapping[str, Any] = {
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
    """What a run config describes.

    Attributes:
        modules: the data modules that could be made, by dataset.
        module: model and losses; None if they could not be made.
        findings: what is wrong with the config.
    """

    modules: Mapping[str, RslearnDataModule]
    module: JointModule | None
    findings: tuple[Finding, ...]


class CheckCLI(RunCLI):
    """The run's parser; what it makes does not need the run's hardware."""

    def before_instantiate_classes(self) -> None:
        """Keep what was parsed, and make a trainer that exists everywhere."""
        for key, value in _HERE.items():
            self.config[f"trainer.{key}"] = [RanksEnvironment()] if key == "plugins" else value
        self.config["trainer.logger"] = False


def parse(config: Mapping[str, Any]) -> ParsedConfig:
    """Parse a run config and make model, data modules and trainer.

    Args:
        config: the run config, its paths resolved.

    Returns:
        What was made, and every fault that was found, deepest keys first.
    """
    faults = (*head_faults(config), *class_faults(config))
    heads = tuple(Finding(fault.what, fault.key_path) for fault in faults if not fault.harmless)
    trainer = tuple(Finding(what, at) for at, what in trainer_faults(config.get("trainer")))
    parsed = _parsed(config)
    # The parser has words of its own for some of these.
    known = {finding.at for finding in trainer}
    found = tuple(finding for finding in parsed.findings if finding.at not in known)
    return replace(parsed, findings=(*found, *heads, *trainer, *_remarks(config)))


def _remarks(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Arguments that no joint run acts on; each kind once, at the first place."""
    for rule, places in without_effect(config):
        more = f" (and in {len(places) - 1} more places)" if len(places) > 1 else ""
        yield warning(rule.message() + more, places[0], id="no-effect")


def _parsed(config: Mapping[str, Any]) -> ParsedConfig:
    upstream.prepare_parser()
    with silenced():
        failure = "the config can't be parsed"
        try:
            cli = _run_parser(config)
        except (argparse.ArgumentError, SystemExit, UserError, MisconfigurationException, *MADE_WRONG) as error:
            failure = _short(error)
        else:
            return _accepted(cli, config)
        return _refused(config, failure)


def _run_parser(config: Mapping[str, Any]) -> CheckCLI:
    noise = io.StringIO()
    with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise):
        # The parser writes into what it is given.
        return run_parser(copy.deepcopy(dict(config)), CheckCLI)


def _accepted(cli: CheckCLI, config: Mapping[str, Any]) -> ParsedConfig:
    findings = []
    data, module = cli.datamodule, cli.model
    for what, got, wanted in (("data", data, MultiDatasetDataModule), ("model", module, JointModule)):
        if not isinstance(got, wanted):
            message = f"{type(got).__name__} can't train on several datasets; use rslp.train.{wanted.__name__}"
            findings.append(Finding(message, (what, "class_path")))
    if findings:
        return ParsedConfig({}, None, tuple(findings))
    try:
        module.model.set_datasets(data.tasks())
    except ConfigError as error:
        findings = [Finding(problem.what, tuple(problem.key.split("."))) for problem in error.problems]
    try:
        # Whether there are windows is another question: here it is whether all that names datasets names these.
        check_fit(dict.fromkeys(data.data_modules, 1), data.batch_sizes, data.mixture)
    except ConfigError as error:
        findings += [Finding(p.what, _data_place(config, argument_of(p.key))) for p in error.problems]
    findings += training_faults(config, module, data.tasks())
    return ParsedConfig(data.data_modules, module, tuple(findings))


def _data_place(config: Mapping[str, Any], argument: KeyPath) -> KeyPath:
    """Where a config sets an argument of the outer data module; batch sizes may be each dataset's own."""
    at = ("data", "init_args", *argument)
    given = pick(config, ("data", "init_args", "batch_sizes"))
    if argument[:1] == ("batch_sizes",) and (not isinstance(given, Mapping) or argument[-1] not in given):
        return at[:3] if isinstance(given, int) else (*DATA_MODULES, argument[-1], "init_args", "batch_size")
    return at


def _refused(config: Mapping[str, Any], failure: str) -> ParsedConfig:
    findings: list[Finding] = []
    made: dict[KeyPath, Any] = {}
    known = {"model": L.LightningModule, "data": L.LightningDataModule, "trainer": Trainer}
    for key, kind in known.items():
        if not isinstance(config.get(key), Mapping):
            continue
        found = argument_problems(config[key], kind, (key,))
        part = {**config[key], **_HERE, "logger": False} if key == "trainer" else config[key]
        raised, parts = constructor_faults(part, kind, (key,))
        seen = {finding.at for finding in found}
        findings += [*found, *(finding for finding in raised if finding.at not in seen)]
        made |= parts
    size = len(DATA_MODULES)
    modules = {
        str(at[size]): module
        for at, module in made.items()
        if isinstance(module, RslearnDataModule) and at[:size] == DATA_MODULES and len(at) == size + 2
    }
    return ParsedConfig(modules, None, tuple(findings) or (_unplaced(config, failure),))


def _unplaced(config: Mapping[str, Any], failure: str) -> Finding:
    """The parser's own words, at the key that they name."""
    named = [key for key in config if f"'{key}'" in failure or f'"{key}"' in failure]
    return Finding(failure, (named[0],) if named else ())


def _short(error: BaseException) -> str:
    """The last telling line of what the parser says, without the pages around it."""
    lines = [line.strip(" -\t") for line in str(error).splitlines() if line.strip(" -\t")]
    return lines[-1][:300] if lines else type(error).__name__
