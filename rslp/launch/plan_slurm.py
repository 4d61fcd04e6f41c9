"""The plan of a SLURM job: the batch script, as text, and nothing that the text does not show."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path

from rslp.errors import UsageError
from rslp.launch.job import Job

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
