"""Merging run configs that are given together to stage 2."""

from pathlib import Path

import pytest
import yaml

from rslp.cli.main import main
from rslp.config import config_kind, merge_configs
from rslp.errors import ConfigError
from rslp.io import parse_yaml, read_yaml, relativise_paths
from tests.config.samples import BASE, CROPS, MULTI, composed, line, replaced, write


def documents(*texts: str, folder: str = "/f"):
    return [parse_yaml(text, name=f"{number}.yaml", folder=folder) for number, text in enumerate(texts)]


def test_later_configs_win_and_constants_take_their_type():
    first = "trainer: {max_epochs: 3, callbacks: [a]}\nmodel: {size: {PATCH_SIZE}, name: '{PATCH_SIZE}'}\n"
    second = "trainer: {callbacks+: [b], max_epochs: {256/PATCH_SIZE}}\n"
    merged = merge_configs(documents(first, second), {"PATCH_SIZE": "8"})
    assert merged == {
        "trainer": {"max_epochs": 32, "callbacks": ["a", "b"]},
        "model": {"size": 8, "name": "8"},
    }


CHECKPOINT_NAMES = ["helios_checkpoint_path", "olmoearth_checkpoint_path", "CHECKPOINT_PATH", "HELIOS_CHECKPOINT_PATH"]


@pytest.mark.parametrize("placeholder", ["CHECKPOINT_PATH", "HELIOS_CHECKPOINT_PATH", "OLMOEARTH_CHECKPOINT_PATH"])
@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_the_checkpoint_goes_by_all_its_names(name, placeholder):
    merged = merge_configs(documents(f"model: {{{placeholder}}}/x\n"), {name: "/m"})
    assert merged == {"model": "/m/x"}


def test_relative_paths_refer_to_their_own_file(tmp_path):
    (tmp_path / "a/data").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "a/config.yaml").write_text("data: {init_args: {path: data}}\n")
    merged = merge_configs([read_yaml(tmp_path / "a/config.yaml")], {})
    assert relativise_paths(merged, tmp_path / "run") == {"data": {"init_args": {"path": "../a/data"}}}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: {SIZE}\n", "0.yaml:1: a: no constant fills the placeholder {SIZE}"),
        ("- a\n", "0.yaml: is no config"),
        ("data:\n  init_args:\n    path: gone\n", "0.yaml:3: data.init_args.path: 'gone' does not exist"),
        ("a: {b+: 3}\n", "0.yaml:1: a.b+: a key with + appends a list"),
    ],
)
def test_faults_have_their_place(text, wanted):
    with pytest.raises(ConfigError) as caught:
        merge_configs(documents(text), {})
    assert wanted in str(caught.value)


OPTIMIZER = """\
model:
  init_args:
    optimizer:
      class_path: rslearn.train.optimizer.AdamW
      init_args: {lr: 1e-3, fused: true}
data: {init_args: {data_modules: {a: {class_path: rslearn.train.data_module.RslearnDataModule, init_args: {path: /d}}}}}
"""
LAYER_DECAY = "rslearn.models.olmoearth_pretrain.optimizer.LayerDecayAdamW"


def test_another_class_keeps_the_arguments_that_it_takes():
    over = f"model: {{init_args: {{optimizer: {{class_path: {LAYER_DECAY}}}}}}}\n"
    notes: list[str] = []
    merged = merge_configs(documents(OPTIMIZER, over), {}, notes=notes)
    assert merged["model"]["init_args"]["optimizer"] == {"class_path": LAYER_DECAY, "init_args": {"lr": 1e-3}}
    assert notes == [
        f"1.yaml:1: model.init_args.optimizer.class_path: {LAYER_DECAY} takes the place of "
        "rslearn.train.optimizer.AdamW; dropped, since it does not take them: fused; these stay: lr"
    ]


@pytest.mark.parametrize(
    ("over", "wanted"),
    [
        ("{class_path: a.B}", "1.yaml:1: data.init_args.data_modules.a.class_path: an override can't make a.B of"),
        ("{init_args: null}", "1.yaml:1: data.init_args.data_modules.a.init_args: must be a mapping; null would drop"),
    ],
)
def test_a_dataset_is_not_emptied_by_an_override(over, wanted):
    with pytest.raises(ConfigError) as caught:
        merge_configs(documents(OPTIMIZER, f"data: {{init_args: {{data_modules: {{a: {over}}}}}}}\n"), {})
    assert wanted in str(caught.value)


def test_a_composed_config_survives_as_it_is(tmp_path):
    run = composed(tmp_path)
    assert merge_configs([read_yaml(tmp_path / "OUT.yaml")], {}) == run


def test_kinds_of_configs_are_told_apart(tmp_path):
    run = composed(tmp_path)
    strip = {"{PATCH_SIZE}": "4", "{ENCODER_EMBEDDING_SIZE}": "16"}
    texts = {"base config": BASE, "dataset config": CROPS, "multi-dataset config": MULTI}
    for kind, text in texts.items():
        for placeholder, value in strip.items():
            text = text.replace(placeholder, value)
        assert config_kind(yaml.safe_load(text)) == kind
    assert config_kind(run) == "run config"
    assert config_kind({}) is None
    assert Path(tmp_path / "OUT.yaml").exists()


ALLOWING = replaced(MULTI, "  - crops.yaml\n", "  - {cfgs: crops.yaml, check: {allow: [units, overlap]}}\n")


def test_findings_that_are_allowed_are_in_the_run_config_by_dataset(tmp_path):
    made = composed(tmp_path, multi=ALLOWING + "check: {allow: [overlap]}\n")
    assert made["data"]["init_args"]["check_allow"] == {"crops": ["overlap", "units"], "fields": ["overlap"]}
    made = composed(tmp_path, multi=ALLOWING)
    assert made["data"]["init_args"]["check_allow"] == {"crops": ["units", "overlap"]}
    # What the run learns from is the same.
    del made["data"]["init_args"]["check_allow"]
    assert made == composed(tmp_path, multi=MULTI)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("check: [overlap]", "check: must be a mapping; got ['overlap']"),
        ("check: {allow: overlap}", "check.allow: must be a list of ids; got 'overlap'"),
        ("check: {alow: [overlap]}", "check.alow: unknown key; did you mean allow?"),
        ("check: {allow: [1]}", "check.allow: must be a list of ids; got [1]"),
    ],
)
def test_only_ids_can_be_allowed(wrong, message, tmp_path, capsys):
    path = write(tmp_path, multi=f"{MULTI}{wrong}\n")
    assert main(["helios", "make_multidataset_config", "--cfg", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"{path}:{line(path.read_text(), wrong)}: {message}" in said
