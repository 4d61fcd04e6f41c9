"""The plan of a local job: one command, in the foreground of this terminal or in the background."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rslp.errors import UsageError
from rslp.launch.job import Job

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
