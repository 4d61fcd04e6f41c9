"""Make a run's parts without the parser and with it, and compare them."""

from __future__ import annotations

from rslearn.utils.jsonargparse import init_jsonargparse

from rslp.io import read_yaml, resolve_paths
from rslp.rundir import RunDir
from rslp.runtime.seeds import seeded
from rslp.train import build
from rslp.train.build import InstantiatedRun, instantiate_directly
from tests.train.structures import differences, structure

_OPTIONS = {"trainer_defaults": build.TRAINER_DEFAULTS, "own_keys": build.OWN_KEYS}


def both(run: RunDir, *, training: bool = True) -> tuple[InstantiatedRun | None, InstantiatedRun]:
    """A run's parts, made directly and by the parser."""
    directly = alone(run, training=training)
    config = resolve_paths(read_yaml(run.config).data, run.path)
    with seeded(7):
        parsed = build._parse(build._for_run(config, run=run, training=training), name=run.config)
    return directly, parsed


def alone(run: RunDir, *, training: bool = True) -> InstantiatedRun | None:
    """A run's parts, made directly; None where the parser would have to be asked, which takes seconds."""
    config = resolve_paths(read_yaml(run.config).data, run.path)
    init_jsonargparse()
    with seeded(7):
        return instantiate_directly(build._for_run(config, run=run, training=training), **_OPTIONS)


def assert_alike(directly: InstantiatedRun | None, parsed: InstantiatedRun) -> None:
    assert directly is not None
    for part in ("seed", "datamodule", "model", "trainer"):
        assert differences(structure(getattr(directly, part)), structure(getattr(parsed, part))) == []
