"""The plan of a local job: one command in the foreground of this terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from rslp.launch.job import Job


@dataclass(frozen=True)
class LocalPlan:
    """What is executed here.

    Attributes:
        command: the words, first the program.
        environment: variables set besides the inherited ones.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """The plan as a line that a shell would run to the same effect."""
        return (
            " ".join([f"{key}={shlex.quote(value)}" for key, value in self.environment.items()])
            + (" " if self.environment else "")
            + shlex.join(self.command)
        )


def plan_local(job: Job) -> LocalPlan:
    """Plan a job for this machine."""
    return LocalPlan(command=job.command(sys.executable), environment={})
