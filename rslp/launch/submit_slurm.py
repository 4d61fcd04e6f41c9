"""Submit a plan to SLURM, and follow it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rslp.errors import RunError, UsageError
from rslp.launch.engines import State
from rslp.launch.outcome import succeeded
from rslp.launch.plan_slurm import SlurmPlan, log_name
from rslp.launch.record import Record, note_cancelled, write_record
from rslp.launch.slurm_client import describe, slurm, state_of, without_slurm
from rslp.launch.tail import tail
from rslp.run import RunDir

_STATES: dict[str, State] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"), "queued"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED"), "running"),
    **dict.fromkeys(("TIMEOUT", "PREEMPTED"), "stopped"),
    "CANCELLED": "cancelled",
}


def try_out(plan: SlurmPlan) -> None:
    """Ask SLURM whether it would take the plan; nothing is submitted.

    Raises:
        RunError: it would not, in SLURM's own words.
        UsageError: a secret's variable is not set.
    """
    for source in plan.secrets:
        if source not in os.environ:
            raise UsageError(f"--secrets: the variable {source} is not set here")
    slurm("sbatch", "--test-only", text=plan.script, environment=without_slurm(os.environ))


def submit(plan: SlurmPlan) -> tuple[Record, ...]:
    """Submit the batch script, and keep in each run directory what SLURM calls it.

    Raises:
        RunError: SLURM refuses.
    """
    for job in plan.jobs:
        job.run.logs.mkdir(parents=True, exist_ok=True)
    told = slurm("sbatch", "--parsable", text=plan.script, environment=without_slurm(os.environ))
    number = told.strip().partition(";")[0]
    array = len(plan.jobs) > 1
    records = []
    for index, job in enumerate(plan.jobs):
        name = log_name(array=array).replace("%j", number).replace("%A", number).replace("%a", str(index))
        identity = f"{number}_{index}" if array else number
        record = Record.of(job, engine="slurm", id=identity, plan=plan.script, log=str(job.run.logs / name))
        try:
            write_record(job.run, record)
        except OSError:
            slurm("scancel", number)
            raise
        records.append(record)
    return tuple(records)


def state(run: RunDir, record: Record) -> State:
    """How a submission stands, by the controller and the run's own marker."""
    told = state_of(record.id)
    stands = _STATES.get(told)
    if stands in ("queued", "running"):
        return stands
    if succeeded(run, record):
        return "succeeded"
    if record.cancelled:
        return "cancelled"
    return stands or ("failed" if told else "unknown")


def log(run: RunDir, record: Record, *, follow: bool) -> Iterator[str]:
    """The output of a submission, over all its starts."""
    return tail(Path(record.log), ended=lambda: not follow or state(run, record) not in ("queued", "running"))


def cancel(run: RunDir, record: Record) -> None:
    """Ask a submission to save and leave; asked twice, it is ended. A ``RunError`` if it is of another project."""
    output, project = describe(record.id).get("StdOut", ""), run.path.parent
    # Values with blanks in them are cut.
    if output and not any(output.startswith(f"{at}/".partition(" ")[0]) for at in (project, project.resolve())):
        raise RunError(f"SLURM's job {record.id}, which {run.job(record.mode)} names, writes to {output}: not this run")
    standing = state_of(record.id)
    note_cancelled(run, record)
    if standing == "RUNNING" and not record.cancelled:
        # To the processes of the training: SLURM's own way would kill them half a minute later.
        slurm("scancel", "--signal=USR1", record.id)
    else:
        slurm("scancel", record.id)
