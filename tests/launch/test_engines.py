"""An engine is one file and one row: a made-up one passes through every command that knows engines."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from rslp.cli.main import main
from rslp.errors import LaunchError
from rslp.launch.engines.engine import ENGINES, Engine, Plan, SubmissionState, engine
from rslp.launch.engines.options import EngineOptions
from rslp.launch.job import Job
from rslp.launch.record import SubmissionRecord, note_cancelled, read_record, write_record
from rslp.rundir import RunDir

RUN_CONFIG = {
    "model": {"class_path": "rslp.train.JointModule", "init_args": {}},
    "data": {"class_path": "rslp.train.MultiDatasetDataModule", "init_args": {"data_modules": {"a": {}}}},
    "trainer": {"max_epochs": 1},
}
NAMED = ("--experiment_id", "x")


class PrintingEngine(Engine[Plan]):
    """Prints its plans."""

    broken = False

    def plan(self, jobs: Sequence[Job], options: EngineOptions) -> Plan:
        return Plan(jobs=tuple(jobs), text=shlex.join(jobs[0].command("python")))

    def submit(self, plan: Plan) -> tuple[SubmissionRecord, ...]:
        if self.broken:
            raise LaunchError("the printer is on fire")
        sys.stdout.write(f"{plan}\n")
        (job,) = plan.jobs
        record = SubmissionRecord.of(job, engine="printing", id="page-1", plan=str(plan))
        write_record(job.run, record)
        return (record,)

    def state(self, run: RunDir, record: SubmissionRecord) -> SubmissionState:
        return "cancelled" if record.cancelled else "running"

    def log(self, run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
        yield f"printed: {record.plan}\n"

    def cancel(self, run: RunDir, record: SubmissionRecord) -> None:
        note_cancelled(run, record)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path / "runs"))
    monkeypatch.setitem(ENGINES, "printing", f"{__name__}:PrintingEngine")
    Path("run.yaml").write_text(yaml.safe_dump(RUN_CONFIG))
    return RunDir.of(tmp_path / "runs", "helios_finetuning", "x")


def launch(*words: str) -> int:
    options = ("--config_paths+=run.yaml", "--engine", "printing", "--check", "false")
    return main(["helios", "launch_finetune", *NAMED, *options, *words])


def test_a_new_engine_is_a_file_and_a_row(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"python -m rslp.main helios run --run_dir {run.path} --mode fit\n"
    assert launch("--dry_run", "true") == 0
    assert capsys.readouterr().out == command
    assert not run.path.exists()
    assert launch() == 0
    shown = capsys.readouterr().out
    assert shown.startswith(command) and "submitted: printing page-1" in shown
    assert run.config.is_file()
    assert main(["helios", "jobs"]) == 0
    assert "x           printing  page-1  running" in capsys.readouterr().out
    assert main(["helios", "logs", *NAMED]) == 0
    assert capsys.readouterr().out == f"printed: {command}"
    assert launch() == 2
    assert "is running already (printing page-1); `helios cancel` ends that first" in capsys.readouterr().err
    assert main(["helios", "cancel", *NAMED]) == 0
    assert launch() == 0


@pytest.mark.parametrize("mode", ["fit", "predict"])
def test_a_refusal_leaves_the_run_as_it_was(
    mode: str, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--mode", mode, "--checkpoint", str(Path("a.ckpt").absolute()))
    Path("a.ckpt").touch()
    monkeypatch.setattr(PrintingEngine, "broken", True)
    assert launch(*words) == 2
    assert capsys.readouterr().err == "error: the printer is on fire\n"
    assert not run.path.parents[2].exists()
    run.path.mkdir(parents=True)
    run.config_of(mode).write_text("former: true\n")
    assert launch(*words) == 2
    assert run.config_of(mode).read_text() == "former: true\n"
    assert read_record(run) is None


def test_an_engine_that_is_none_is_named_with_those_there_are(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--engine", "slurn") == 2
    assert "there is no engine 'slurn'; known: local, slurm, beaker, skypilot, printing" in capsys.readouterr().err
    # Such as a later version may have written.
    run.path.mkdir(parents=True)
    run.config.write_text("{}")
    write_record(run, SubmissionRecord.of(Job(run=run), engine="teleport", id="1", plan=""))
    assert json.loads(run.job().read_text())["engine"] == "teleport"
    assert main(["helios", "jobs"]) == 0
    for workflow in ("logs", "cancel"):
        assert main(["helios", workflow, *NAMED]) == 2
        assert "there is no engine 'teleport'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ENGINES)
def test_each_row_is_one_class_in_a_file_of_its_name(name: str) -> None:
    module = sys.modules[type(engine(name)).__module__]
    assert module.__name__ == f"rslp.launch.engines.{name}"
    own = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
    assert [kind for kind in own if issubclass(kind, Engine)] == [type(engine(name))]
