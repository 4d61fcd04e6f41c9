"""Make a run's objects by the plan, and by jsonargparse under Lightning's command line, and compare them."""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from rslp import upstream
from rslp.io import read_yaml, resolve_paths
from rslp.rundir import RunDir
from rslp.runtime.seeds import seeded
from rslp.train import build
from rslp.train.build import InstantiatedRun
from rslp.train.instantiate import Construction, problems
from tests.train.structures import differences, structure


class Oracle(LightningCLI):
    """Lightning's parser and instantiator, with the keys of a run config beside model, data and trainer."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the config alone; Lightning would also parse the arguments of the process."""
        self.numbers = {key: value for key, value in (args.get("trainer") or {}).items() if type(value) is int}
        self.config = parser.parse_object(args)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Of ``int | float``, take the type of the config: the parser takes the one that was imported first."""
        parsed = self.config_init["trainer"]
        numbers = {key: value for key, value in self.numbers.items() if type(parsed.get(key)) is float}
        return super().instantiate_trainer(**numbers, **kwargs)

    def _dump_config(self) -> None:
        self.config_dump: dict[str, Any] = {}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, kind in build.OWN_KEYS.items():
            if key != "seed_everything":  # Lightning's own
                parser.add_argument(f"--{key}", type=kind, default=0 if kind is int else None)
        parser.set_defaults({f"trainer.{key}": value for key, value in build.TRAINER_DEFAULTS.items()})


def parsed(config: dict[str, Any]) -> InstantiatedRun:
    """What the parser makes of a config, into which it writes."""
    upstream.prepare_parser()
    try:
        cli = Oracle(
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
    except argparse.ArgumentError as error:
        raise AssertionError(f"the parser refuses it: {error}") from error
    return InstantiatedRun(cli.model, cli.datamodule, cli.trainer, cli.config.seed)


def both(run: RunDir, *, training: bool = True) -> tuple[InstantiatedRun, InstantiatedRun]:
    """A run's objects, by the plan and by the parser."""
    config = resolve_paths(read_yaml(run.config).data, run.path)
    planned = alone(run, training=training)
    with seeded(7):
        return planned, parsed(build._for_run(config, run=run, training=training))


def alone(run: RunDir, *, training: bool = True) -> InstantiatedRun:
    """A run's objects, by the plan; the parser takes seconds."""
    config = resolve_paths(read_yaml(run.config).data, run.path)
    planned, construction = build.plan_run(build._for_run(config, run=run, training=training)), Construction()
    assert list(problems(planned)) == []
    with seeded(7):
        made = {key: construction.make(planned[key]) for key in ("model", "data", "trainer")}
    assert construction.problems == []
    return InstantiatedRun(made["model"], made["data"], made["trainer"], planned.get("seed", 0))


def assert_alike(planned: InstantiatedRun, parsed: InstantiatedRun) -> None:
    # A module that is the default of an argument is shared by all models of a process, in the last mode that was set.
    planned.model.train()
    parsed.model.train()
    for part in ("seed", "datamodule", "model", "trainer"):
        assert differences(structure(getattr(planned, part)), structure(getattr(parsed, part))) == []
