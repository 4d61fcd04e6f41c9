"""The local engine: runs the job in the foreground of this terminal, or in the background."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rslp.errors import RunError, UsageError
from rslp.io import is_remote
from rslp.io.locks import no_links
from rslp.launch.engines.engine import SubmissionState
from rslp.launch.job import Job
from rslp.launch.processes import tail
from rslp.launch.record import SubmissionRecord, note_cancelled, succeeded, write_record
from rslp.rundir import RunDir

_CLUSTER_OPTIONS = ("nodes", "cpus", "memory", "time_limit", "mounts")


@dataclass(frozen=True)
class LocalPlan:
    """A command of this machine.

    Attributes:
        job: the job.
        command: the program and its arguments.
        environment: variables that are set besides the inherited ones.
        secrets: variable in the job -> the variable of this environment with its value.
        unset: inherited variables that the job does not get: in a shell inside a cluster's job they mislead.
        log: the file for the output of a job in the background; None runs the job in the foreground.
    """

    job: Job
    command: tuple[str, ...]
    environment: Mapping[str, str]
    secrets: Mapping[str, str]
    unset: tuple[str, ...] = ("RSLP_RANKS",)
    log: Path | None = None

    def __str__(self) -> str:
        """The plan as an equivalent shell command."""
        words = [
            "env",
            *(f"--unset={name}" for name in self.unset),
            *(f"{name}={shlex.quote(value)}" for name, value in self.environment.items()),
            *(f'{name}="${source}"' for name, source in self.secrets.items()),
            *map(shlex.quote, self.command),
        ]
        if self.log is None:
            return " ".join(words)
        return " ".join(["setsid", *words, "</dev/null", f">>{shlex.quote(str(self.log))}", "2>&1", "&"])


def plan_local(job: Job, *, detach: bool = False) -> LocalPlan:
    """Plan a job for this machine.

    Args:
        job: the job.
        detach: whether it runs in the background, with its output in the run directory.

    Raises:
        UsageError: the job has options that only clusters have.
    """
    plain = Job(run=job.run)
    if given := [name for name in _CLUSTER_OPTIONS if getattr(job, name) != getattr(plain, name)]:
        raise UsageError(f"a local run takes no {', '.join('--' + name for name in given)}: that is for clusters")
    command = job.command(sys.executable)
    if job.gpus > 1 or job.retries:
        retries = ("--retries", str(job.retries)) if job.retries else ()
        command = (*command[:4], "run_ranks", *job.options(), "--ranks", str(job.gpus), *retries)
    log = job.run.logs / f"local-{job.mode}.log" if detach else None
    return LocalPlan(job=job, command=command, environment=job.env, secrets=job.secret_variables(), log=log)


def submit(plan: LocalPlan) -> SubmissionRecord:
    """Start the planned command; returns only when it runs in the background.

    In the foreground the command replaces this process: Ctrl-C, SIGTERM and SIGKILL then reach the training itself, and
    no orphaned training can run on.

    Raises:
        UsageError: a secret's variable is not set.
    """
    environment = variables(plan)
    sys.stdout.flush()
    sys.stderr.flush()
    if plan.log is None:
        # A run on an object store has a lease instead, which names host and process.
        if not is_remote(plan.job.run.location):
            write_record(plan.job.run, _record(plan, os.getpid()))
        os.execve(plan.command[0], plan.command, environment)
    plan.log.parent.mkdir(parents=True, exist_ok=True)
    with open(plan.log, "ab", opener=no_links) as log:
        process = subprocess.Popen(
            plan.command,
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    record = _record(plan, process.pid)
    try:
        write_record(plan.job.run, record)
    except OSError:
        # Without a record, nobody could follow or cancel it.
        process.kill()
        process.wait()
        raise
    return record


def variables(plan: LocalPlan) -> dict[str, str]:
    """The job's environment, with the secrets' values.

    Raises:
        UsageError: a secret's variable is not set.
    """
    for source in plan.secrets.values():
        if source not in os.environ:
            raise UsageError(f"--secrets: the variable {source} is not set here")
    inherited = {name: value for name, value in os.environ.items() if name not in plan.unset}
    return {**inherited, **plan.environment, **{name: os.environ[source] for name, source in plan.secrets.items()}}


def state(run: RunDir, record: SubmissionRecord) -> SubmissionState:
    """The state of a local submission."""
    pid, host, started = _identity(run, record)
    if host != socket.gethostname():
        return "succeeded" if succeeded(run, record) else "unknown"
    if _is_job_of(run, pid, started):
        return "running"
    if succeeded(run, record):
        return "succeeded"
    if record.cancelled:
        return "cancelled"
    return "stopped" if run.read_state().get("state") in ("preempted", "interrupted") else "failed"


def log(run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
    """The output of a submission in the background.

    Raises:
        RunError: it ran in the foreground.
    """
    if not record.log:
        raise RunError(f"{run.path} was started in the foreground: its output went to the terminal alone")
    return tail(Path(record.log), ended=lambda: not follow or state(run, record) != "running")


def cancel(run: RunDir, record: SubmissionRecord) -> None:
    """Ask the process to save and stop.

    Raises:
        RunError: it runs on another machine.
    """
    pid, host, started = _identity(run, record)
    if host != socket.gethostname():
        raise RunError(f"{run.path} runs on {host}: cancel it there")
    note_cancelled(run, record)
    if _is_job_of(run, pid, started):
        os.kill(pid, signal.SIGTERM)


def _record(plan: LocalPlan, pid: int) -> SubmissionRecord:
    # Process ids are reused; with the time of the start they are unique.
    identity = f"{pid}@{socket.gethostname()}@{_started(pid)}"
    return SubmissionRecord.of(plan.job, engine="local", id=identity, plan=str(plan), log=str(plan.log or ""))


def _identity(run: RunDir, record: SubmissionRecord) -> tuple[int, str, str]:
    """Process id, host and start time of a submission; a ``RunError`` if the record's id is not of that form."""
    if not (parts := re.fullmatch(r"([1-9]\d*)@([^@\s]*)@(\d*)", record.id)):
        raise RunError(f"{run.job(record.mode)}: {record.id!r} is not the id of a local job")
    return int(parts[1]), parts[2], parts[3]


def _is_job_of(run: RunDir, pid: int, started: str) -> bool:
    """Whether a process runs a job of this run: others may write to the file that names the process."""
    if not started or _started(pid) != started:
        return False
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="surrogateescape").split("\0")
        folder = arguments[arguments.index("--run_dir") + 1]
        return "rslp.main" in arguments and Path(folder).samefile(run.path)
    except (OSError, ValueError, IndexError):
        return False


def _started(pid: int) -> str:
    """Start time of a process in the kernel's ticks since boot; empty when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    state, start = fields[0], fields[19]
    return "" if state == "Z" else start
