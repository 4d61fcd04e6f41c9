"""The SLURM engine: the batch script as text, its submission, and the program that the batch script starts."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from rslp.errors import INTERRUPTED, PREEMPTED, RunError, UsageError
from rslp.io.terminal import print_message
from rslp.launch.engines.engine import SubmissionState
from rslp.launch.job import Job
from rslp.launch.processes import exit_code, free_port, handling_signals, tail
from rslp.launch.record import (
    SubmissionRecord,
    note_cancelled,
    note_failure,
    note_standstill,
    read_record,
    steps_done,
    succeeded,
    verified_exit_code,
    write_record,
)
from rslp.rundir import RunDir


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


# The value of --slurm.gres that asks for no GPUs.
NO_GPUS = "none"
# An option of sbatch that needs no quotes in a batch script.
_UNQUOTED = re.compile(r"[A-Za-z0-9_.,:;/@%=+\[\]-]+")


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Options of a job that only SLURM has.

    Attributes:
        partition: partition to run in; SBATCH_PARTITION when left out, then the cluster's default.
        account: account to charge; SBATCH_ACCOUNT when left out.
        qos: quality of service; SBATCH_QOS when left out.
        gres: generic resources of each node, as sbatch's --gres, instead of --gpus-per-node; none asks for no GPUs.
        constraint: features that the nodes must have.
        array_limit: how many runs of an array may run at once.
        notice: seconds between the signal and the time limit; the run saves and is queued again.
        extra: further options of sbatch, each as --name=value.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None
    constraint: str | None = None
    array_limit: int | None = None
    notice: int = 120
    extra: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SlurmPlan:
    """A batch script and its jobs.

    Attributes:
        jobs: one job, or the jobs of an array, which differ only in their run.
        script: the batch script, which sbatch reads from its standard input.
        secrets: names of variables of the launching environment, from which the script takes the secrets.
    """

    jobs: tuple[Job, ...]
    script: str
    secrets: tuple[str, ...]

    def __str__(self) -> str:
        """The batch script."""
        return self.script.rstrip("\n")


def plan_slurm(jobs: Sequence[Job], options: SlurmOptions, *, folder: Path, python: str = sys.executable) -> SlurmPlan:
    """Plan one job, or an array of jobs that differ only in their run.

    Args:
        jobs: the jobs.
        options: options that only SLURM has.
        folder: the job's working directory, from which a user's own classes can be imported.
        python: the interpreter, at a path that all nodes see.

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
    lines = ["#!/bin/bash", *directives, "", *exports, f"exec {shlex.join(_command(jobs, python))}", ""]
    return SlurmPlan(jobs=tuple(jobs), script="\n".join(lines), secrets=tuple(sorted(set(job.secrets.values()))))


def _command(jobs: Sequence[Job], python: str) -> Iterator[str]:
    """The words of the script's one command: the workflow ``run_slurm``, which ends in ``run_step``."""
    job = jobs[0]
    yield from (python, "-m", "rslp.main", "helios", "run_slurm")
    yield from (f"--run_dirs+={each.run.location}" for each in jobs)
    yield from ("--mode", job.mode)
    if job.checkpoint is not None:
        yield from ("--checkpoint", job.checkpoint)
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


# SLURM's states as ours; in any other the job has ended, and the run directory says whether it succeeded. A run whose
# job was stopped goes on when it is submitted again.
_STATES: dict[str, SubmissionState] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"), "queued"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED"), "running"),
    **dict.fromkeys(("TIMEOUT", "PREEMPTED"), "stopped"),
    "CANCELLED": "cancelled",
}


def check_with_sbatch(plan: SlurmPlan) -> None:
    """Let SLURM validate the plan; nothing is submitted.

    Raises:
        RunError: SLURM would refuse it; the message is SLURM's.
        UsageError: a secret's variable is not set.
    """
    for source in plan.secrets:
        if source not in os.environ:
            raise UsageError(f"--secrets: the variable {source} is not set here")
    slurm("sbatch", "--test-only", text=plan.script, environment=without_slurm(os.environ))


def submit(plan: SlurmPlan) -> tuple[SubmissionRecord, ...]:
    """Submit the batch script, and write a record with the job's number to each run directory.

    Raises:
        RunError: SLURM refuses.
        OSError: a record can't be written; the job is cancelled.
    """
    for job in plan.jobs:
        job.run.logs.mkdir(parents=True, exist_ok=True)
    output = slurm("sbatch", "--parsable", text=plan.script, environment=without_slurm(os.environ))
    number = output.strip().partition(";")[0]
    array = len(plan.jobs) > 1
    records = []
    for index, job in enumerate(plan.jobs):
        name = log_name(array=array).replace("%j", number).replace("%A", number).replace("%a", str(index))
        identity = f"{number}_{index}" if array else number
        record = SubmissionRecord.of(job, engine="slurm", id=identity, plan=plan.script, log=str(job.run.logs / name))
        try:
            write_record(job.run, record)
        except OSError:
            slurm("scancel", number)
            raise
        records.append(record)
    return tuple(records)


def state(run: RunDir, record: SubmissionRecord) -> SubmissionState:
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


def log(run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
    """Yield the output of a submission in pieces, that of every start of its job; with ``follow`` until it ends."""
    return tail(Path(record.log), ended=lambda: not follow or state(run, record) not in ("queued", "running"))


def cancel(run: RunDir, record: SubmissionRecord) -> None:
    """Ask a submission to save and stop; the second time, end it at once.

    Raises:
        RunError: the job of the recorded number writes its output elsewhere: it is of something else.
    """
    output, project = describe(record.id).get("StdOut", ""), run.path.parent
    # `describe` cuts values off at the first blank.
    if output and not any(output.startswith(f"{path}/".partition(" ")[0]) for path in (project, project.resolve())):
        raise RunError(f"SLURM's job {record.id}, which {run.job(record.mode)} names, writes to {output}: not this run")
    slurm_state = state_of(record.id)
    note_cancelled(run, record)
    if slurm_state == "RUNNING" and not record.cancelled:
        # Only a signal to the processes of the job: a plain scancel also kills them after KillWait, mostly 30 s.
        slurm("scancel", "--signal=USR1", record.id)
    else:
        slurm("scancel", record.id)


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
    environment = {**os.environ, **_rendezvous(os.environ)}
    received: list[int] = []
    # The processes of the job get signals from SLURM themselves, and save: this program only waits for them.
    with handling_signals(lambda number, _: received.append(number)):
        code = exit_code(subprocess.run(srun_command(job, os.environ), env=environment, check=False).returncode)
    # SLURM kills processes that have not saved within its KillWait: after a signal, that is a preemption, no failure.
    return PREEMPTED if received and code == 128 + signal.SIGKILL else code


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
