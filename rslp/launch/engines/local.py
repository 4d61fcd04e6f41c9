"""The local engine: one command in the foreground of this terminal, or in the background."""

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

_OF_CLUSTERS = ("nodes", "cpus", "memory", "time_limit", "mounts")


@dataclass(frozen=True)
class LocalPlan:
    """What is executed here.

    Attributes:
        job: what it is for.
        command: the words, first the program.
        environment: variables set besides the inherited ones.
        secrets: variable in the job -> the variable of this environment that holds its value.
        unset: inherited variables that the job does not get: a shell inside a cluster's job has misleading ones.
        log: the file that takes the output of a job in the background; None runs in the foreground.
    """

    job: Job
    command: tuple[str, ...]
    environment: Mapping[str, str]
    secrets: Mapping[str, str]
    unset: tuple[str, ...] = ("RSLP_RANKS",)
    log: Path | None = None

    def __str__(self) -> str:
        """The plan as a line that a shell would run to the same effect."""
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
        job: what to execute.
        detach: in the background, with its output in the run directory.

    Raises:
        UsageError: the job asks for what only a cluster can give.
    """
    plain = Job(run=job.run)
    if asked := [name for name in _OF_CLUSTERS if getattr(job, name) != getattr(plain, name)]:
        raise UsageError(f"a local run takes no {', '.join('--' + name for name in asked)}: that is for clusters")
    command = job.command(sys.executable)
    if job.gpus > 1 or job.retries:
        more = ("--retries", str(job.retries)) if job.retries else ()
        command = (*command[:4], "run_ranks", *job.words(), "--ranks", str(job.gpus), *more)
    log = job.run.logs / f"local-{job.mode}.log" if detach else None
    return LocalPlan(job=job, command=command, environment=job.env, secrets=job.secret_variables(), log=log)


def submit(plan: LocalPlan) -> SubmissionRecord:
    """Start the planned process; returns only when it was started in the background.

    In the foreground the launcher becomes the process instead of starting a child: Ctrl-C, SIGTERM and SIGKILL then
    reach the training itself, and no orphan can go on training.

    Raises:
        UsageError: a secret's variable is not set.
    """
    environment = variables(plan)
    sys.stdout.flush()
    sys.stderr.flush()
    if plan.log is None:
        # Where a run on an object store runs is seen by its lease.
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
        # Nobody could follow or cancel it.
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
    """How a local submission stands."""
    pid, host, started = _identity(run, record)
    if host != socket.gethostname():
        return "succeeded" if succeeded(run, record) else "unknown"
    if _is_its(run, pid, started):
        return "running"
    if succeeded(run, record):
        return "succeeded"
    if record.cancelled:
        return "cancelled"
    return "stopped" if _left(run) else "failed"


def log(run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
    """The output of a submission in the background.

    Raises:
        RunError: it ran in a terminal.
    """
    if not record.log:
        raise RunError(f"{run.path} was started in the foreground: its output went to the terminal, and is not kept")
    return tail(Path(record.log), ended=lambda: not follow or state(run, record) != "running")


def cancel(run: RunDir, record: SubmissionRecord) -> None:
    """Ask the process to save and leave.

    Raises:
        RunError: it runs on another machine.
    """
    pid, host, started = _identity(run, record)
    if host != socket.gethostname():
        raise RunError(f"{run.path} runs on {host}: cancel it there")
    note_cancelled(run, record)
    if _is_its(run, pid, started):
        os.kill(pid, signal.SIGTERM)


def _record(plan: LocalPlan, pid: int) -> SubmissionRecord:
    # A process id comes back one day; with the time of its start it does not.
    identity = f"{pid}@{socket.gethostname()}@{_started(pid)}"
    return SubmissionRecord.of(plan.job, engine="local", id=identity, plan=str(plan), log=str(plan.log or ""))


def _identity(run: RunDir, record: SubmissionRecord) -> tuple[int, str, str]:
    if not (parts := re.fullmatch(r"([1-9]\d*)@([^@\s]*)@(\d*)", record.id)):
        raise RunError(f"{run.job(record.mode)}: {record.id!r} names no process of a local run")
    return int(parts[1]), parts[2], parts[3]


def _is_its(run: RunDir, pid: int, started: str) -> bool:
    """Whether a process is at work on this run: others may write to the file that names it."""
    if not started or _started(pid) != started:
        return False
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="surrogateescape").split("\0")
        named = words[words.index("--run_dir") + 1]
        return "rslp.main" in words and Path(named).samefile(run.path)
    except (OSError, ValueError, IndexError):
        return False


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks since boot; empty when it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    state, start = fields[0], fields[19]
    return "" if state == "Z" else start


def _left(run: RunDir) -> bool:
    """Whether the run's last words are that it was asked to leave."""
    return run.read_state().get("state") in ("preempted", "interrupted")
