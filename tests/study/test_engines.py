"""A study on a cluster: one array for all unfinished runs, collected by the next call; SLURM's and Beaker's plans."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from rslp.cli.main import main
from rslp.launch.engines.engine import ENGINES, Engine, Plan, SubmissionState
from rslp.launch.engines.local import LocalEngine, LocalPlan
from rslp.launch.engines.options import EngineOptions
from rslp.launch.engines.slurm import SlurmEngine
from rslp.launch.job import Job
from rslp.launch.record import SubmissionRecord, write_record
from rslp.rundir import RunDir
from rslp.study.config import read_study
from rslp.study.plan import StudyPlan
from rslp.study.study import ArmsFile
from tests import children
from tests.study.small import done, runs_of, write_study


class Queue(Engine[Plan]):
    """Takes arrays; nothing runs until a test says so."""

    takes_arrays = True
    states: ClassVar[dict[str, SubmissionState]] = {}
    arrays: ClassVar[list[list[str]]] = []

    def plan(self, jobs: Sequence[Job], options: EngineOptions) -> Plan:
        return Plan(jobs=tuple(jobs), text=SlurmEngine().plan(jobs, options).text)

    def submit(self, plan: Plan) -> tuple[SubmissionRecord, ...]:
        self.arrays.append([job.run.experiment for job in plan.jobs])
        records = []
        for job in plan.jobs:
            record = SubmissionRecord.of(job, engine="queue", id=job.run.experiment, plan=plan.text)
            write_record(job.run, record)
            self.states[job.run.experiment] = "queued"
            records.append(record)
        return tuple(records)

    def state(self, run: RunDir, record: SubmissionRecord) -> SubmissionState:
        return self.states[run.experiment]

    def log(self, run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
        yield ""

    def cancel(self, run: RunDir, record: SubmissionRecord) -> None:
        raise NotImplementedError


NAMES = ["study.joint.s0", "study.single.classes.s0", "study.single.numbers.s0"]


def test_runs_go_as_one_array_and_are_collected_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path / "runs"))
    monkeypatch.setitem(ENGINES, "queue", f"{__name__}:Queue")
    monkeypatch.setattr("rslp.launch.check_gate._run_check", lambda _: None)
    monkeypatch.setattr(Queue, "states", {})
    monkeypatch.setattr(Queue, "arrays", [])
    write_study(tmp_path, seeds=[0])
    command = ["helios", "study", "--cfg", "study.yaml", "--engine", "queue", "--time_limit", "1h", "--cpus", "4"]

    assert main(command) == 0
    assert Queue.arrays == [NAMES]
    error = capsys.readouterr().err
    assert "3 runs are queued or running" in error
    assert "no comparison yet: no seed of the reference arm single is finished" in error
    script = (tmp_path / "runs" / "projects" / "studies" / NAMES[1] / "job.json").read_text()
    for part in ("--array=0-2", "--time=0-01:00:00", "--cpus-per-task=4", "--evaluate true"):
        assert part in script

    # Two end, one of them with an error; the third still waits.
    run = RunDir(tmp_path / "runs" / "projects" / "studies" / NAMES[0])
    job = Job(run=run, evaluate=True)
    assert children.run(list(job.command(sys.executable))).returncode == 0
    Queue.states |= {NAMES[0]: "succeeded", NAMES[1]: "failed", NAMES[2]: "running"}
    assert main(command) == 0
    assert done(tmp_path) == NAMES[:1] and Queue.arrays == [NAMES, NAMES[1:2]]
    assert {entry["state"] for entry in runs_of(tmp_path).values()} == {"done", "submitted"}
    assert "2 runs are queued or running" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "lcoal"], "there is no engine 'lcoal'"),
        (["--cpus", "4"], "a local run takes no --cpus"),
        (["--slurm.qos", "a"], "--slurm.qos is for --engine slurm"),
        (["--cluster+=a"], "--cluster is for --engine beaker; got the engine local"),
        (["--dry_run", "true", "--memory", "much"], "--memory 'much' is no amount of memory"),
        (["--secrets+=KEY=NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["--engine", "slurm", "--memory", "much"], "--memory 'much' is no amount of memory"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path / "runs"))
    write_study(tmp_path, sizes={"train": 1, "val": 1, "test": 1})
    assert main(["helios", "study", "--cfg", "study.yaml", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_job_that_evaluates_is_a_training_of_one_process(tmp_path: Path) -> None:
    from rslp.errors import UsageError

    run = RunDir(tmp_path / "projects" / "p" / "e")
    assert Job(run=run, evaluate=True).command("python")[-2:] == ("--evaluate", "true")
    for wrong in ({"mode": "test"}, {"gpus": 2}, {"nodes": 2}):
        with pytest.raises(UsageError, match="--evaluate is for a training of one process"):
            Job(run=run, evaluate=True, **wrong)  # type: ignore[arg-type]


def test_runs_here_get_the_variables_and_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path / "runs"))
    monkeypatch.setenv("MY_KEY", "hidden")
    write_study(tmp_path, arms=["joint"], seeds=[0], sizes={"train": 2, "val": 1, "test": 1})
    started: list[Job] = []

    def run(_: LocalEngine, plan: LocalPlan) -> tuple[int, bool]:
        started.extend(plan.jobs)
        return 1, False

    monkeypatch.setattr(LocalEngine, "run", run)
    monkeypatch.setattr("rslp.launch.check_gate._run_check", lambda _: None)
    words = ["--env+=COLOUR=red", "--secrets+=KEY=MY_KEY", "--tracker", "tensorboard, mlflow"]
    assert main(["helios", "study", "--cfg", "study.yaml", *words]) == 1
    (job,) = started
    assert yaml.safe_load(job.run.config.read_text())["rslp_trackers"] == ["tensorboard", "mlflow"]
    assert job.env["COLOUR"] == "red" and dict(job.secrets) == {"KEY": "MY_KEY"} and job.evaluate


@pytest.mark.parametrize("keep", ["best", "none"])
@pytest.mark.parametrize("remote", [False, True])
def test_checkpoints_of_an_evaluated_run_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str, remote: bool):
    monkeypatch.chdir(tmp_path)
    prefix = f"memory://bucket{tmp_path}" if remote else str(tmp_path / "runs")
    file = read_study(write_study(tmp_path, arms=["joint"], seeds=[0], keep=keep))
    plan = StudyPlan.of(file, prefix)
    arms, (planned,) = ArmsFile.read(plan), plan.runs
    files = planned.run.files()
    checkpoints = {f"checkpoints/{name}.ckpt" for name in ("best", "last", "previous", "best-classes")}
    for name in (*checkpoints, "eval/best/test.json", "eval/best/test.parquet", "checkpoints/notes.txt"):
        files.write(name, b"{}")
    assert arms.collect(planned)
    there = {name for name in checkpoints if files.read(name) is not None}
    assert there == ({"checkpoints/best.ckpt"} if keep == "best" else set())
    assert files.read("checkpoints/notes.txt") == b"{}"
    assert sorted(path.name for path in (plan.folder / "rows" / planned.experiment).iterdir()) == [
        "test.json",
        "test.parquet",
    ]
