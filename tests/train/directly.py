"""Make a run's parts without the parser and with it, and compare them."""

from __future__ import annotations

from rslearn.utils.jsonargparse import init_jsonargparse

from rslp.files import read_yaml, resolve_paths
from rslp.run import RunDir
from rslp.train import cli
from rslp.train.direct import Made, make_directly
from rslp.train.samples import seeded
from tests.train.structures import differences, structure

_OPTIONS = {"trainer_defaults": cli.TRAINER_DEFAULTS, "own_keys": cli.OWN_KEYS}


def both(run: RunDir, *, training: bool = True) -> tuple[Made | None, Made]:
    """A run's parts, made directly and by the parser."""
    document = read_yaml(run.config)
    config = resolve_paths(document.data, run.path)
    init_jsonargparse()
    with seeded(7):
        directly = make_directly(cli._for_run(config, run=run, training=training), **_OPTIONS)
    with seeded(7):
        parsed = cli._parse(cli._for_run(config, run=run, training=training), name=run.config)
    return directly, parsed


def assert_alike(directly: Made | None, parsed: Made) -> None:
    assert directly is not None
    for part in ("seed", "datamodule", "model", "trainer"):
        assert differences(structure(getattr(directly, part)), structure(getattr(parsed, part))) == []
