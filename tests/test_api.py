"""The Python interface: its page's examples run, it costs nothing to import, and it does what the commands do."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import rslp
from rslp.cli.main import main
from tests import children
from tests.tiny import run_config, write_dataset

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SHIPPED = ROOT / "data" / "helios" / "v3_multitask"
FUNCTIONS = ["check", "compose", "evaluate", "fit", "plan", "predict", "report", "study", "submit"]


def test_importing_costs_nothing_and_the_functions_that_need_no_torch_do_not_import_it() -> None:
    code = """
import sys, rslp
assert not [name for name in sys.modules if name.startswith("rslp.")]
rslp.compose, rslp.plan, rslp.RunDir, rslp.UserError, rslp.__version__
assert not {"torch", "rslearn", "lightning"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""


def test_functions_that_are_called_like_folders_stay_functions() -> None:
    from rslp.check.findings import Finding
    from rslp.evaluate.rows import Evaluation

    assert (Finding.__module__, Evaluation.__module__) == ("rslp.check.findings", "rslp.evaluate.rows")
    from rslp.study.config import StudyConfig

    assert StudyConfig.__module__ == "rslp.study.config"
    assert all(map(inspect.isfunction, (rslp.check, rslp.evaluate, rslp.study)))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(rslp, "nothing")  # noqa: B009


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function = getattr(rslp, name)
    text = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not parameter.empty
        assert re.search(rf"^    {parameter.name}: ", text, re.MULTILINE), parameter.name
    assert "\nReturns:\n" in text
    assert "\nRaises:\n" in text
    assert f"`{name}(" in PAGE


def test_types_and_names_are_those_of_the_package() -> None:
    stub = (ROOT / "rslp" / "__init__.pyi").read_text()
    typed = re.findall(r"^from .* as (\w+)$|^(\w+)(?:: str| = \w+)$", stub, re.MULTILINE)
    assert {imported or own for imported, own in typed} == set(rslp.__all__)
    for module, name, alias in re.findall(r"^from (\S+) import (\w+) as (\w+)$", stub, re.MULTILINE):
        assert getattr(sys.modules[getattr(rslp, alias).__module__], name) is getattr(rslp, alias), module


@pytest.mark.parametrize("name", ["small_v1", "small_v2", "medium", "large"])
def test_compose_gives_the_shipped_run_configs(name: str) -> None:
    composed = rslp.compose(SHIPPED / f"{name}.yaml")
    output = SHIPPED / f"OUT_{name}.yaml"
    assert composed.path == output
    assert composed.config == yaml.safe_load(output.read_text())
    assert composed.differences(output) == []


def test_the_functions_do_what_the_commands_do(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path))
    data = write_dataset(tmp_path / "data", "classify")
    config = run_config({"a": (str(data), "classify")})
    config["trainer"]["enable_progress_bar"] = False
    Path("config.yaml").write_text(yaml.safe_dump(config))
    mine, theirs = (rslp.RunDir.of(tmp_path, "p", name) for name in ("mine", "theirs"))
    assert rslp.check("config.yaml").errors == ()
    assert rslp.fit(mine, "config.yaml")
    val, test = rslp.evaluate(mine)
    assert capsys.readouterr().out == ""
    words = ["--config_paths+=config.yaml", "--rslp_project", "p", "--experiment_id", "theirs", "--local", "true"]
    launch = [sys.executable, "-m", "rslp.main", "helios", "launch_finetune", *words]
    for more in ([], ["--do_eval", "true"]):
        done = children.run([*launch, *more, "--check", "false"], cwd=tmp_path, env=dict(os.environ))
        assert done.returncode == 0, done.stderr
    weights = [torch.load(run.last, weights_only=False)["state_dict"] for run in (mine, theirs)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    rows = [json.loads(theirs.evaluation(split).read_text()) for split in ("val", "test")]
    assert [row["value"] for row in rows[1]["rows"]] == [row.value for row in test.rows]
    assert rows[0]["score"] == val.score


def test_mistakes_are_user_errors(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = rslp.RunDir.of(tmp_path, "p", "e")
    Path("multi.yaml").write_text("dataset_cfgs: [a.yaml]\n")
    for call in (
        lambda: rslp.compose("multi.yaml"),
        lambda: rslp.check("multi.yaml"),
        lambda: rslp.check([]),
        lambda: rslp.fit(run),
        lambda: rslp.fit(run, "multi.yaml"),
        lambda: rslp.evaluate(run),
        lambda: rslp.evaluate(run, splits=["tets"]),  # type: ignore[list-item]
        lambda: rslp.predict(run),
        lambda: rslp.plan(rslp.Job(run=run, mode="test"), "multi.yaml"),
        lambda: rslp.plan(rslp.Job(run=run), "multi.yaml"),
        lambda: rslp.RunDir.of(tmp_path, "p", "/"),
    ):
        with pytest.raises(rslp.UserError):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["multi.yaml"]


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["helios", "make_example", "--path", "example/", "--size", "0.04", "--workers", "1"]) == 0
    path = tmp_path / "example" / "multi_dataset.yaml"
    config = yaml.safe_load(path.read_text())
    config["global_overrides"]["trainer"] |= {"max_epochs": 1, "check_val_every_n_epoch": 1}
    path.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/api.md", "exec"), names)
    shown = capsys.readouterr().out
    for wanted in ("trainer.max_epochs = 1", "\nval ", "\ntest ", "#SBATCH", "example/no_such_file.yaml: no such file"):
        assert wanted in shown
