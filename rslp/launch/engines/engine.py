"""What an engine is, what a plan is, and the table of all engines."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from rslp.errors import LaunchError, RunError, UsageError
from rslp.launch.engines.options import EngineOptions
from rslp.launch.job import Job, Mode
from rslp.launch.record import SubmissionRecord, read_record
from rslp.launch.remote import readable_run
from rslp.rundir import RunDir

SubmissionState = Literal["queued", "running", "succeeded", "failed", "stopped", "cancelled", "unknown"]


class SubmissionUncertainError(LaunchError):
    """Whether the engine has accepted a job is unknown: the config and the record of the run stay."""


# Name -> class. Another engine is a file in this folder and a row here.
ENGINES = {
    "local": "rslp.launch.engines.local:LocalEngine",
    "slurm": "rslp.launch.engines.slurm:SlurmEngine",
    "beaker": "rslp.launch.engines.beaker:BeakerEngine",
    "skypilot": "rslp.launch.engines.skypilot:SkyPilotEngine",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Exactly what is submitted: ``str`` shows all of it.

    Attributes:
        jobs: one job, or the jobs of an array, which differ only in their run.
        text: what the engine is given, or the same in another form.
    """

    jobs: tuple[Job, ...]
    text: str

    def __str__(self) -> str:
        """The text."""
        return self.text


EnginePlan = TypeVar("EnginePlan", bound=Plan)


@contextmanager
def written(run: RunDir, path: Path, content: str) -> Iterator[None]:
    """Write a file of a run for a submission, which is the block; after an exception the former content is there again.

    After a ``SubmissionUncertainError``, it stays.

    Args:
        run: the run directory, a folder or on an object store.
        path: the file.
        content: its new content.
    """
    files, name = run.files(), path.name
    former = files.read(name)
    files.write(name, content.encode())
    try:
        yield
    except SubmissionUncertainError:
        raise
    except BaseException:
        if former is None:
            files.delete(name)
        else:
            files.write(name, former)
        raise


class Engine(ABC, Generic[EnginePlan]):
    """Where jobs run: plans them, submits a plan, and follows what was submitted.

    Attributes:
        remote: whether its jobs do not see this machine's disks, so that their runs lie on an object store.
        takes_arrays: whether a plan may have several jobs.
    """

    remote: ClassVar[bool] = False
    takes_arrays: ClassVar[bool] = False

    @abstractmethod
    def plan(self, jobs: Sequence[Job], options: EngineOptions) -> EnginePlan:
        """Plan jobs; nothing is written or sent.

        Each field of a job is honoured, refused, or of no effect there by its description. The processes of one machine
        are started by ``Job.ranks_command`` where ``Job.ranks`` is above 1, otherwise by ``Job.command``.

        Args:
            jobs: one job, or several that differ only in their run.
            options: the options of this engine, among others.

        Raises:
            UsageError: the engine lacks something that the job asks for.
        """

    def verify(self, plan: EnginePlan, configs: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a plan that could not be submitted, before the check of the data, which takes longer.

        Args:
            plan: the plan.
            configs: the config of each job's run.

        Raises:
            UserError: it could not be submitted.
        """

    @abstractmethod
    def submit(self, plan: EnginePlan) -> tuple[SubmissionRecord, ...]:
        """Submit a plan, and write a record to the run directory of each job; returns them in the order of the jobs.

        An engine that only shows its plans refuses them in ``verify``, before anything is written.

        After an exception, nothing has been submitted, unless it is a ``SubmissionUncertainError``.
        """

    @abstractmethod
    def state(self, run: RunDir, record: SubmissionRecord) -> SubmissionState:
        """The state of a submission; ``succeeded`` only if its result is in the run directory.

        While it is ``queued`` or ``running``, the run can't be submitted again.
        """

    @abstractmethod
    def log(self, run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
        """Yield the output of a submission in pieces, that of all starts of its job; with ``follow`` until it ends."""

    @abstractmethod
    def cancel(self, run: RunDir, record: SubmissionRecord) -> None:
        """Ask a submission to save and stop."""


def engine(name: str) -> Engine[Any]:
    """The engine of a name.

    Raises:
        UsageError: no engine has this name.
    """
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}; known: {', '.join(ENGINES)}")
    module, _, kind = ENGINES[name].partition(":")
    made: Engine[Any] = getattr(importlib.import_module(module), kind)()
    return made


def known_state(run: RunDir, record: SubmissionRecord) -> SubmissionState | None:
    """The state of a submission, or None when its engine does not answer from this machine."""
    try:
        return engine(record.engine).state(run, record)
    except (RunError, LaunchError, UsageError):
        return None


def ensure_not_active(location: str, mode: Mode) -> None:
    """Refuse to submit a job that was submitted before and has not ended: its config must not change.

    Args:
        location: the run directory, a folder or a URL.
        mode: the mode of the job.

    Raises:
        RunError: the run's last job in this mode is queued or running.
        StoreError: the run directory is on an object store that can't be reached.
    """
    with readable_run(location) as run:
        record = read_record(run, mode)
        state = known_state(run, record) if record else None
    if record and state in ("queued", "running"):
        name = record.id.partition("@")[0]
        raise RunError(f"{location} is {state} already ({record.engine} {name}); `helios cancel` ends that first")


def refuse_object_store(jobs: Sequence[Job]) -> None:
    """Raise ``UsageError`` if a run lies on an object store, where the engine's jobs can't write it."""
    if "://" in (location := jobs[0].run.location):
        raise UsageError(
            f"RSLP_PREFIX leads to {location}: runs on an object store are for Beaker, and for this machine in "
            "the foreground; set a folder"
        )
