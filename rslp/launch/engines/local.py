"""The local engine: runs the job in the foreground of this terminal, or in the background."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rslp.errors import RunError, UsageError
from rslp.io import is_remote
from rslp.io.locks import no_links
from rslp.io.terminal import LOG_VARIABLE
from rslp.launch.engines.engine import Engine, Plan, SubmissionState, refuse_object_store
from rslp.launch.engines.options import EngineOptions
from rslp.launch.job import Job
from rslp.launch.processes import Supervisor, tail
from rslp.launch.record import SubmissionRecord, note_cancelled, succeeded, write_record
from rslp.rundir import RunDir

_CLUSTER_OPTIONS = ("nodes", "cpus", "memory", "time_limit", "mounts")
# An inherited variable that the job does not get: in a shell inside a cluster's job it misleads.
_UNSET = "RSLP_RANKS"


@dataclass(frozen=True, kw_only=True)
class LocalPlan(Plan):
    """A command of this machine; the text is an equivalent shell command.

    Attributes:
        command: the program and its arguments.
        log: the file for the output of a job in the background; None runs the job in the foreground.
    """

    command: tuple[str, ...]
    log: Path | None


class LocalEngine(Engine[LocalPlan]):
    """Jobs are processes of this machine."""

    def plan(self, jobs: Sequence[Job], options: EngineOptions) -> LocalPlan:
        """Plan a job for this machine; see ``Engine``."""
        (job,) = jobs
        plain = Job(run=job.run)
        if given := [name for name in _CLUSTER_OPTIONS if getattr(job, name) != getattr(plain, name)]:
            raise UsageError(f"a local run takes no {', '.join('--' + name for name in given)}: that is for clusters")
        if options.detach:
            refuse_object_store(jobs)
        command = job.command(sys.executable)
        if job.gpus > 1 or job.retries:
            retries = ("--retries", str(job.retries)) if job.retries else ()
            command = (*job.ranks_command(sys.executable), *retries)
        log = job.run.logs / f"local-{job.mode}.log" if options.detach else None
        return LocalPlan(jobs=(job,), text=_shell_command(job, command, log), command=command, log=log)

    def verify(self, plan: LocalPlan, configs: Sequence[Mapping[str, Any]]) -> None:  # noqa: ARG002
        """Raise ``UsageError`` if a secret's variable is not set."""
        plan.jobs[0].secret_values()

    def submit(self, plan: LocalPlan) -> tuple[SubmissionRecord, ...]:
        """Start the planned command; returns only when it runs in the background.

        In the foreground the command replaces this process: Ctrl-C, SIGTERM and SIGKILL then reach the training itself,
        and no orphaned training can run on.
        """
        (job,) = plan.jobs
        environment = _environment(job)
        sys.stdout.flush()
        sys.stderr.flush()
        if plan.log is None:
            # A run on an object store has a lease instead, which names host and process.
            if not is_remote(job.run.location):
                log_path = job.run.logs / f"local-{job.mode}.log"
                write_record(job.run, _record(replace(plan, log=log_path), os.getpid()))
                log_path.parent.mkdir(parents=True, exist_ok=True)
                environment[LOG_VARIABLE] = str(log_path)
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
            write_record(job.run, record)
        except (OSError, RunError):
            # Without a record, nobody could follow or cancel it.
            process.kill()
            process.wait()
            raise
        return (record,)

    def run(self, plan: LocalPlan) -> tuple[int, bool]:
        """Run a planned command that has a log as a child of this process, which gets its signals and ends with it.

        Returns:
            The exit code, and whether this process was asked by a signal to end.
        """
        (job,) = plan.jobs
        job.run.logs.mkdir(parents=True, exist_ok=True)
        with Supervisor() as supervisor:
            pid = supervisor.start(plan.command, _environment(job), output=plan.log)
            write_record(job.run, _record(plan, pid))
            supervisor.wait()
        return supervisor.code(), bool(supervisor.received)

    def state(self, run: RunDir, record: SubmissionRecord) -> SubmissionState:
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

    def log(self, run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
        """The output of a submission; of one in the foreground the messages alone, without tables and bars.

        Raises:
            RunError: it was submitted by an earlier version, in the foreground.
        """
        if not record.log:
            raise RunError(f"{run.path} was started in the foreground: its output went to the terminal alone")
        return tail(Path(record.log), ended=lambda: not follow or self.state(run, record) != "running")

    def cancel(self, run: RunDir, record: SubmissionRecord) -> None:
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


def _environment(job: Job) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in (_UNSET, LOG_VARIABLE)}
    return {**inherited, **job.env, **job.secret_values()}


def _shell_command(job: Job, command: Sequence[str], log: Path | None) -> str:
    words = [
        *("env", f"--unset={_UNSET}"),
        *(f"{name}={shlex.quote(value)}" for name, value in job.env.items()),
        *(f'{name}="${source}"' for name, source in job.secret_variables().items()),
        *map(shlex.quote, command),
    ]
    if log is not None:
        words = ["setsid", *words, "</dev/null", f">>{shlex.quote(str(log))}", "2>&1", "&"]
    return " ".join(words)


def _record(plan: LocalPlan, pid: int) -> SubmissionRecord:
    # Process ids are reused; with the time of the start they are unique.
    identity = f"{pid}@{socket.gethostname()}@{_started(pid)}"
    return SubmissionRecord.of(plan.jobs[0], engine="local", id=identity, plan=str(plan), log=str(plan.log or ""))


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
