"""Stage 2 before anything runs: where it runs, what is refused, and that a refusal leaves everything as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rslp.cli.main import main
from rslp.errors import DiskError
from rslp.launch.engines.local import LocalEngine, LocalPlan
from rslp.launch.job import Job
from rslp.launch.record import SubmissionRecord, read_record, write_record
from rslp.rundir import RunDir

HEAVY = ("torch", "lightning", "rslearn", "rasterio", "beaker")
CONFIG: dict[str, Any] = {
    "model": {"class_path": "rslp.train.JointModule", "init_args": {}},
    "data": {"class_path": "rslp.train.MultiDatasetDataModule", "init_args": {"data_modules": {"a": {}}}},
    "trainer": {"max_epochs": 1},
}
ENGINES = {
    "local": ("--local", "true"),
    "ranks": ("--local", "true", "--gpus", "2", "--detach", "true"),
    "slurm": ("--engine", "slurm", "--nodes", "2", "--memory", "8GiB", "--time_limit", "2h"),
    "skypilot": ("--engine", "skypilot"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RSLP_PREFIX", raising=False)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def launch(*words: str) -> int:
    return main(
        ["helios", "launch_finetune", "--config_paths+=run.yaml", "--experiment_id", "x", "--check", "false", *words]
    )


def a_run(place: Path) -> RunDir:
    run = RunDir.of(place / "project_data", "helios_finetuning", "x")
    run.path.mkdir(parents=True)
    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dry_run_needs_no_training_stack_and_writes_nothing(place: Path, engine: str) -> None:
    words = ["helios", "launch_finetune", "--config_paths+=run.yaml", "--experiment_id", "x", *ENGINES[engine]]
    code = (
        "import sys; from rslp.main import main\n"
        f"assert main({[*words, '--dry_run', 'true']!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    # No scheduler's command is on this path either.
    environment = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert "projects/helios_finetuning/x --mode fit" in done.stdout
    assert [path.name for path in place.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say where to run: --local true, --engine slurm, or Beaker's --cluster+=NAME"),
        (("--local", "true", "--engine", "slurm"), "--engine slurm and --local true contradict each other"),
        (("--local", "true", "--cluster+=a"), "--local true and --cluster contradict each other"),
        (("--local", "true", "--nodes", "2"), "a local run takes no --nodes"),
        (("--local", "true", "--slurm.qos", "a"), "--slurm.qos is for --engine slurm; got the engine local"),
        (("--engine", "slurm", "--skypilot.infra", "gcp"), "--skypilot.infra is for --engine skypilot; got the engine"),
        (("--engine", "slurm", "--detach", "true"), "--detach is for --local true; got the engine slurm"),
        (("--local", "true", "--gpus", "0"), "--gpus must be at least 1"),
        (("--local", "true", "--env+=hunter2"), "--env takes NAME=VALUE"),
        (("--local", "true", "--secrets+=A=NOT_SET_HERE"), "--secrets: the variable NOT_SET_HERE is not set here"),
        (("--local", "true", "--array+=run.yaml"), "--array is for --engine slurm"),
        (("--engine", "slurm", "--array+=run.yaml", "--array+=b/run.yaml"), "--array has two files for the run x-run"),
        (("--engine", "slurm", "--mounts+=a:/b"), "leave out --mounts"),
        (("--engine", "slurm", "--memory", "lots"), "--memory 'lots' is no amount of memory"),
        (("--engine", "skypilot"), "SkyPilot tasks are rendered only"),
        (
            ("--local", "true", "--do_eval", "true", "--profiler", "simple"),
            "--profiler is for a training or a prediction",
        ),
    ],
)
def test_what_cannot_run_is_one_line_and_leaves_nothing(
    place: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hunter2" not in error
    assert error.count("\n") == 1
    assert [path.name for path in place.iterdir()] == ["run.yaml"]


def test_without_slurm_it_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch("--engine", "slurm") == 2
    assert "sbatch is not installed here: launch from a machine that submits to SLURM" in capsys.readouterr().err
    assert not (place / "project_data").exists()


def test_an_evaluation_is_one_process(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a.ckpt").touch()
    words = ("--engine", "slurm", "--nodes", "2", "--gpus", "4", "--do_eval", "true", "--checkpoint", "a.ckpt")
    assert launch(*words, "--dry_run", "true") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n" in script
    assert f"--mode test --checkpoint {place}/a.ckpt" in script


def test_a_prediction_has_a_config_of_its_own_and_goes_beside_a_training(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(place)
    run.checkpoints.mkdir()
    run.best().touch()
    run.config.write_text("trained: true\n")
    plans: list[LocalPlan] = []

    def submit(self: LocalEngine, plan: LocalPlan) -> tuple[SubmissionRecord, ...]:
        plans.append(plan)
        return (SubmissionRecord.of(plan.jobs[0], engine="local", id="1@here@1", plan=str(plan)),)

    words = ("--local", "true", "--mode", "predict", "--gpus", "2")
    assert launch(*words, "--secrets+=A=NOT_SET_HERE") == 2
    assert not run.prediction_config.exists()
    # In real life it becomes the job and does not come back.
    monkeypatch.setattr(LocalEngine, "submit", submit)
    with run.locked():
        assert launch(*words) == 0
    assert run.config.read_text() == "trained: true\n"
    assert yaml.safe_load(run.prediction_config.read_text())["trainer"] == {"max_epochs": 1}
    assert plans[0].command[-6:] == ("helios", "run", "--run_dir", str(run.path), "--mode", "predict")
    with run.locked("predict"):
        assert launch(*words) == 2
    assert "is already predicting in this run directory" in capsys.readouterr().err


def test_a_running_run_keeps_its_config(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(place)
    run.config.write_text("theirs: true\n")
    with run.locked():
        assert launch("--local", "true") == 2
    assert "is already training in this run directory" in capsys.readouterr().err
    assert run.config.read_text() == "theirs: true\n"


def test_a_refused_submission_gives_the_former_config_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(place)
    run.config.write_text("former: true\n")
    assert launch("--local", "true", "--secrets+=A=NOT_SET_HERE") == 2
    assert run.config.read_text() == "former: true\n"
    assert read_record(run) is None


def test_what_is_at_work_is_not_submitted_twice(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(place)
    words = ("-m", "rslp.main", "helios", "run", "--run_dir", str(run.path))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words]) as process:
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        identity = f"{process.pid}@{os.uname().nodename}@{started}"
        write_record(run, SubmissionRecord.of(Job(run=run), engine="local", id=identity, plan=""))
        assert launch("--local", "true") == 2
        assert f"is running already (local {process.pid})" in capsys.readouterr().err
        assert main(["helios", "jobs"]) == 0
        process.kill()
    # A later process of the same number is another one.
    assert not run.config.exists()


def test_the_profiler_goes_into_the_config_and_an_array_merges_its_files(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = place / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\n[ \"$1\" = --parsable ] && echo '42;cluster'\nexit 0\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    for seed in range(2):
        (place / f"seed{seed}.yaml").write_text(f"seed: {seed}\ntrainer: {{max_epochs: {seed + 5}}}\n")
    assert launch("--engine", "slurm", "--array+=seed0.yaml", "--array+=seed1.yaml", "--profiler", "simple") == 0
    for seed in range(2):
        run = RunDir.of(place / "project_data", "helios_finetuning", f"x-seed{seed}")
        config = yaml.safe_load(run.config.read_text())
        assert (config["seed"], config["rslp_experiment"]) == (seed, f"x-seed{seed}")
        assert config["trainer"] == {"max_epochs": seed + 5, "profiler": "simple"}
        record = read_record(run)
        assert record is not None
        assert (record.engine, record.id) == ("slurm", f"42_{seed}")
        assert record.log == str(run.logs / f"slurm-42_{seed}.log")


@pytest.mark.parametrize("engine", ["slurm", "background"])
def test_a_job_that_cannot_be_noted_is_ended(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    """Nobody could follow it or cancel it, and the same command would start a second one beside it."""
    programs = {
        "sbatch": f'[ "$1" = --parsable ] && touch {place}/bin/job-42 && echo 42',
        "scancel": f"rm {place}/bin/job-$1",
        "python": f"echo $$ > {place}/bin/pid; exec sleep 60",
    }
    (place / "bin").mkdir()
    for name, text in programs.items():
        (place / "bin" / name).write_text(f"#!/bin/sh\n{text}\nexit 0\n")
        (place / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("sys.executable", str(place / "bin" / "python"))
    started = []

    def full(run: RunDir, record: SubmissionRecord) -> None:
        started.append(record.id)
        raise DiskError(28, f"{run.job()} can't be written: No space left on device")

    monkeypatch.setattr(f"rslp.launch.engines.{'slurm' if engine == 'slurm' else 'local'}.write_record", full)
    words = ("--engine", "slurm") if engine == "slurm" else ("--local", "true", "--detach", "true")
    assert launch(*words) == 1
    assert capsys.readouterr().err.endswith("/job.json can't be written: No space left on device\n")
    if engine == "slurm":
        assert started == ["42"] and not (place / "bin" / "job-42").exists()
    else:
        with pytest.raises(ProcessLookupError):
            os.kill(int(started[0].partition("@")[0]), 0)


def test_a_secret_is_nowhere_to_be_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = place / "seen"
    sbatch = place / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/sh\ncat >> {place}/bin/script\necho "$MY_KEY" > {seen}\n[ "$1" = --parsable ] && echo 42\nexit 0\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MY_KEY", "hunter2")
    words = ("--engine", "slurm", "--secrets+=WANDB_API_KEY=MY_KEY")
    assert launch(*words, "--dry_run", "true") == 0
    assert launch(*words) == 0
    # It travels with the environment of sbatch, and in nothing that is written or printed.
    assert seen.read_text() == "hunter2\n"
    seen.unlink()
    told = capsys.readouterr()
    texts = [told.out, told.err, *(path.read_text() for path in place.rglob("*") if path.is_file())]
    assert not [text for text in texts if "hunter2" in text]
    assert 'export WANDB_API_KEY="$MY_KEY"' in told.out


def test_jobs_tells_how_runs_stand(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["helios", "jobs"]) == 0
    assert "no runs in " in capsys.readouterr().out
    run = a_run(place)
    run.config.write_text("{}")
    run.state.write_text(json.dumps({"state": "preempted", "epoch": 4, "step": 9, "heartbeat": time.time() - 7300}))
    run.metrics.write_text("step,epoch,name,value\n1,0,val/score,0.25\n2,1,val/score,0.5\n3,2,val/score,0.125\n")
    record = SubmissionRecord.of(Job(run=run), engine="local", id=f"999999@{os.uname().nodename}@1", plan="")
    write_record(run, record)
    assert main(["helios", "jobs"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        *("helios_finetuning", "x", "local", "999999", "preempted", "4", "0.500", "2", "h")
    ]  # fmt: skip


@pytest.mark.parametrize("workflow", ["logs", "cancel"])
def test_what_was_never_submitted_can_be_neither_followed_nor_cancelled(
    place: Path, workflow: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["helios", workflow, "--experiment_id", "nothing"]) == 2
    assert "nothing does not exist; `helios jobs` lists the runs" in capsys.readouterr().err


def test_logs_of_a_job_that_waits_and_a_reader_that_leaves(place: Path) -> None:
    run = a_run(place)
    record = SubmissionRecord.of(
        Job(run=run), engine="local", id=f"999999@{os.uname().nodename}@1", plan="", log=str(run.logs / "a.log")
    )
    write_record(run, record)
    command = [sys.executable, "-m", "rslp.main", "helios", "logs", "--experiment_id", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "has printed nothing yet: failed" in done.stderr
    run.logs.mkdir()
    (run.logs / "a.log").write_text("line\n" * 100_000)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
