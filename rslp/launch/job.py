"""The job: one run in one mode with its resources, the same for every engine; and parsers of its options."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, get_args

from rslp.errors import UsageError
from rslp.rundir import RunDir

Mode = Literal["fit", "validate", "test", "predict"]
MODES: tuple[str, ...] = get_args(Mode)
Priority = Literal["low", "normal", "high", "urgent"]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Mount:
    """A folder or bucket that is mounted in the job.

    Attributes:
        source: the folder or bucket, as the engine names it: a host's folder, ``weka://bucket``, a dataset's name.
        target: the absolute path in the job.
    """

    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run in one mode, with its resources.

    Attributes:
        run: the run directory, with everything that the job needs.
        mode: fit trains, or resumes a training; validate and test evaluate a checkpoint; predict writes predictions.
        checkpoint: the checkpoint to evaluate or to predict with; None means the best one.
        name: name of the job in the engine's lists; ``{project}/{experiment}`` when empty.
        nodes: number of machines.
        gpus: GPUs of each machine, and so its processes; on a machine without GPUs, processes on its CPU.
        cpus: processors of each machine; None means the engine's default.
        memory: main memory of each machine, MiB; None means the engine's default.
        time_limit: time after which the engine ends the job; None means the engine's default.
        priority: priority, for engines that have one.
        retries: how often a failed job is started again; preemption does not count.
        preemptible: whether the engine may take the machine away; it starts the job again when it can.
        env: environment variables of the job.
        secrets: variable in the job -> name of the secret; a job never holds the values.
        mounts: folders and buckets besides the image's file system.
        image: the container image, for engines that use one.
        clusters: clusters that the job may run on, for engines that have several.
        evaluate: after a training, evaluate its best checkpoint on both splits, in the same job.
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
    evaluate: bool = False

    def __post_init__(self) -> None:
        """Raise ``UsageError`` if a number is too small, or the name of a variable is impossible or given twice."""
        for option, count, least in (("nodes", self.nodes, 1), ("gpus", self.gpus, 1), ("retries", self.retries, 0)):
            if count < least:
                raise UsageError(f"--{option} must be at least {least}; got {count}")
        if self.evaluate and (self.mode != "fit" or self.ranks > 1):
            raise UsageError("--evaluate is for a training of one process; --do_eval true evaluates any run")
        for variable in (*self.env, *self.secrets):
            if not _VARIABLE.fullmatch(variable):
                raise UsageError(f"{variable!r} can't be an environment variable: use letters, digits and '_'")
        if both := sorted(set(self.env) & set(self.secrets)):
            raise UsageError(f"{', '.join(both)} is given both by --env and by --secrets")

    @property
    def title(self) -> str:
        """The job's name in the engine's lists."""
        return self.name or f"{self.run.project}/{self.run.experiment}"

    @property
    def ranks(self) -> int:
        """Number of processes of the job on all machines."""
        return self.nodes * self.gpus

    def secret_variables(self) -> Mapping[str, str]:
        """Variable in the job -> variable of the launching shell with its value, for engines without secrets.

        Raises:
            UsageError: a secret's name is no possible name of a variable.
        """
        for name, source in self.secrets.items():
            if not _VARIABLE.fullmatch(source):
                raise UsageError(f"--secrets {name}: {source!r} can't be an environment variable, and is read from one")
        return self.secrets

    def secret_values(self) -> dict[str, str]:
        """Variable in the job -> its value in the launching shell.

        Raises:
            UsageError: it is not set there.
        """
        for source in self.secret_variables().values():
            if source not in os.environ:
                raise UsageError(f"--secrets: the variable {source} is not set here")
        return {name: os.environ[source] for name, source in self.secrets.items()}

    def options(self) -> tuple[str, ...]:
        """Run directory, mode and checkpoint as options of the job's command line."""
        options = ["--run_dir", self.run.location, "--mode", self.mode]
        options += [] if self.checkpoint is None else ["--checkpoint", self.checkpoint]
        return (*options, "--evaluate", "true") if self.evaluate else tuple(options)

    def command(self, python: str) -> tuple[str, ...]:
        """The command line of one process of the job, by an interpreter; where it has one, the job's."""
        return (python, "-m", "rslp.main", "helios", "run", *self.options())

    def ranks_command(self, python: str) -> tuple[str, ...]:
        """The command line that starts all processes of one machine, by an interpreter.

        With several machines, ``--nodes``, ``--node``, ``--address`` and ``--port`` are to be added.
        """
        return (python, "-m", "rslp.main", "helios", "run_ranks", *self.options(), "--ranks", str(self.gpus))


_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(MiB|GiB|TiB|MB|GB|TB|M|G|T)", re.IGNORECASE)
_MEBIBYTES = {"m": 1, "g": 1024, "t": 1024**2}
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d{2}):(\d{2})")
_SPELLED = re.compile(r"(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+)s)?")


def parse_memory(text: str) -> int:
    """Parse memory to MiB: ``64GiB``, ``64GB`` and ``64G`` all mean 64 x 1024 MiB, as they do for schedulers.

    Raises:
        UsageError: the text is not of such a form, or is zero.
    """
    match = _MEMORY.fullmatch(text.strip())
    amount = round(float(match[1]) * _MEBIBYTES[match[2][0].lower()]) if match else 0
    if not amount:
        raise UsageError(f"--memory {text!r} is no amount of memory: write it as 64GiB or 512MiB")
    return amount


def parse_duration(text: str) -> timedelta:
    """Parse a duration: ``90m``, ``36h``, ``2d12h``, ``12:00:00`` or ``2-12:00:00``.

    Raises:
        UsageError: the text is not of such a form; nor is a bare number, of which schedulers assume different units.
    """
    bare = text.strip()
    match = _CLOCK.fullmatch(bare) or _SPELLED.fullmatch(bare)
    if match:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        if length := timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds):
            return length
    raise UsageError(f"--time_limit {text!r} is no duration: write it as 90m, 36h, 2d12h or 12:00:00")


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Parse ``NAME=VALUE`` texts; a value may contain ``=``, too.

    Raises:
        UsageError: a text without ``=``, or a name given twice. The message leaves out the value, which may be secret.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{option} takes NAME=VALUE; one of its values has no '='")
        if name in pairs:
            raise UsageError(f"{option} is given {name} twice")
        pairs[name] = value
    return pairs


def parse_mounts(texts: Sequence[str]) -> tuple[Mount, ...]:
    """Parse ``SOURCE:TARGET`` texts, split at the last colon, so that a source may be ``weka://bucket``.

    Raises:
        UsageError: a text without a source or an absolute target.
    """
    mounts = []
    for text in texts:
        source, _, target = text.rpartition(":")
        if not source or not target.startswith("/") or target.startswith("//"):
            raise UsageError(f"--mounts {text!r}: write it as SOURCE:/absolute/target")
        mounts.append(Mount(source, target))
    return tuple(mounts)
