"""The prefix of all runs, and a table of the runs below it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from dotenv import dotenv_values

from rslp.errors import RunError
from rslp.io import is_remote
from rslp.launch.engines.engine import known_state
from rslp.launch.record import latest_record
from rslp.launch.remote import readable_run
from rslp.rundir import RunDir

LOCAL_PREFIX = "project_data/"
REMOTE_PREFIX = "gs://rslearn-eai"
PREFIX_VARIABLE = "RSLP_PREFIX"


def runs_prefix(*, remote: bool, environment: Mapping[str, str] = os.environ, folder: Path | None = None) -> str:
    """The folder or URL below which runs are; a folder is absolute.

    Args:
        remote: whether the job runs on machines without this machine's file system, which decides the default.
        environment: the environment variables.
        folder: the folder of ``.env``, from which a relative prefix starts; the current directory when None.
    """
    folder = folder or Path.cwd()
    prefix = environment.get(PREFIX_VARIABLE) or dotenv_values(folder / ".env").get(PREFIX_VARIABLE)
    prefix = prefix or (REMOTE_PREFIX if remote else LOCAL_PREFIX)
    return prefix if "://" in prefix else str((folder / Path(prefix).expanduser()).absolute())


def find_run(project: str, experiment: str) -> AbstractContextManager[RunDir]:
    """The directory of a run that was submitted from here, to read from; see ``readable_run``."""
    return readable_run(RunDir.of(runs_prefix(remote=False), project, experiment).location)


def open_run(name: str) -> AbstractContextManager[RunDir]:
    """The directory of a run, to read from, by its path or URL, or as PROJECT/EXPERIMENT."""
    if is_remote(name) or Path(name).is_dir() or name.count("/") != 1:
        return readable_run(name)
    project, _, experiment = name.partition("/")
    return find_run(project, experiment)


_SCORE = "val/score"
Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One row of the table of runs.

    Attributes:
        project: name of the project.
        experiment: name of the experiment.
        engine: engine of the last submission; empty when the run was never submitted.
        job: the engine's name of the job, and its mode unless that is fit.
        state: state of the job or of the run.
        epoch: number of epochs done; None before the first.
        best: best validation score so far; None before the first.
        age: seconds since the last heartbeat; None before the first.
        notes: one line for each damaged file of the run.
    """

    project: str
    experiment: str
    engine: str
    job: str
    state: str
    epoch: int | None
    best: float | None
    age: float | None
    notes: tuple[str, ...] = ()


def overview(prefix: Path, project: str | None = None) -> list[RunRow]:
    """The runs below a prefix, in the order of their last heartbeats.

    Args:
        prefix: the prefix, a folder.
        project: the project whose runs are listed; None lists all.
    """
    projects = project or "*"
    patterns = [f"projects/{projects}/*/{name}.yaml" for name in ("config", "predict")]
    runs = {path.parent for pattern in patterns for path in prefix.glob(pattern)}
    rows = [_row(RunDir(run)) for run in sorted(runs)]
    return sorted(rows, key=lambda row: (-(row.age if row.age is not None else -1), row.project, row.experiment))


def _row(run: RunDir) -> RunRow:
    notes: list[str] = []
    record = _read_or_note(partial(latest_record, run), notes)
    state = run.read_state(notes)
    run_state = job_state = state.get("state", "")
    if record:
        job_state = known_state(run, record) or run_state
        # The state that the run has written says by what it was stopped.
        job_state = run_state or job_state if job_state == "stopped" else job_state
    _read_or_note(run.done, notes)
    heartbeat = state.get("heartbeat")
    return RunRow(
        project=run.project,
        experiment=run.experiment,
        engine=record.engine if record else "",
        job=_name(record.id, record.mode) if record else "",
        state="succeeded" if job_state == "done" else job_state,
        epoch=state.get("epoch"),
        best=best_score(run, notes),
        age=None if heartbeat is None else max(0.0, time.time() - heartbeat),
        notes=tuple(notes),
    )


def _read_or_note(read: Callable[[], Content | None], notes: list[str]) -> Content | None:
    """Read a file of a run; damage becomes a note instead of an error, which would hide all other runs."""
    try:
        return read()
    except RunError as error:
        notes.append(str(error))
        return None


def _name(identity: str, mode: str) -> str:
    name = identity.partition("@")[0]
    return name if mode == "fit" else f"{name} ({mode})"


def best_score(run: RunDir, notes: list[str]) -> float | None:
    """The best validation score that the run has logged; None before the first. Damage adds a line to the notes."""
    scores = [float(value) for _, _, name, value in run.logged(notes) if name == _SCORE]
    return max((score for score in scores if math.isfinite(score)), default=None)
