"""What a batch script of SLURM runs: one step on all nodes, and then: done, queued again, or failed?

Written as a program instead of in the script, so that it can be tested.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rslp.errors import RunError
from rslp.launch.job import Job
from rslp.launch.outcome import checked_code, steps_done
from rslp.launch.ranks import INTERRUPTED, PREEMPTED, exit_code, forwarded, free_port
from rslp.launch.record import note_failure, note_standstill, read_record
from rslp.launch.slurm_client import address_of, describe, first_node, slurm

# Others may still write the checkpoint when the first process has left, seconds.
_PATIENCE = 120
# Taken away so often without one more step, a job would go on like that for ever.
_STANDSTILLS = 5
_NO_RETRY = (0, 2, INTERRUPTED)


@dataclass(frozen=True)
class Next:
    """What happens after a step.

    Attributes:
        code: the exit code of the batch script.
        again: the job is queued again.
        why: for the log.
    """

    code: int
    again: bool
    why: str


def run_step(job: Job, *, requeue: bool) -> int:
    """Run the job on the nodes that SLURM gave, and queue it again when it is not over.

    Args:
        job: what to execute.
        requeue: whether a job that SLURM takes away is queued again.

    Returns:
        the exit code of the batch script.
    """
    before = steps_done(job.run, job.mode)
    if _cancelled(job):
        _say("this run was cancelled: nothing is started")
        return PREEMPTED
    code = _step(job)
    code, wrong = checked_code(job.run, job.mode, code)
    if wrong:
        _say(wrong)
    preempted = code == PREEMPTED
    decision = after(
        code,
        wanted=not _cancelled(job) and _still_running(),
        requeue=requeue,
        retries=job.retries,
        failures=note_failure(job.run, job.mode) if code not in _NO_RETRY and not preempted else 0,
        standstills=note_standstill(job.run, job.mode, stood=steps_done(job.run, job.mode) == before)
        if preempted
        else 0,
    )
    _say(decision.why)
    if decision.again:
        slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    return decision.code


def after(code: int, *, wanted: bool, requeue: bool, retries: int, failures: int, standstills: int) -> Next:
    """Decide what happens after a step.

    Args:
        code: what the step ended with.
        wanted: SLURM still wants the job to run: nobody has cancelled it. A requeue would bring a cancelled job back.
        requeue: whether a job that SLURM takes away is queued again.
        retries: how often a failed job is started again.
        failures: how often it has failed, this time included.
        standstills: how often in a row it was taken away without having got further.
    """
    if code in _NO_RETRY:
        kind: Literal["done", "ended"] = "done" if code == 0 else "ended"
        return Next(code, False, f"{kind} with exit code {code}")
    if not wanted:
        return Next(code, False, f"cancelled; exit code {code}")
    if code == PREEMPTED:
        if standstills > _STANDSTILLS:
            return Next(1, False, f"taken away {standstills} times without one more step: is the time limit too short?")
        what = "it is queued again" if requeue else "submitted again, the run goes on"
        return Next(code, requeue, f"taken away before its end: {what}")
    if failures > retries:
        return Next(code, False, f"failed with exit code {code}; no retry is left ({retries} allowed)")
    return Next(code, True, f"failed with exit code {code}; queued again as retry {failures} of {retries}")


def _step(job: Job) -> int:
    """Run the processes of the training on all nodes, and wait for them; their exit code."""
    environment = {**os.environ, **_meeting_point(os.environ)}
    with _deaf() as received:
        code = exit_code(subprocess.run(srun_command(job, os.environ), env=environment, check=False).returncode)
    # An srun that is told to end kills what has not saved within SLURM's KillWait.
    return PREEMPTED if received and code == 128 + signal.SIGKILL else code


def srun_command(job: Job, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The words that start the processes of the training.

    Args:
        job: what to execute.
        environment: the variables of the batch script.
    """
    words = ["srun", f"--nodes={environment['SLURM_JOB_NUM_NODES']}"]
    # Never a bare --ntasks: the processes count on as many on each node.
    words.append(f"--ntasks-per-node={environment['SLURM_NTASKS_PER_NODE']}")
    # Since SLURM 22.05 a step no longer takes this from its job.
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        words.append(f"--cpus-per-task={cpus}")
    words += ["--kill-on-bad-exit=0", f"--wait={_PATIENCE}"]
    if int(environment["SLURM_NTASKS_PER_NODE"]) * int(environment["SLURM_JOB_NUM_NODES"]) > 1:
        words.append("--label")
    return (*words, *job.command(sys.executable))


def _meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Where the processes find each other: the batch script runs on the first node, so a port free here is free there.

    The node's address is taken, since its name may resolve nowhere: the processes would wait for minutes.
    """
    return {"MASTER_ADDR": address_of(first_node(environment["SLURM_JOB_NODELIST"])), "MASTER_PORT": str(free_port())}


@contextmanager
def _deaf() -> Iterator[list[int]]:
    """Outlive the signals that are meant for the training, and note them: SLURM sends them to its processes, too."""
    numbers, received = forwarded(), list[int]()
    former = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)


def _cancelled(job: Job) -> bool:
    record = read_record(job.run, job.mode)
    return record is not None and record.cancelled


def _still_running() -> bool:
    """Whether SLURM still counts this job as running: one that it ends is COMPLETING by now.

    Raises:
        RunError: SLURM does not answer.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise RunError("SLURM_JOB_ID is not set: this is started by a batch script of SLURM alone")
    return describe(job).get("JobState") == "RUNNING"


def _say(text: str) -> None:
    sys.stderr.write(f"rslp: {text}\n")
    sys.stderr.flush()
