"""The job: what to execute and with which resources, the same on every engine."""

from __future__ import annotations

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


_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(MiB|GiB|TiB|MB|GB|TB|M|G|T)", re.IGNORECASE)
_MEBIBYTES = {"m": 1, "g": 1024, "t": 1024**2}
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d{2}):(\d{2})")
_SPELLED = re.compile(r"(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+)s)?")


def parse_memory(text: str) -> int:
    """Memory in MiB: ``64GiB``, ``64GB`` and ``64G`` all mean 64 x 1024 MiB, as they do to schedulers.

    Raises:
        UsageError: anything else.
    """
    match = _MEMORY.fullmatch(text.strip())
    amount = round(float(match[1]) * _MEBIBYTES[match[2][0].lower()]) if match else 0
    if not amount:
        raise UsageError(f"--memory {text!r} is no amount of memory: write it as 64GiB or 512MiB")
    return amount


def parse_duration(text: str) -> timedelta:
    """A duration: ``90m``, ``36h``, ``2d12h``, ``12:00:00`` or ``2-12:00:00``.

    Raises:
        UsageError: anything else, a bare number too: schedulers disagree about its unit.
    """
    bare = text.strip()
    match = _CLOCK.fullmatch(bare) or _SPELLED.fullmatch(bare)
    if match:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        if length := timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds):
            return length
    raise UsageError(f"--time_limit {text!r} is no duration: write it as 90m, 36h, 2d12h or 12:00:00")


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` texts as a mapping; a value may hold anything, ``=`` too.

    Raises:
        UsageError: a text without ``=``, or a name given twice. The value is not repeated: it might be secret.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{option} takes NAME=VALUE; one of its values has no '='")
        if name in found:
            raise UsageError(f"{option} is given {name} twice")
        found[name] = value
    return found


def parse_mounts(texts: Sequence[str]) -> tuple[Mount, ...]:
    """``SOURCE:TARGET`` texts as mounts; the last colon parts them, so that a source may be ``weka://bucket``.

    Raises:
        UsageError: a text without a source or an absolute target.
    """
    found = []
    for text in texts:
        source, _, target = text.rpartition(":")
        if not source or not target.startswith("/") or target.startswith("//"):
            raise UsageError(f"--mounts {text!r}: write it as SOURCE:/absolute/target")
        found.append(Mount(source, target))
    return tuple(found)
