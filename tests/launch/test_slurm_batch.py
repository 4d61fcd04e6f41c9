"""What follows a step of a SLURM job, and what is known of a job that the controller has forgotten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rslp.errors import RunError
from rslp.launch.engines.slurm import SlurmEngine, slurm, without_slurm
from rslp.launch.engines.slurm_batch import Next, after, srun_command
from rslp.launch.job import Job
from rslp.launch.record import SubmissionRecord, note_failure, note_standstill, read_record, write_record
from rslp.rundir import RunDir

RUN = RunDir.of("/runs", "demo", "first")


@pytest.mark.parametrize(
    ("code", "change", "expected"),
    [
        (0, {}, Next(0, False, "done with exit code 0")),
        (2, {"failures": 1, "retries": 9}, Next(2, False, "ended with exit code 2")),
        (130, {}, Next(130, False, "ended with exit code 130")),
        (143, {}, Next(143, True, "preempted: it is queued again")),
        (143, {"requeue": False}, Next(143, False, "preempted: submitted again, the run goes on")),
        # A requeue would bring a cancelled job back.
        (143, {"wanted": False}, Next(143, False, "cancelled; exit code 143")),
        (1, {"wanted": False, "failures": 1, "retries": 1}, Next(1, False, "cancelled; exit code 1")),
        (143, {"standstills": 5}, Next(143, True, "preempted: it is queued again")),
        (
            143,
            {"standstills": 6},
            Next(1, False, "preempted 6 times without one more step: is the time limit too short?"),
        ),
        (1, {"failures": 1}, Next(1, False, "failed with exit code 1; no retry is left (0 allowed)")),
        (
            137,
            {"failures": 3, "retries": 3},
            Next(137, True, "failed with exit code 137; queued again as retry 3 of 3"),
        ),
        (
            137,
            {"failures": 4, "retries": 3},
            Next(137, False, "failed with exit code 137; no retry is left (3 allowed)"),
        ),
        # Retries do not need a job that may be taken away.
        (
            1,
            {"failures": 1, "retries": 1, "requeue": False},
            Next(1, True, "failed with exit code 1; queued again as retry 1 of 1"),
        ),
    ],
)
def test_what_follows_a_step(code: int, change: dict[str, int], expected: Next) -> None:
    usual = {"wanted": True, "requeue": True, "retries": 0, "failures": 0, "standstills": 0}
    assert after(code, **{**usual, **change}) == expected  # type: ignore[arg-type]


def test_a_step_asks_for_what_its_job_has() -> None:
    variables = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}
    words = srun_command(Job(run=RUN), variables)
    assert words[:7] == (
        *("srun", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8"),
        *("--kill-on-bad-exit=0", "--wait=120", "--label"),
    )
    assert words[-5:] == ("run", "--run_dir", "/runs/projects/demo/first", "--mode", "fit")
    single = srun_command(Job(run=RUN), {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"})
    assert not any(word.startswith(("--cpus", "--label")) for word in single)


def test_sbatch_sees_nothing_of_a_surrounding_job() -> None:
    variables = {"SLURM_CONF": "/c", "SLURM_MEM_PER_CPU": "1", "SBATCH_QOS": "x", "PMI_RANK": "0", "HOME": "/h"}
    assert without_slurm(variables) == {"SLURM_CONF": "/c", "HOME": "/h"}


def test_counts_are_kept_in_the_run_directory(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert note_failure(run, "fit") == 1
    assert note_standstill(run, "fit", progressed=False) == 0
    write_record(run, SubmissionRecord.of(Job(run=run), engine="slurm", id="1", plan=""))
    assert [note_failure(run, "fit") for _ in range(3)] == [1, 2, 3]
    assert [note_standstill(run, "fit", progressed=p) for p in (False, False, True, False)] == [1, 2, 0, 1]
    record = read_record(run)
    assert record is not None
    assert (record.failures, record.standstills) == (3, 1)


@pytest.fixture
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that has forgotten the job, on a cluster without accounts."""
    for name, words in (("scontrol", "slurm_load_jobs error: Invalid job id specified"), ("sacct", "disabled")):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_a_forgotten_job_has_succeeded_if_its_marker_is_there(tmp_path: Path, forgetful: None) -> None:
    run = RunDir(tmp_path)
    record = SubmissionRecord.of(Job(run=run), engine="slurm", id="1", plan="")
    assert SlurmEngine().state(run, record) == "unknown"
    run.done_marker.write_text("{}")
    assert SlurmEngine().state(run, record) == "succeeded"


def test_an_evaluation_has_succeeded_if_its_results_are_newer_than_it(tmp_path: Path, forgetful: None) -> None:
    run = RunDir(tmp_path)
    run.done_marker.write_text("{}")
    for split in ("val", "test"):
        run.evaluation(split).parent.mkdir(exist_ok=True)
        run.evaluation(split).write_text("{}")
        os.utime(run.evaluation(split), (0, 0))
    record = SubmissionRecord.of(Job(run=run, mode="test"), engine="slurm", id="1", plan="")
    assert SlurmEngine().state(run, record) == "unknown"
    for split in ("val", "test"):
        other = run.evaluation(split, "last")
        other.parent.mkdir(exist_ok=True)
        other.write_text("{}")
    assert SlurmEngine().state(run, record) == "succeeded"
    for split in ("val", "test"):
        run.evaluation(split, "last").unlink()
        run.evaluation(split).touch()
    assert SlurmEngine().state(run, record) == "succeeded"


@pytest.mark.parametrize(
    ("name", "message"), [("scontrol", "Invalid job id"), ("no-such-command", "is not installed here")]
)
def test_what_slurm_refuses_is_one_line(forgetful: None, name: str, message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        slurm(name)
    assert "\n" not in str(caught.value)
