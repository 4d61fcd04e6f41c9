"""The program of a SLURM batch script: runs the job's processes, and queues the job again when it is not finished."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from rslp.errors import INTERRUPTED, PREEMPTED, RunError
from rslp.io.terminal import print_message
from rslp.launch.engines.slurm import address_of, describe, first_node, slurm
from rslp.launch.job import Job
from rslp.launch.processes import Supervisor, free_port
from rslp.launch.record import note_failure, note_standstill, read_record, steps_done, verified_exit_code

# For how long the other processes may still write the checkpoint after the first of them has ended, s.
_WAIT_FOR_OTHERS = 120
# A job that is preempted more often in a row, without one more optimiser step, is not queued again.
_MAX_STANDSTILLS = 5
# Exit codes after which a job is not started again: done, a user's mistake, Ctrl-C.
_NO_RETRY = (0, 2, INTERRUPTED)


@dataclass(frozen=True)
class Next:
    """What follows when the processes of a job have ended.

    Attributes:
        code: exit code of the batch script.
        again: whether the job is queued again.
        why: the reason, for the log.
    """

    code: int
    again: bool
    why: str


def run_step(job: Job, *, requeue: bool) -> int:
    """Run the job on the nodes of this allocation (a step of SLURM), and queue it again when it is not finished.

    Args:
        job: the job.
        requeue: whether a preempted job is queued again.

    Returns:
        The exit code of the batch script.

    Raises:
        RunError: this is no batch script of SLURM, or SLURM does not answer.
    """
    progress_before = steps_done(job.run, job.mode)
    if _cancelled(job):
        print_message("rslp: this run was cancelled: nothing is started")
        # Nothing has failed: the run is unfinished, and goes on when it is submitted again.
        return PREEMPTED
    code = verified_exit_code(job.run, job.mode, _run_processes(job))
    failures = standstills = 0
    if code == PREEMPTED:
        progressed = steps_done(job.run, job.mode) != progress_before
        standstills = note_standstill(job.run, job.mode, progressed=progressed)
    elif code not in _NO_RETRY:
        failures = note_failure(job.run, job.mode)
    decision = after(
        code,
        wanted=not _cancelled(job) and _still_running(),
        requeue=requeue,
        retries=job.retries,
        failures=failures,
        standstills=standstills,
    )
    print_message(f"rslp: {decision.why}")
    if decision.again:
        slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    return decision.code


def after(code: int, *, wanted: bool, requeue: bool, retries: int, failures: int, standstills: int) -> Next:
    """Decide whether a job is queued again after its processes have ended.

    Args:
        code: exit code of the processes.
        wanted: false for a cancelled job, which a requeue would bring back.
        requeue: whether a preempted job is queued again.
        retries: how often a failed job is started again.
        failures: number of failures so far, this one included.
        standstills: number of preemptions in a row without one more optimiser step (or predicted window).
    """
    if code in _NO_RETRY:
        return Next(code, False, f"{'ended' if code else 'done'} with exit code {code}")
    if not wanted:
        return Next(code, False, f"cancelled; exit code {code}")
    if code == PREEMPTED:
        if standstills > _MAX_STANDSTILLS:
            return Next(1, False, f"preempted {standstills} times without one more step: is the time limit too short?")
        consequence = "it is queued again" if requeue else "submitted again, the run goes on"
        return Next(code, requeue, f"preempted: {consequence}")
    if failures > retries:
        return Next(code, False, f"failed with exit code {code}; no retry is left ({retries} allowed)")
    return Next(code, True, f"failed with exit code {code}; queued again as retry {failures} of {retries}")


def _run_processes(job: Job) -> int:
    """Run the processes of the job on all nodes, as one step of SLURM; returns their exit code."""
    # The processes of the job get signals from SLURM themselves, and save: this program only waits for them.
    with Supervisor(forwards=False) as supervisor:
        supervisor.start(srun_command(job, os.environ), {**os.environ, **_rendezvous(os.environ)})
        supervisor.wait()
    code = supervisor.code()
    # SLURM kills processes that have not saved within its KillWait: after a signal, that is a preemption, no failure.
    return PREEMPTED if supervisor.received and code == 128 + signal.SIGKILL else code


def srun_command(job: Job, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The srun command that starts the processes of the job.

    Args:
        job: the job.
        environment: the variables that SLURM sets in the batch script.
    """
    words = ["srun", f"--nodes={environment['SLURM_JOB_NUM_NODES']}"]
    # Not --ntasks, which may spread them unevenly: the processes rely on equal numbers on all nodes.
    words.append(f"--ntasks-per-node={environment['SLURM_NTASKS_PER_NODE']}")
    # Since SLURM 22.05 a step no longer inherits this from its job.
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        words.append(f"--cpus-per-task={cpus}")
    words += ["--kill-on-bad-exit=0", f"--wait={_WAIT_FOR_OTHERS}"]
    if int(environment["SLURM_NTASKS_PER_NODE"]) * int(environment["SLURM_JOB_NUM_NODES"]) > 1:
        words.append("--label")
    return (*words, *job.command(sys.executable))


def _rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with address and port of rank 0, which runs on the first node, as this batch script does.

    The address is a number, since the node's name may be unknown to DNS: the processes would wait for minutes.
    """
    return {"MASTER_ADDR": address_of(first_node(environment["SLURM_JOB_NODELIST"])), "MASTER_PORT": str(free_port())}


def _cancelled(job: Job) -> bool:
    """Whether a person cancelled the submission, as its record says."""
    record = read_record(job.run, job.mode)
    return record is not None and record.cancelled


def _still_running() -> bool:
    """Whether SLURM's state of this job is RUNNING; after a plain ``scancel`` it is COMPLETING by now."""
    number = os.environ.get("SLURM_JOB_ID")
    if number is None:
        raise RunError("SLURM_JOB_ID is not set: only a batch script of SLURM starts this")
    return describe(number).get("JobState") == "RUNNING"
