"""The plan is what is sent, to the letter."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rslp.errors import ConfigError, UsageError
from rslp.launch import bootstrap
from rslp.launch.engines.beaker import BeakerPlan, experiment_name, plan_beaker
from rslp.launch.engines.beaker_client import secrets_of, spec_of
from rslp.launch.engines.beaker_settings import BeakerSettings, beaker_settings
from rslp.launch.job import Job, Mount
from rslp.rundir import RunDir

GOLDEN = Path(__file__).parent / "golden"
CODE: Any = SimpleNamespace(name="code/abc.zip", digest="abc")
RUN = RunDir.of("gs://bucket/runs", "p", "e")


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {"run": RUN, "image": "henryh/rslp_multidataset_stable", "clusters": ("ai2/jupiter",)}
    return Job(**{**values, **changes})


def plan(job: Job, settings: BeakerSettings | None = None) -> BeakerPlan:
    return plan_beaker(job, settings or BeakerSettings(), CODE, unique="0a1b2c3d")


PLANS = {
    "plain": job(),
    "two_machines": job(
        nodes=2, gpus=8, retries=3, priority="urgent", preemptible=False, time_limit=timedelta(hours=36), memory=65536,
        cpus=32, clusters=("ai2/jupiter", "ai2/saturn"), env={"A": "b c"}, secrets={"WANDB_API_KEY": "MINE"},
        mounts=(Mount("weka://other", "/weka/other"), Mount("/data", "/data")),
    ),
    "evaluation": job(mode="test", checkpoint="gs://bucket/a.ckpt", gpus=2),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_the_text_is_the_accepted_one(name: str) -> None:
    text = str(plan(PLANS[name])) + "\n"
    source = yaml.safe_load(text)["spec"]["tasks"][0]["command"][2]
    assert source == Path(bootstrap.__file__).read_text(encoding="utf-8")
    # The program that is sent along stands in the golden file by name only.
    found = yaml.safe_load(text)
    found["spec"]["tasks"][0]["command"][2] = "<rslp/launch/bootstrap.py>"
    golden = GOLDEN / f"beaker_{name}.yaml"
    if os.environ.get("RSLP_ACCEPT"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(yaml.safe_dump(found, sort_keys=False))
    assert found == yaml.safe_load(golden.read_text())


@pytest.mark.parametrize("name", PLANS)
def test_the_client_sends_it_unchanged(name: str) -> None:
    pytest.importorskip("beaker")
    made = plan(PLANS[name])
    assert spec_of(made.spec).to_json() == made.spec


def test_secrets_are_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(job(secrets={"A_TOKEN": "NAME_OF_A"}))
    assert secrets_of(made.spec)[-2:] == ("NAME_OF_A", "RSLEARN_GCP_CREDENTIALS")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": ()}, "needs a cluster"),
        ({"image": ""}, "name it with --image_name"),
        ({"mounts": (Mount("nfs://x", "/x"),)}, r"can't mount 'nfs://x'"),
    ],
)
def test_what_beaker_has_no_word_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(job(**changes))


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_run_gets_a_name_that_the_client_takes(project: str, experiment: str) -> None:
    name = experiment_name(job(run=RunDir(Path("/runs") / "projects" / "p" / "e")), "0a1b2c3d")
    path = (
        Path("/runs/projects")
        / project.replace("/", "").replace("\0", "")
        / experiment.replace("/", "").replace("\0", "")
    )
    name = experiment_name(job(run=RunDir(path)), "0a1b2c3d")
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    assert plain.isalnum() and plain.isascii() and not name.startswith("-") and len(name) <= 128
    assert name.endswith("_0a1b2c3d")


def test_settings_a_variable_beats_the_project_beats_the_user(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/rslp.yaml").write_text("beaker: {workspace: u/u, budget: u/b, shared_memory: 1GiB}")
    (tmp_path / ".rslp.yaml").write_text("beaker: {workspace: p/p, budget: null}")
    environment = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    found = beaker_settings(environment, tmp_path)
    assert (found.workspace, found.budget, found.shared_memory) == ("p/p", None, "1GiB")
    assert beaker_settings({**environment, "RSLP_BEAKER_WORKSPACE": "v/v"}, tmp_path).workspace == "v/v"
    assert "budget" not in plan(job(), found).spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beaker: {workspce: a/b}", r"\.rslp\.yaml:1: beaker\.workspce: unknown key; did you mean workspace\?"),
        ("beaker:\n  env: {A: 1}", r"\.rslp\.yaml:2: beaker\.env\.A: .*a valid string; got 1"),
        ("beaker: [1]", r"\.rslp\.yaml:1: beaker: must be a mapping"),
        ("beeker: {}", r"unknown key; did you mean beaker\?"),
    ],
)
def test_faults_in_settings_have_their_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / ".rslp.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        beaker_settings({"XDG_CONFIG_HOME": str(tmp_path)}, tmp_path)
