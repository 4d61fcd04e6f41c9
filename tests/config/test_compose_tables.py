"""Generated files are fresh, and the tables agree with each other and with the installed classes."""

import importlib
import json
import re
from importlib.resources import files

import pytest
import yaml
from make_schema import PAGE, SCHEMA_FILE, documented, json_schema
from make_vocabulary import arguments_of

from rslp.config.arguments import table
from rslp.config.merge import pick
from rslp.config.migrate import ARGUMENTS, MOVED_ARGUMENTS, RENAMED_CLASSES, REPAIRS
from rslp.config.multi_dataset import MultiDatasetConfig, read_multi_dataset_config
from rslp.io import parse_yaml

REMEDY = "run: make schema"


def test_the_schema_file_is_fresh():
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema(), REMEDY


def test_the_tables_of_the_page_are_fresh():
    assert PAGE.read_text() == documented(PAGE.read_text()), REMEDY
    assert PAGE.read_text().count("| `") > len(MultiDatasetConfig.model_fields)


def test_the_example_of_the_page_is_sound():
    example, *_ = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(read_multi_dataset_config(parse_yaml(example, name="x.yaml", folder="/")).dataset_cfgs) == 3


@pytest.mark.parametrize("path", [path for path in table() if path.startswith("rslp.")] + [
    "lightning.pytorch.Trainer",
    "rslearn.train.dataset.SplitConfig",
    "rslearn.train.dataset.DataInput",
    "rslearn.train.data_module.RslearnDataModule",
    "rslearn.models.unet.UNetDecoder",
])  # fmt: skip
def test_the_vocabulary_is_fresh(path):
    pytest.importorskip("torch")
    module, _, name = path.rpartition(".")
    assert table()[path] == frozenset(arguments_of(getattr(importlib.import_module(module), name))), REMEDY


def test_a_class_that_passes_arguments_on_takes_any():
    # Lightning hands these to wandb.init.
    assert table()["lightning.pytorch.loggers.WandbLogger"] is None


def test_stage_1_knows_the_top_level_keys_of_a_run():
    from rslp.config.arguments import _RUN
    from rslp.train.build import OWN_KEYS

    assert {"model", "data", "trainer", *OWN_KEYS} == set(_RUN)


def test_present_names_are_known():
    needs_extras = {path for path in RENAMED_CLASSES.values() if "terramind" in path}
    assert set(RENAMED_CLASSES.values()) - needs_extras - {"rslp.helios.tasks.MarineInfraTask"} <= set(table())
    assert not set(RENAMED_CLASSES) & set(RENAMED_CLASSES.values())
    assert all(table()[ours] == table()[old] for old, (ours, _) in REPAIRS.items())
    for path, moves in ARGUMENTS.items():
        assert {new for new, _ in moves.values()} <= table()[path]
    module = table()["rslp.train.JointModule"]
    assert {move.new[0] for move in MOVED_ARGUMENTS if move.parent == ("model", "init_args")} <= module


def test_the_page_shows_the_two_tasks_as_they_are_shipped():
    _, _, entries = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    folder = files("rslp.example").joinpath("configs")
    shipped = yaml.safe_load(folder.joinpath("two_tasks.yaml").read_text(encoding="utf-8"))
    shown = yaml.safe_load(entries)
    assert shown["dataset_cfgs"] == shipped["dataset_cfgs"]
    model = ("global_overrides", "model", "init_args", "model")
    assert pick(shown, model) == pick(shipped, model)
