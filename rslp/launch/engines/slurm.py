"""The SLURM engine: the batch script as text, its submission, and what runs inside the job.

Written as a program instead of in the script, so that it can be tested.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal

from rslp.errors import RunError, UsageError
from rslp.launch.engines.engine import SubmissionState
from rslp.launch.job import Job
from rslp.launch.processes import INTERRUPTED, PREEMPTED, exit_code, forwarded, free_port, tail
from rslp.launch.record import (
    SubmissionRecord,
    checked_code,
    note_cancelled,
    note_failure,
    note_standstill,
    read_record,
    steps_done,
    succeeded,
    write_record,
)
from rslp.rundir import RunDir


def slurm(*words: str, text: str = "", environment: Mapping[str, str] | None = None) -> str:
    """Run one of SLURM's commands.

    Args:
        *words: the command and its arguments.
        text: its standard input.
        environment: its variables; those of this process when None.

    Returns:
        What it printed.

    Raises:
        RunError: it is not there, or SLURM refused, in SLURM's own words.
    """
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=120, check=False, env=environment
        )
    except FileNotFoundError:
        raise RunError(f"{words[0]} is not there: launch from a machine that submits to SLURM") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{words[0]} did not answer within two minutes: is SLURM's controller up?") from None
    if done.returncode:
        raise RunError(f"SLURM refused: {_reason(done.stderr, words[0]) or f'exit code {done.returncode}'}")
    return done.stdout


def _reason(text: str, command: str) -> str:
    """What a command complained of, on one line."""
    lines = [re.sub(rf"^{command}: (error: )?", "", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def describe(job: str) -> dict[str, str]:
    """What the controller knows of a job; empty when it has forgotten it.

    Raises:
        RunError: the controller does not answer; or it is no number of a job, but an option, for example.
    """
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise RunError(f"{job!r} is no job of SLURM")
    try:
        text = slurm("scontrol", "--oneliner", "show", "job", job)
    except RunError as error:
        if "Invalid job id" in str(error) or " not found" in str(error):
            return {}
        raise
    # Values with blanks (names, paths) are cut; none of those is asked for.
    first = text.splitlines()[0] if text else ""
    return dict(pair.partition("=")[::2] for pair in first.split(" ") if "=" in pair)


def state_of(job: str) -> str:
    """A job's state in SLURM's words, from the controller or else from the accounting; empty when nobody knows."""
    if known := describe(job).get("JobState"):
        return known
    try:
        told = slurm("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job)
    except RunError:
        # Many clusters keep no accounts.
        return ""
    return told.split()[0] if told.split() else ""


def address_of(node: str) -> str:
    """The address of a node; its name may be SLURM's alone, and resolve nowhere.

    Args:
        node: SLURM's name of it.
    """
    text = slurm("scontrol", "--oneliner", "show", "node", node)
    match = re.search(r"\bNodeAddr=(\S+)", text)
    return match[1] if match else node


def first_node(nodes: str) -> str:
    """The first of a list in SLURM's short form, such as ``n[1-3,7]``."""
    return slurm("scontrol", "show", "hostnames", nodes).split()[0]


def without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those of a surrounding job: sbatch and srun would take them as options.

    SLURM_CONF stays, since it says where the cluster is.
    """
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI_"))
    }


NO_GPUS = "none"
_PLAIN = re.compile(r"[A-Za-z0-9_.,:;/@%=+\[\]-]+")


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What only SLURM asks.

    Attributes:
        partition: partition to run in; SBATCH_PARTITION when left out, then the cluster's default.
        account: account to charge; SBATCH_ACCOUNT when left out.
        qos: quality of service; SBATCH_QOS when left out.
        gres: generic resources of each node, as sbatch's --gres, instead of --gpus-per-node; none asks for no GPUs.
        constraint: features that the nodes must have.
        array_limit: how many runs of an array may run at once.
        notice: seconds between the warning and the time limit; the run saves and is queued again.
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
    """What is submitted.

    Attributes:
        jobs: what it is for: one job, or the jobs of an array, which differ in their run alone.
        script: the batch script, which sbatch reads from its standard input.
        secrets: variables of this environment that the script reads secrets from.
    """

    jobs: tuple[Job, ...]
    script: str
    secrets: tuple[str, ...]

    def __str__(self) -> str:
        """The batch script."""
        return self.script.rstrip("\n")


def plan_slurm(jobs: Sequence[Job], options: SlurmOptions, *, folder: Path, python: str = sys.executable) -> SlurmPlan:
    """Plan one job, or an array of jobs that differ in their run alone.

    Args:
        jobs: what to execute.
        options: what only SLURM asks.
        folder: where the job starts; class paths of the user's own may be found there.
        python: the interpreter, at a path that all nodes see.

    Raises:
        UsageError: what SLURM has no word for.
    """
    job = jobs[0]
    if job.mounts:
        raise UsageError("SLURM jobs see the file system of their nodes: leave out --mounts")
    directives = [f"#SBATCH {_directive(option)}" for option in _options(jobs, options, folder=folder)]
    exports = [
        "export RSLP_RANKS=slurm",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(job.env.items())),
        # The value comes with the environment that sbatch is called from; it stands nowhere in the script.
        *(f'export {name}="${source}"' for name, source in sorted(job.secret_variables().items())),
    ]
    lines = ["#!/bin/bash", *directives, "", *exports, f"exec {shlex.join(_command(jobs, python))}", ""]
    return SlurmPlan(jobs=tuple(jobs), script="\n".join(lines), secrets=tuple(sorted(set(job.secrets.values()))))


def _command(jobs: Sequence[Job], python: str) -> Iterator[str]:
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
    """The options of sbatch, without quotes."""
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
    # To the processes of the training, not to the batch script: they save, and the script queues the job again.
    yield f"--signal=USR1@{options.notice}"
    yield "--requeue" if job.preemptible or job.retries else "--no-requeue"
    yield "--open-mode=append"
    yield f"--chdir={folder}"
    yield f"--output={_literal(job.run.logs)}/{log_name(array=array)}"
    yield from options.extra


def _resources(job: Job, options: SlurmOptions) -> Iterator[str]:
    if options.gres is None:
        yield f"--gpus-per-node={job.gpus}"
    elif options.gres != NO_GPUS:
        yield f"--gres={options.gres}"
    if job.cpus is not None:
        yield f"--cpus-per-task={max(1, job.cpus // job.gpus)}"
    if job.memory is not None:
        yield f"--mem={job.memory}M"
    if job.time_limit is not None:
        yield f"--time={_clock(job.time_limit)}"


def log_name(*, array: bool) -> str:
    """The log's file name in SLURM's words: numbers of the job (and of its part) are filled in."""
    return "slurm-%A_%a.log" if array else "slurm-%j.log"


def _clock(limit: timedelta) -> str:
    """A duration as D-HH:MM:SS."""
    hours, rest = divmod(limit.seconds, 3600)
    return f"{limit.days}-{hours:02}:{rest // 60:02}:{rest % 60:02}"


def _literal(path: Path) -> str:
    """A path in a file name pattern of SLURM, where ``%`` is a sign.

    Raises:
        UsageError: it holds a backslash, which switches the signs off.
    """
    if "\\" in str(path):
        raise UsageError(f"{path} can't be named in a batch script: it holds a backslash")
    return str(path).replace("%", "%%")


def _directive(option: str) -> str:
    """One option as a line of a batch script takes it: sbatch knows double quotes and backslashes, and expands nothing.

    Raises:
        UsageError: it holds a line break, which no such line can.
    """
    if "\n" in option or "\r" in option:
        raise UsageError(f"{option!r} can't stand in a batch script: it holds a line break")
    if _PLAIN.fullmatch(option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'


def defaults_from(environment: Mapping[str, str], options: SlurmOptions) -> SlurmOptions:
    """The options with those that people keep in SBATCH_PARTITION and its like, so that the plan shows them."""
    found = {
        name: environment[f"SBATCH_{name.upper()}"]
        for name in ("partition", "account", "qos")
        if getattr(options, name) is None and environment.get(f"SBATCH_{name.upper()}")
    }
    given = {item.name: getattr(options, item.name) for item in fields(options)}
    return SlurmOptions(**{**given, **found})


_STATES: dict[str, SubmissionState] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"), "queued"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED"), "running"),
    **dict.fromkeys(("TIMEOUT", "PREEMPTED"), "stopped"),
    "CANCELLED": "cancelled",
}


def check_with_sbatch(plan: SlurmPlan) -> None:
    """Ask SLURM whether it would take the plan; nothing is submitted.

    Raises:
        RunError: it would not, in SLURM's own words.
        UsageError: a secret's variable is not set.
    """
    for source in plan.secrets:
        if source not in os.environ:
            raise UsageError(f"--secrets: the variable {source} is not set here")
    slurm("sbatch", "--test-only", text=plan.script, environment=without_slurm(os.environ))


def submit(plan: SlurmPlan) -> tuple[SubmissionRecord, ...]:
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
        record = SubmissionRecord.of(job, engine="slurm", id=identity, plan=plan.script, log=str(job.run.logs / name))
        try:
            write_record(job.run, record)
        except OSError:
            slurm("scancel", number)
            raise
        records.append(record)
    return tuple(records)


def state(run: RunDir, record: SubmissionRecord) -> SubmissionState:
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


def log(run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
    """The output of a submission, over all its starts."""
    return tail(Path(record.log), ended=lambda: not follow or state(run, record) not in ("queued", "running"))


def cancel(run: RunDir, record: SubmissionRecord) -> None:
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
    with _signals_ignored() as received:
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
def _signals_ignored() -> Iterator[list[int]]:
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
