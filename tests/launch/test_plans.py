"""Plans: their text is what is accepted, and what it says is what arrives."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from rslp.cli.launch_finetune import launch_finetune
from rslp.cli.main import parse
from rslp.errors import UsageError
from rslp.launch.engines.engine import Plan, engine
from rslp.launch.engines.options import EngineOptions, SkyPilotOptions, SlurmOptions
from rslp.launch.engines.slurm import _directive, defaults_from
from rslp.launch.job import Job, Mount
from rslp.rundir import RunDir

GOLDEN = Path(__file__).parent / "golden"
HERE = Path("/home/me/my code")
JOB = Job(run=RunDir.of("/runs", "demo", "first"), image="henryh/rslp_multidataset_stable")
BIG = replace(
    JOB,
    nodes=2,
    gpus=4,
    cpus=32,
    memory=65536,
    time_limit=timedelta(days=1, hours=12),
    retries=3,
    env={"HTTP_PROXY": "http://a b", "A": "$HOME 'x'"},
    secrets={"WANDB_API_KEY": "MY_WANDB_KEY"},
)
OPTIONS = SlurmOptions(
    partition="gpu", account="lab", qos="long", constraint="a100&ib", notice=300, extra=["--exclusive"]
)
SEEDS = [replace(JOB, run=RunDir.of("/runs", "demo", f"sweep-{n}"), name="demo/sweep") for n in range(3)]


def planned(name: str, *jobs: Job, python: str = "PYTHON", **options: Any) -> Plan:
    """The plan of an engine, as one makes it in the folder `HERE`."""
    here = mock.patch("pathlib.Path.cwd", return_value=HERE)
    with here, mock.patch("sys.executable", python), mock.patch.dict(os.environ):
        for variable in [variable for variable in os.environ if variable.startswith("SBATCH_")]:
            del os.environ[variable]
        plan: Plan = engine(name).plan(jobs, EngineOptions(**options))
    return plan


PLANS = {
    "local": planned("local", JOB),
    "local_ranks_detached": planned(
        "local", replace(BIG, nodes=1, cpus=None, memory=None, time_limit=None), detach=True
    ),
    "local_test": planned("local", replace(JOB, mode="test", checkpoint="/my runs/best.ckpt")),
    "slurm": planned("slurm", JOB),
    "slurm_nodes": planned("slurm", BIG, slurm=OPTIONS),
    "slurm_array": planned("slurm", *SEEDS, slurm=SlurmOptions(gres="none", array_limit=2)),
    "slurm_once": planned("slurm", replace(JOB, preemptible=False), slurm=SlurmOptions(gres="gpu:a100:1")),
    "skypilot": planned("skypilot", JOB),
    "skypilot_nodes": planned(
        "skypilot", replace(BIG, mounts=(Mount("gs://bucket", "/data"),)),
        skypilot=SkyPilotOptions(accelerator="H100", infra="kubernetes"),
    ),
}  # fmt: skip
# Characters that a file's name or an environment variable can hold.
ANY = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30)
NAMES = ANY.filter(lambda text: text == text.strip() and text not in ("", ".", "..") and not set(text) & set("/\\"))
NASTY = "a b'c\"d$HOME`id`;|&<>*?#é~!\t%j"


@pytest.mark.parametrize("name", PLANS)
def test_the_text_is_the_accepted_one(name: str) -> None:
    text = f"{PLANS[name]}\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("RSLP_ACCEPT"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that writes down its words and its variables, instead of Python."""
    path = tmp_path_factory.mktemp("a 'quoted' $place") / "python"
    path.write_text("#!/bin/bash\n{ printf '%s\\0' \"$@\"; printf '\\0'; env -0; } > \"$RECORD\"\n")
    path.chmod(0o755)
    return path


def arrived(script: str, recorder: Path) -> tuple[list[str], dict[str, str]]:
    """Run a shell script; the words and variables that its program got."""
    record = recorder.with_name("record")
    subprocess.run(["bash", "-c", script], env={**os.environ, "RECORD": str(record), "SECRET": NASTY}, check=True)
    words, _, variables = os.fsdecode(record.read_bytes()).partition("\0\0")
    return words.split("\0"), dict(line.partition("=")[::2] for line in variables.split("\0") if line)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, value=ANY, checkpoint=ANY.filter(bool))
@example(name=NASTY, value=NASTY + "\n\\", checkpoint="/x/" + NASTY)
def test_everything_arrives_unharmed_through_a_shell(recorder: Path, name: str, value: str, checkpoint: str) -> None:
    # Two signs for "nothing more" in a row part the record.
    assume("\0\0" not in checkpoint)
    # Runs that earlier versions named so, and prefixes, have such letters in their paths.
    run = RunDir(Path("/runs/projects/demo", name))
    job = Job(run=run, mode="test", checkpoint=checkpoint, env={"VALUE": value}, secrets={"KEY": "SECRET"})
    local: Any = planned("local", job, python=str(recorder))
    # An empty word would look like the record's mark, so none is sent: names and checkpoints are never empty.
    words, variables = arrived(str(local), recorder)
    assert words == list(local.command[1:])
    assert (variables["VALUE"], variables["KEY"]) == (value, NASTY)
    if "\n" in name or "\r" in name:
        with pytest.raises(UsageError, match="has a line break"):
            planned("slurm", job)
        return
    words, variables = arrived(str(planned("slurm", job, python=str(recorder))), recorder)
    assert words == [
        "-m",
        "rslp.main",
        "helios",
        "run_slurm",
        f"--run_dirs+={run.path}",
        "--mode",
        "test",
        "--checkpoint",
        checkpoint,
    ]
    assert (variables["VALUE"], variables["KEY"], variables["RSLP_RANKS"]) == (value, NASTY, "slurm")


@given(text=ANY.filter(lambda text: not set(text) & set("\r\n")))
def test_a_directive_reads_back(text: str) -> None:
    """By sbatch's rule as it was found by trying: between double quotes, a backslash takes the next sign as it is."""
    written = _directive(f"--comment={text}")
    if written.startswith('"'):
        inner = written[1:-1]
        assert '"' not in inner.replace("\\\\", "").replace('\\"', "")
        written = inner.replace("\\\\", "\0").replace('\\"', '"').replace("\0", "\\")
    assert written == f"--comment={text}"


@settings(max_examples=15, deadline=None)
@given(name=ANY.filter(lambda text: not text.startswith("-")), value=ANY)
@example(name="null", value="[1, 2]")
@example(name="1e3", value="{a: b} # c")
@example(name="#", value="")
@example(name="~", value="")
def test_the_command_line_takes_words_as_they_are(name: str, value: str) -> None:
    words = [f"--experiment_id={name}", "--config_paths+=x.yaml", f"--env+=A={value}", f"--slurm.partition={name}"]
    try:
        arguments = parse(launch_finetune, "test", words)
    except UsageError as error:
        # Never taken for another text, nor dropped.
        assert "is read as null" in str(error) and yaml.safe_load(name) is None
        return
    assert arguments["experiment_id"] == name
    assert arguments["env"] == [f"A={value}"]
    assert arguments["slurm"].partition == (None if name == "null" else name)


def test_defaults_of_sbatch_are_shown_in_the_plan() -> None:
    variables = {"SBATCH_PARTITION": "gpu", "SBATCH_ACCOUNT": "lab", "SBATCH_QOS": ""}
    assert defaults_from(variables, SlurmOptions(account="mine")) == SlurmOptions(partition="gpu", account="mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 2}, "a local run takes no --nodes"),
        ({"memory": 1, "time_limit": timedelta(1)}, "takes no --memory, --time_limit"),
        ({"mounts": (Mount("a", "/b"),)}, "takes no --mounts"),
        ({"secrets": {"A": "y;id"}}, "--secrets A: 'y;id' can't be an environment variable"),
    ],
)
def test_a_local_run_refuses_what_only_clusters_give(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned("local", replace(JOB, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 0}, "--nodes must be at least 1; got 0"),
        ({"retries": -1}, "--retries must be at least 0"),
        ({"env": {"A-B": "x"}}, "'A-B' can't be an environment variable"),
        ({"env": {"A": "x"}, "secrets": {"A": "y"}}, "A is given both by --env and by --secrets"),
    ],
)
def test_what_no_engine_could_run(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(JOB, **change)  # type: ignore[arg-type]


def test_a_skypilot_task_is_one_for_skypilot(tmp_path: Path) -> None:
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    path = tmp_path / "task.yaml"
    path.write_text(str(PLANS["skypilot_nodes"]))
    assert sky.Task.from_yaml(str(path)).num_nodes == 2


def test_a_skypilot_task_is_yaml_with_the_job_in_it() -> None:
    task = yaml.safe_load(str(PLANS["skypilot_nodes"]))
    assert task["secrets"] == {"WANDB_API_KEY": None}
    assert task["resources"]["accelerators"] == "H100:4"
    assert "run_ranks" in task["run"]
