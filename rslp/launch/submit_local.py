"""Run a local plan, in the foreground or in the background, and follow it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rslp.errors import RunError, UsageError
from rslp.files import is_remote
from rslp.files.locks import no_links
from rslp.launch.engines import State
from rslp.launch.outcome import succeeded
from rslp.launch.plan_local import LocalPlan
from rslp.launch.record import Record, note_cancelled, write_record
from rslp.launch.tail import tail
from rslp.run import RunDir


def submit(plan: LocalPlan) -> Record:
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


def state(run: RunDir, record: Record) -> State:
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


def log(run: RunDir, record: Record, *, follow: bool) -> Iterator[str]:
    """The output of a submission in the background.

    Raises:
        RunError: it ran in a terminal.
    """
    if not record.log:
        raise RunError(f"{run.path} was started in the foreground: its output went to the terminal, and is not kept")
    return tail(Path(record.log), ended=lambda: not follow or state(run, record) != "running")


def cancel(run: RunDir, record: Record) -> None:
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


def _record(plan: LocalPlan, pid: int) -> Record:
    # A process id comes back one day; with the time of its start it does not.
    identity = f"{pid}@{socket.gethostname()}@{_started(pid)}"
    return Record.of(plan.job, engine="local", id=identity, plan=str(plan), log=str(plan.log or ""))


def _identity(run: RunDir, record: Record) -> tuple[int, str, str]:
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
