"""From keys of a run config to lines of what a person wrote: a table of facts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rslp.check.findings import Finding
from rslp.check.source_map import SourceMap
from rslp.io import read_yaml
from tests.check.copies import RUN_CONFIG, Copy

MODULES = ("data", "init_args", "data_modules")
ENCODER = ("model", "init_args", "model", "init_args", "encoder", 0, "init_args")
CROP = (*MODULES, "crop_type", "init_args")


@pytest.mark.parametrize(
    ("at", "file", "marker"),
    [
        (("model", "init_args", "optimizer", "init_args", "lr"), "multi_dataset.yaml", "lr:"),
        (("trainer", "max_epochs"), "multi_dataset.yaml", "max_epochs:"),
        ((*ENCODER, "checkpoint_path"), "multi_dataset.yaml", "helios_checkpoint_path: encoder"),
        ((*ENCODER, "forward_kwargs", "patch_size"), "multi_dataset.yaml", "patch_size: 8"),
        ((*CROP, "path"), "crop_type.yaml", "    path: crop_type"),
        ((*CROP, "inputs", "sentinel1", "bands"), "crop_type.yaml", "bands: [vv, vh]"),
        ((*CROP, "inputs", "sentinel1"), "crop_type.yaml", "sentinel1:"),
        ((*CROP, "train_config", "crop_size"), "crop_type.yaml", "crop_size:"),
        # Through an alias, to its anchor.
        (
            (*CROP, "train_config", "transforms", 0, "init_args", "sentinel1_units"),
            "crop_type.yaml",
            "sentinel1_units:",
        ),
        # What is not there stands where its parent does.
        ((*CROP, "predict_config"), "crop_type.yaml", "data.init_args"),
    ],
)
def test_a_key_is_found_where_it_was_written(sound: Copy, at: tuple[str | int, ...], file: str, marker: str) -> None:
    problem = SourceMap([read_yaml(sound.path / RUN_CONFIG)]).problem(Finding("wrong", at))
    assert problem.file == str(sound.path / file)
    if marker == "data.init_args":
        lines = (sound.path / file).read_text().splitlines()
        assert (problem.line, problem.key) == (
            lines.index("  init_args:", lines.index("data:")) + 1,
            f"{marker}.{at[-1]}",
        )
    else:
        assert problem.line == sound.line(file, marker)


def test_the_shipped_base_config_is_named_as_in_a_checkout(sound: Copy) -> None:
    at = ("model", "init_args", "optimizer", "class_path")
    problem = SourceMap([read_yaml(sound.path / RUN_CONFIG)]).problem(Finding("wrong", at))
    assert problem.file == "data/helios/v3_multitask/base.yaml"
    assert problem.key == "model.init_args.optimizer.class_path"


BROKEN = ("{", "", "[]", '{"trainer": 3}', '{"trainer": [4]}', '{"trainer": [{"file": 5}]}', "\udcff")


@pytest.mark.parametrize("provenance", ["none", "of files that are gone", *BROKEN])
def test_without_provenance_the_run_config_is_the_source(
    sound: Copy, tmp_path: Path, provenance: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(sound.path / RUN_CONFIG, tmp_path)
    beside = RUN_CONFIG.replace(".yaml", ".provenance.json")
    if provenance in BROKEN:
        (tmp_path / beside).write_bytes(provenance.encode(errors="surrogateescape"))
    elif provenance != "none":
        shutil.copy(sound.path / beside, tmp_path)
    copy = Copy(tmp_path)
    problem = SourceMap([read_yaml(tmp_path / RUN_CONFIG)]).problem(Finding("wrong", (*CROP, "batch_size")))
    assert (problem.file, problem.key) == (str(tmp_path / RUN_CONFIG), ".".join(CROP) + ".batch_size")
    assert problem.line == copy.line(RUN_CONFIG, "batch_size: 16")
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path / beside} is damaged") == (provenance in BROKEN)
    assert said.count("\n") == (provenance in BROKEN)


def test_of_several_run_configs_the_last_that_says_it_is_named(sound: Copy, tmp_path: Path) -> None:
    (tmp_path / "local.yaml").write_text("trainer:\n  max_epochs: many\n")
    places = SourceMap([read_yaml(sound.path / RUN_CONFIG), read_yaml(tmp_path / "local.yaml")])
    problem = places.problem(Finding("wrong", ("trainer", "max_epochs")))
    assert (problem.file, problem.line) == (str(tmp_path / "local.yaml"), 2)
    other = places.problem(Finding("wrong", ("trainer", "gradient_clip_val")))
    assert other.file == str(sound.path / "multi_dataset.yaml")
