"""The names of the engines, and the functions that each engine's module has."""

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

_MODULES = {
    "local": "rslp.launch.engines.local",
    "slurm": "rslp.launch.engines.slurm",
    "beaker": "rslp.launch.engines.beaker",
}


class Engine(Protocol):
    """The functions of an engine's module besides ``submit``, which takes a plan of its own type."""

    def state(self, run: RunDir, record: SubmissionRecord) -> SubmissionState:
        """The state of a submission; ``succeeded`` only if its result is in the run directory."""

    def log(self, run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:
        """Yield the output of a submission in pieces; with ``follow`` until it ends."""

    def cancel(self, run: RunDir, record: SubmissionRecord) -> None:
        """Ask a submission to save and stop."""


def engine(name: str) -> Engine:
    """Import the module of an engine.

    Raises:
        RunError: there is no such engine, or it only renders plans.
    """
    if name not in _MODULES:
        raise RunError(f"no jobs of the engine {name!r} can be managed; known: {', '.join(_MODULES)}")
    return cast(Engine, importlib.import_module(_MODULES[name]))


def known_state(run: RunDir, record: SubmissionRecord) -> SubmissionState | None:
    """The state of a submission, or None when its engine does not answer from this machine."""
    if record.engine not in _MODULES:
        return None
    try:
        return engine(record.engine).state(run, record)
    except (RunError, LaunchError):
        return None


def ensure_not_active(run: RunDir, mode: Mode) -> None:
    """Refuse to submit a job that was submitted before and has not ended.

    Raises:
        RunError: the run's last job in this mode is queued or running.
    """
    record = read_record(run, mode)
    state = known_state(run, record) if record else None
    if record and state in ("queued", "running"):
        name = record.id.partition("@")[0]
        raise RunError(f"{run.location} is {state} already ({record.engine} {name}); `helios cancel` ends that first")
