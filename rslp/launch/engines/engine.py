"""The engines: where a job can run, and what each of them can be asked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Literal, Protocol, cast, get_args

from rslp.errors import LaunchError, RunError
from rslp.launch.job import Mode
from rslp.launch.record import SubmissionRecord, read_record
from rslp.rundir import RunDir

EngineName = Literal["local", "slurm", "beaker", "skypilot"]
ENGINES: tuple[str, ...] = get_args(EngineName)
SubmissionState = Literal["queued", "running", "succeeded", "failed", "stopped", "cancelled", "unknown"]

_HOMES = {
    "local": "rslp.launch.engines.local",
    "slurm": "rslp.launch.engines.slurm",
    "beaker": "rslp.launch.engines.beaker",
}


class Engine(Protocol):
    """What a module ``submit_<engine>`` offers besides ``submit``, which takes the engine's own plan."""

    def state(self, run: RunDir, record: SubmissionRecord) -> SubmissionState:
        """How a submission stands; ``succeeded`` only when the run's marker of success is there."""

    def log(self, run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
        """The output of a submission in pieces; with ``follow`` until it ends."""

    def cancel(self, run: RunDir, record: SubmissionRecord) -> None:
        """Ask a submission to save and leave."""


def engine(name: str) -> Engine:
    """The engine of a submission; its client is imported now.

    Raises:
        RunError: no engine of this version.
    """
    if name not in _HOMES:
        raise RunError(f"engine {name!r} can't be asked; known: {', '.join(_HOMES)}")
    return cast(Engine, importlib.import_module(_HOMES[name]))


def known_state(run: RunDir, record: SubmissionRecord) -> SubmissionState | None:
    """How a submission stands, or None when its engine can't be asked from here."""
    if record.engine not in _HOMES:
        return None
    try:
        return engine(record.engine).state(run, record)
    except (RunError, LaunchError):
        return None


def ensure_not_active(run: RunDir, mode: Mode) -> None:
    """Refuse to submit what waits or runs already.

    Raises:
        RunError: it does.
    """
    record = read_record(run, mode)
    state = known_state(run, record) if record else None
    if record and state in ("queued", "running"):
        name = record.id.partition("@")[0]
        raise RunError(f"{run.location} is {state} already ({record.engine} {name}); `helios cancel` ends that first")
