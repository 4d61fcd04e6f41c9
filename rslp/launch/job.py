"""The job: what to execute and with which resources, the same on every engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, get_args

from rslp.errors import UsageError
from rslp.run import RunDir

Mode = Literal["fit", "validate", "test", "predict"]
MODES: tuple[str, ...] = get_args(Mode)
Priority = Literal["low", "normal", "high", "urgent"]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Mount:
    """A folder or bucket that the job sees.

    Attributes:
        source: what is mounted, in the engine's words: a host's folder, ``weka://bucket``, a dataset's name.
        target: the absolute path at which the job sees it.
    """

    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run in one mode.

    Attributes:
        run: the run directory; everything the job needs is in it.
        mode: fit trains (or goes on training); validate and test evaluate a checkpoint; predict writes predictions.
        checkpoint: the checkpoint to evaluate or to predict with; None means the best one.
        name: what people see in the engine's lists; ``{project}/{experiment}`` when empty.
        nodes: machines.
        gpus: GPUs of each machine, and so its processes; on a machine without GPUs, processes on its CPU.
        cpus: processors of each machine; None leaves it to the engine.
        memory: main memory of each machine, MiB; None leaves it to the engine.
        time_limit: after this long the engine ends the job; None leaves it to the engine.
        priority: how urgent it is, for engines that ask.
        retries: how often a failed job is started again; a preempted one goes on without counting.
        preemptible: the engine may take the machine away, and starts the job again when it can.
        env: variables set in the job.
        secrets: variable in the job -> name of the secret; values are never in a job.
        mounts: what the job sees besides its image's file system.
        image: the container image, for engines that take one.
        clusters: where the job may run, for engines that ask.
    """

    run: RunDir
    mode: Mode = "fit"
    checkpoint: str | None = None
    name: str = ""
    nodes: int = 1
    gpus: int = 1
    cpus: int | None = None
    memory: int | None = None
    time_limit: timedelta | None = None
    priority: Priority = "high"
    retries: int = 0
    preemptible: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    image: str = ""
    clusters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no engine could run.

        Raises:
            UsageError: a count that is no count, or a variable that is no variable.
        """
        for what, count, least in (("nodes", self.nodes, 1), ("gpus", self.gpus, 1), ("retries", self.retries, 0)):
            if count < least:
                raise UsageError(f"--{what} must be at least {least}; got {count}")
        for variable in (*self.env, *self.secrets):
            if not _VARIABLE.fullmatch(variable):
                raise UsageError(f"{variable!r} can't be an environment variable: use letters, digits and '_'")
        if both := sorted(set(self.env) & set(self.secrets)):
            raise UsageError(f"{', '.join(both)} is given both by --env and by --secrets")

    @property
    def title(self) -> str:
        """The job's name for people."""
        return self.name or f"{self.run.project}/{self.run.experiment}"

    @property
    def ranks(self) -> int:
        """Processes of the job, over all machines."""
        return self.nodes * self.gpus

    def secret_variables(self) -> Mapping[str, str]:
        """Variable in the job -> variable of the launching shell that holds its value, where there is no secret store.

        Raises:
            UsageError: a secret's name can't be that of a variable.
        """
        for name, source in self.secrets.items():
            if not _VARIABLE.fullmatch(source):
                raise UsageError(f"--secrets {name}: {source!r} can't be an environment variable, and is read from one")
        return self.secrets

    def words(self) -> tuple[str, ...]:
        """The options of the job: which run, in which mode."""
        words = ("--run_dir", self.run.location, "--mode", self.mode)
        return words if self.checkpoint is None else (*words, "--checkpoint", self.checkpoint)

    def command(self, python: str) -> tuple[str, ...]:
        """The words of the job's command line, as each of its processes runs it.

        Args:
            python: the interpreter to start.
        """
        return (python, "-m", "rslp.main", "helios", "run", *self.words())
