import os
from pathlib import Path

import pytest
import yaml

from rslp.errors import ConfigError
from rslp.io import (
    Anchored,
    anchor_paths,
    dump_yaml,
    parse_yaml,
    relativise_paths,
    resolve_paths,
    shipped_config,
    write_atomic,
)


def data_path(path: str) -> dict:
    return {"data": {"init_args": {"path": path}}}


def anchored(tree: dict, *folders: Path) -> dict:
    return anchor_paths(tree, [str(folder) for folder in folders], name="x.yaml", line=lambda at: len(at))


@pytest.mark.parametrize("path", ["/abs/x", "gs://bucket/x", "${ROOT}/x", "a/${ROOT}", "~/x"])
def test_portable_paths_stay_as_written(tmp_path, path):
    assert anchored(data_path(path), tmp_path) == data_path(path)
    assert relativise_paths(data_path(path), tmp_path) == data_path(path)


def test_a_relative_path_is_looked_up_in_order_and_travels(tmp_path):
    for folder in ("a", "b/data", "c/data"):
        (tmp_path / folder).mkdir(parents=True)
    tree = anchored(data_path("data"), tmp_path / "a", tmp_path / "b", tmp_path / "c")
    found = tree["data"]["init_args"]["path"]
    assert isinstance(found, Anchored)
    assert found == str(tmp_path / "b/data")
    assert relativise_paths(tree, tmp_path / "a") == data_path("../b/data")


def test_what_is_nowhere_is_told_with_all_places(tmp_path):
    with pytest.raises(ConfigError) as caught:
        anchored(data_path("data"), tmp_path / "a", tmp_path / "b")
    assert str(caught.value) == (
        f"x.yaml:3: data.init_args.path: 'data' does not exist; looked in {tmp_path / 'a'}, {tmp_path / 'b'}"
    )


def test_only_path_arguments_are_paths(tmp_path):
    (tmp_path / "here").mkdir()
    tree = {
        "path": "here",
        "model": {
            "init_args": {"path": "here", "restore_path": "here", "name": "here", "checkpoint_path": "org/model"}
        },
        "data": {"init_args": {"data_modules": {"x": {"init_args": {"path": "here", "task": {"path": "here"}}}}}},
    }
    result = anchored(tree, tmp_path)
    assert result["path"] == "here"
    assert result["model"]["init_args"] == {
        "path": "here",
        "restore_path": str(tmp_path / "here"),
        "name": "here",
        "checkpoint_path": "org/model",
    }
    module = result["data"]["init_args"]["data_modules"]["x"]["init_args"]
    assert module == {"path": str(tmp_path / "here"), "task": {"path": "here"}}


def test_the_id_of_a_model_is_no_path_but_a_misspelt_folder_is(tmp_path):
    (tmp_path / "models").mkdir()

    def model(path: str) -> dict:
        return {"model": {"init_args": {"checkpoint_path": path}}}

    for known in ("allenai/OlmoEarth-v1-Nano", "OlmoEarth-v1_2-Base", "OLMOEARTH_V1_NANO"):
        assert anchored(model(known), tmp_path) == model(known)
        assert resolve_paths(model(known), tmp_path) == model(known)
    for wrong in ("models/encodr", "encodr"):
        with pytest.raises(ConfigError, match="does not exist"):
            anchored(model(wrong), tmp_path)


def test_resolving_gives_usable_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_ROOT", "/root/of/data")
    monkeypatch.chdir("/")
    facts = {
        "${SOME_ROOT}/x": "/root/of/data/x",
        "rel/x": str(tmp_path / "rel/x"),
        "../x": str(tmp_path.parent / "x"),
        "/abs": "/abs",
        "s3://b/x": "s3://b/x",
        "~/x": str(Path.home() / "x"),
    }
    for written, usable in facts.items():
        assert resolve_paths(data_path(written), tmp_path) == data_path(usable)
    model = {"model": {"init_args": {"checkpoint_path": "org/model"}}}
    assert resolve_paths(model, tmp_path) == model
    old = {"init_args": {"config_fname": "/opt/helios/data/norm_configs/computed.json"}}
    assert resolve_paths(old, tmp_path) == old


def test_an_unset_variable_is_told_with_file_and_key(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(
        ConfigError, match=r"run.yaml:7: data.init_args.path: the environment variable NOT_SET is not set"
    ):
        resolve_paths(data_path("${NOT_SET}/x"), tmp_path, name="run.yaml", line=lambda _: 7)


VALUES = """\
a: ${NUMBER}
b: '${NUMBER}'
c: [${NUMBER}, "${NUMBER}", 1${NUMBER}]
d: 1e-${NUMBER}
e: x${NUMBER}/${WORD}
f: ${SWITCH}
g: {h: ${WORD}}
"""
READ = {"a": 3, "b": "3", "c": [3, "3", 13], "d": 1e-3, "e": "x3/word", "f": True, "g": {"h": "word"}}


def test_a_path_on_weka_is_to_be_mounted(tmp_path):
    with pytest.raises(ConfigError, match=r"^run.yaml:7: data.init_args.path: 'weka://b/x' can't be read: .* mount"):
        resolve_paths(data_path("weka://b/x"), tmp_path, name="run.yaml", line=lambda _: 7)


def test_variables_are_expanded_in_any_value_and_typed_as_they_stand(tmp_path, monkeypatch):
    for name, value in {"NUMBER": "3", "WORD": "word", "SWITCH": "true"}.items():
        monkeypatch.setenv(name, value)
    document = parse_yaml(VALUES, name="run.yaml", folder=str(tmp_path))
    assert resolve_paths(document.data, tmp_path) == READ
    # What is written again keeps its quotes, and is YAML for every reader.
    again = dump_yaml(document.data)
    assert yaml.safe_load(again) == document.data
    assert resolve_paths(parse_yaml(again, name="x", folder="/").data, tmp_path) == READ


def test_every_unset_variable_is_told_with_its_key(tmp_path, monkeypatch):
    for name in ("NUMBER", "WORD", "SWITCH"):
        monkeypatch.delenv(name, raising=False)
    document = parse_yaml(VALUES, name="run.yaml", folder=str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        resolve_paths(document.data, tmp_path, name="run.yaml", line=document.line)
    said = str(caught.value).splitlines()
    assert len(said) == 10
    assert said[0] == "run.yaml:1: a: the environment variable NUMBER is not set; '${NUMBER}' needs it"
    assert said[-1] == "run.yaml:7: g.h: the environment variable WORD is not set; '${WORD}' needs it"


def test_round_trip_from_folder_to_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "out/deep").mkdir(parents=True)
    written = relativise_paths(anchored(data_path("data"), tmp_path), tmp_path / "out/deep")
    assert written == data_path("../../data")
    assert resolve_paths(written, tmp_path / "out/deep") == data_path(str(tmp_path / "data"))


def test_shipped_configs_are_found_and_absent_ones_told():
    assert shipped_config("v3_multitask/base.yaml").read_text().startswith("#")
    with pytest.raises(ConfigError, match="no such shipped config"):
        shipped_config("v9/none.yaml")


def test_writing_is_atomic_and_keeps_permissions(tmp_path, monkeypatch):
    target = tmp_path / "new/folder/x.txt"
    write_atomic(target, "one")
    assert target.read_text() == "one"
    target.chmod(0o640)
    write_atomic(target, b"two")
    assert target.stat().st_mode & 0o777 == 0o640

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        write_atomic(target, "three")
    assert target.read_text() == "two"
    assert [p.name for p in target.parent.iterdir()] == ["x.txt"]


def test_a_remote_file_is_written_through_fsspec():
    import fsspec

    write_atomic("memory://folder/x.txt", "one")
    with fsspec.open("memory://folder/x.txt", "r") as stream:
        assert stream.read() == "one"
