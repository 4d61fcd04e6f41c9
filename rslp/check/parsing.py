"""Parse a run config with the run's own parser, and make everything in it, as a run would."""

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

from rslp.check.faults import faults_of
from rslp.check.findings import Finding, KeyPath, warning
from rslp.check.making import MADE_WRONG, argument_of, constructor_faults
from rslp.check.training import training_faults
from rslp.compose import class_faults, head_faults, pick, without_effect
from rslp.errors import ConfigError, UserError
from rslp.train import adapters
from rslp.train.cli import RunCLI, run_parser
from rslp.train.data import MultiDatasetDataModule
from rslp.train.mixture_checks import check_fit
from rslp.train.module import JointModule
from rslp.train.quiet import silenced
from rslp.train.strategy import RanksEnvironment
from rslp.train.trainer_arguments import trainer_faults

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
class Parsed:
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


def parse(config: Mapping[str, Any]) -> Parsed:
    """Parse a run config and make model, data modules and trainer.

    Args:
        config: the run config, its paths resolved.

    Returns:
        What was made, and every fault that was found, deepest keys first.
    """
    faults = (*head_faults(config), *class_faults(config))
    heads = tuple(Finding(fault.what, fault.at) for fault in faults if not fault.harmless)
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
        yield warning(rule.says() + more, places[0], id="no-effect")


def _parsed(config: Mapping[str, Any]) -> Parsed:
    adapters.prepare_parser()
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


def _accepted(cli: CheckCLI, config: Mapping[str, Any]) -> Parsed:
    findings = []
    data, module = cli.datamodule, cli.model
    for what, got, wanted in (("data", data, MultiDatasetDataModule), ("model", module, JointModule)):
        if not isinstance(got, wanted):
            message = f"{type(got).__name__} can't train on several datasets; use rslp.train.{wanted.__name__}"
            findings.append(Finding(message, (what, "class_path")))
    if findings:
        return Parsed({}, None, tuple(findings))
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
    return Parsed(data.data_modules, module, tuple(findings))


def _data_place(config: Mapping[str, Any], argument: KeyPath) -> KeyPath:
    """Where a config sets an argument of the outer data module; batch sizes may be each dataset's own."""
    at = ("data", "init_args", *argument)
    given = pick(config, ("data", "init_args", "batch_sizes"))
    if argument[:1] == ("batch_sizes",) and (not isinstance(given, Mapping) or argument[-1] not in given):
        return at[:3] if isinstance(given, int) else (*DATA_MODULES, argument[-1], "init_args", "batch_size")
    return at


def _refused(config: Mapping[str, Any], failure: str) -> Parsed:
    findings: list[Finding] = []
    made: dict[KeyPath, Any] = {}
    known = {"model": L.LightningModule, "data": L.LightningDataModule, "trainer": Trainer}
    for key, kind in known.items():
        if not isinstance(config.get(key), Mapping):
            continue
        found = faults_of(config[key], kind, (key,))
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
    return Parsed(modules, None, tuple(findings) or (_unplaced(config, failure),))


def _unplaced(config: Mapping[str, Any], failure: str) -> Finding:
    """The parser's own words, at the key that they name."""
    named = [key for key in config if f"'{key}'" in failure or f'"{key}"' in failure]
    return Finding(failure, (named[0],) if named else ())


def _short(error: BaseException) -> str:
    """The last telling line of what the parser says, without the pages around it."""
    lines = [line.strip(" -\t") for line in str(error).splitlines() if line.strip(" -\t")]
    return lines[-1][:300] if lines else type(error).__name__
