"""The SLURM engine: the batch script as text, its submission, its state in SLURM; and SLURM's commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from rslp.errors import RunError, UsageError
from rslp.launch.engines.engine import Engine, Plan, SubmissionState, refuse_object_store
from rslp.launch.engines.options import EngineOptions, SlurmOptions
from rslp.launch.job import Job
from rslp.launch.processes import tail
from rslp.launch.record import SubmissionRecord, note_cancelled, succeeded, write_record
from rslp.rundir import RunDir

# The value of --slurm.gres that asks for no GPUs.
NO_GPUS = "none"
# An option of sbatch that needs no quotes in a batch script.
_UNQUOTED = re.compile(r"[A-Za-z0-9_.,:;/@%=+\[\]-]+")


# SLURM's states as ours; in any other the job has ended, and the run directory says whether it succeeded. A run whose
# job was stopped goes on when it is submitted again.
_STATES: dict[str, SubmissionState] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"), "queued"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED"), "running"),
    **dict.fromkeys(("TIMEOUT", "PREEMPTED"), "stopped"),
    "CANCELLED": "cancelled",
}


class SlurmEngine(Engine[Plan]):
    """Plans are batch scripts, which sbatch reads from its standard input."""

    takes_arrays = True

    def plan(self, jobs: Sequence[Job], options: EngineOptions) -> Plan:
        """Plan one job, or an array of jobs that differ only in their run; see ``Engine``."""
        refuse_object_store(jobs)
        # The plan shows the defaults that sbatch would take from its environment.
        text = batch_script(jobs, defaults_from(os.environ, options.slurm), folder=Path.cwd())
        return Plan(jobs=tuple(jobs), text=text)

    def verify(self, plan: Plan, configs: Sequence[Mapping[str, Any]]) -> None:  # noqa: ARG002
        """Let SLURM validate the plan; nothing is submitted.

        Raises:
            RunError: SLURM would refuse it; the message is SLURM's.
            UsageError: a secret's variable is not set.
        """
        plan.jobs[0].secret_values()
        slurm("sbatch", "--test-only", text=f"{plan}\n", environment=without_slurm(os.environ))

    def submit(self, plan: Plan) -> tuple[SubmissionRecord, ...]:
        """Submit the batch script, and write a record with the job's number to each run directory.

        Raises:
            RunError: SLURM refuses.
            OSError: a record can't be written; the job is cancelled.
        """
        for job in plan.jobs:
            job.run.logs.mkdir(parents=True, exist_ok=True)
        output = slurm("sbatch", "--parsable", text=f"{plan}\n", environment=without_slurm(os.environ))
        number = output.strip().partition(";")[0]
        array = len(plan.jobs) > 1
        records = []
        for index, job in enumerate(plan.jobs):
            name = log_name(array=array).replace("%j", number).replace("%A", number).replace("%a", str(index))
            identity = f"{number}_{index}" if array else number
            record = SubmissionRecord.of(job, engine="slurm", id=identity, plan=str(plan), log=str(job.run.logs / name))
            try:
                write_record(job.run, record)
            except (OSError, RunError):
                slurm("scancel", number)
                raise
            records.append(record)
        return tuple(records)

    def state(self, run: RunDir, record: SubmissionRecord) -> SubmissionState:
        """The state of a submission, from SLURM and the run directory."""
        slurm_state = state_of(record.id)
        known = _STATES.get(slurm_state)
        if known in ("queued", "running"):
            return known
        if succeeded(run, record):
            return "succeeded"
        if record.cancelled:
            return "cancelled"
        return known or ("failed" if slurm_state else "unknown")

    def log(self, run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
        """Yield the output of a submission in pieces, that of every start of its job; with ``follow`` until it ends."""
        return tail(Path(record.log), ended=lambda: not follow or self.state(run, record) not in ("queued", "running"))

    def cancel(self, run: RunDir, record: SubmissionRecord) -> None:
        """Ask a submission to save and stop; the second time, end it at once.

        Raises:
            RunError: the job of the recorded number writes its output elsewhere: it is of something else.
        """
        output, project = describe(record.id).get("StdOut", ""), run.path.parent
        # `describe` cuts values off at the first blank.
        if output and not any(output.startswith(f"{path}/".partition(" ")[0]) for path in (project, project.resolve())):
            raise RunError(
                f"SLURM's job {record.id}, which {run.job(record.mode)} names, writes to {output}: not this run"
            )
        slurm_state = state_of(record.id)
        note_cancelled(run, record)
        if slurm_state == "RUNNING" and not record.cancelled:
            # Only a signal to the processes of the job: a plain scancel also kills them after KillWait, mostly 30 s.
            slurm("scancel", "--signal=USR1", record.id)
        else:
            slurm("scancel", record.id)


def batch_script(jobs: Sequence[Job], options: SlurmOptions, *, folder: Path) -> str:
    """The batch script of one job, or of an array of jobs that differ only in their run.

    Args:
        jobs: the jobs.
        options: options that only SLURM has.
        folder: the job's working directory, from which a user's own classes can be imported.

    Raises:
        UsageError: the job has mounts, or a path that a batch script can't name.
    """
    job = jobs[0]
    if job.mounts:
        raise UsageError("SLURM jobs see the file system of their nodes: leave out --mounts")
    directives = [f"#SBATCH {_directive(option)}" for option in _options(jobs, options, folder=folder)]
    exports = [
        "export RSLP_RANKS=slurm",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(job.env.items())),
        # The value comes with the environment that sbatch is called from; it is not in the script.
        *(f'export {name}="${source}"' for name, source in sorted(job.secret_variables().items())),
    ]
    return "\n".join(["#!/bin/bash", *directives, "", *exports, f"exec {shlex.join(_command(jobs))}"])


def _command(jobs: Sequence[Job]) -> Iterator[str]:
    """The words of the script's one command: the workflow ``run_slurm``, which ends in ``run_step``."""
    job = jobs[0]
    # The interpreter is at a path that all nodes see.
    yield from (sys.executable, "-m", "rslp.main", "helios", "run_slurm")
    yield from (f"--run_dirs+={each.run.location}" for each in jobs)
    yield from ("--mode", job.mode)
    if job.checkpoint is not None:
        yield from ("--checkpoint", job.checkpoint)
    if job.evaluate:
        yield from ("--evaluate", "true")
    if job.retries:
        yield from ("--retries", str(job.retries))
    if not job.preemptible:
        yield from ("--requeue", "false")


def _options(jobs: Sequence[Job], options: SlurmOptions, *, folder: Path) -> Iterator[str]:
    """The options of sbatch, not yet quoted."""
    job = jobs[0]
    array = len(jobs) > 1
    yield f"--job-name={job.title}"
    if array:
        limit = f"%{options.array_limit}" if options.array_limit else ""
        yield f"--array=0-{len(jobs) - 1}{limit}"
    for name in ("partition", "account", "qos", "constraint"):
        if (value := getattr(options, name)) is not None:
            yield f"--{name}={value}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={job.gpus}"
    yield from _resources(job, options)
    # Without "B:" the signal goes to the processes of the job: they save, and the batch script queues the job again.
    yield f"--signal=USR1@{options.notice}"
    yield "--requeue" if job.preemptible or job.retries else "--no-requeue"
    yield "--open-mode=append"
    yield f"--chdir={folder}"
    yield f"--output={_literal(job.run.logs)}/{log_name(array=array)}"
    yield from options.extra


def _resources(job: Job, options: SlurmOptions) -> Iterator[str]:
    """The options of sbatch for the resources of each node; SLURM counts processors by task, here one for each GPU."""
    if options.gres is None:
        yield f"--gpus-per-node={job.gpus}"
    elif options.gres != NO_GPUS:
        yield f"--gres={options.gres}"
    if job.cpus is not None:
        yield f"--cpus-per-task={max(1, job.cpus // job.gpus)}"
    if job.memory is not None:
        yield f"--mem={job.memory}M"
    if job.time_limit is not None:
        yield f"--time={_duration(job.time_limit)}"


def log_name(*, array: bool) -> str:
    """SLURM's pattern of the log's file name, in which it fills in the numbers of job and array task."""
    return "slurm-%A_%a.log" if array else "slurm-%j.log"


def _duration(limit: timedelta) -> str:
    """A duration as sbatch reads it, D-HH:MM:SS."""
    hours, seconds = divmod(limit.seconds, 3600)
    return f"{limit.days}-{hours:02}:{seconds // 60:02}:{seconds % 60:02}"


def _literal(path: Path) -> str:
    """A path for a file name pattern of SLURM, with ``%`` doubled; raise ``UsageError`` for a backslash.

    A backslash in a pattern turns off its ``%j``, so the log would have another name.
    """
    if "\\" in str(path):
        raise UsageError(f"{path} can't be named in a batch script: it has a backslash")
    return str(path).replace("%", "%%")


def _directive(option: str) -> str:
    """Quote an option for an ``#SBATCH`` line, where sbatch knows double quotes and backslashes and expands nothing."""
    if "\n" in option or "\r" in option:
        raise UsageError(f"{option!r} can't be written in a batch script: it has a line break")
    if _UNQUOTED.fullmatch(option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'


def defaults_from(environment: Mapping[str, str], options: SlurmOptions) -> SlurmOptions:
    """Take options that were left out from SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_QOS: the plan shows them."""
    values: dict[str, Any] = {
        name: environment[f"SBATCH_{name.upper()}"]
        for name in ("partition", "account", "qos")
        if getattr(options, name) is None and environment.get(f"SBATCH_{name.upper()}")
    }
    return replace(options, **values)


def slurm(*words: str, text: str = "", environment: Mapping[str, str] | None = None) -> str:
    """Run one of SLURM's commands and return its standard output.

    Args:
        *words: the command and its arguments.
        text: its standard input.
        environment: its variables; those of this process when None.

    Raises:
        RunError: the command is not installed, or it failed; the message is SLURM's.
    """
    try:
        finished = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=120, check=False, env=environment
        )
    except FileNotFoundError:
        raise RunError(f"{words[0]} is not installed here: launch from a machine that submits to SLURM") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{words[0]} did not answer within two minutes: is SLURM's controller up?") from None
    if finished.returncode:
        raise RunError(f"SLURM refused: {_reason(finished.stderr, words[0]) or f'exit code {finished.returncode}'}")
    return finished.stdout


def _reason(text: str, command: str) -> str:
    """The error messages of a command on one line, without its name."""
    lines = [re.sub(rf"^{command}: (error: )?", "", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def describe(job: str) -> dict[str, str]:
    """What SLURM's controller knows of a job, such as its ``JobState``; empty when it has forgotten the job.

    Args:
        job: number of the job, with ``_INDEX`` for one of an array.

    Raises:
        RunError: the controller does not answer, or ``job`` is no such number.
    """
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise RunError(f"{job!r} is no job of SLURM")
    try:
        text = slurm("scontrol", "--oneliner", "show", "job", job)
    except RunError as error:
        if "Invalid job id" in str(error) or " not found" in str(error):
            return {}
        raise
    # Values with blanks (names, paths) are cut off at the first blank.
    first = text.splitlines()[0] if text else ""
    return dict(pair.partition("=")[::2] for pair in first.split(" ") if "=" in pair)


def state_of(job: str) -> str:
    """SLURM's name of the state of a job (by its number); empty when SLURM no longer knows the job.

    The controller is asked first; it forgets a job minutes after its end, which the accounting does not.
    """
    if state := describe(job).get("JobState"):
        return state
    try:
        output = slurm("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job)
    except RunError:
        # Many clusters have no accounting.
        return ""
    return output.split()[0] if output.split() else ""


def address_of(node: str) -> str:
    """The network address of a node, whose name in SLURM need not be known to DNS; the name when SLURM has none."""
    text = slurm("scontrol", "--oneliner", "show", "node", node)
    match = re.search(r"\bNodeAddr=(\S+)", text)
    return match[1] if match else node


def first_node(nodes: str) -> str:
    """The first node of a list in SLURM's short form, such as ``n[1-3,7]``."""
    return slurm("scontrol", "show", "hostnames", nodes).split()[0]


def without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those of a surrounding job, which sbatch and srun take as options; SLURM_CONF stays."""
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI_"))
    }
