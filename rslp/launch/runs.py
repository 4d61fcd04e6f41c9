"""Where runs lie, and a table of all of them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rslp.errors import RunError
from rslp.io import is_remote
from rslp.launch.engines.engine import known_state
from rslp.launch.record import latest_record
from rslp.launch.remote import fetch_metadata
from rslp.rundir import RunDir

LOCAL_PREFIX = "project_data/"
REMOTE_PREFIX = "gs://rslearn-eai"
PREFIX_VARIABLE = "RSLP_PREFIX"


def runs_prefix(*, remote: bool, environment: Mapping[str, str] = os.environ, folder: Path | None = None) -> str:
    """The place that runs lie below; a local one is absolute.

    Args:
        remote: the job runs where this machine's disk is not seen.
        environment: the variables that are set.
        folder: where a ``.env`` is looked for, and what a relative prefix starts from; the current directory when None.
    """
    here = folder or Path.cwd()
    named = environment.get(PREFIX_VARIABLE) or _from_file(here / ".env")
    value = named or (REMOTE_PREFIX if remote else LOCAL_PREFIX)
    return value if "://" in value else str((here / Path(value).expanduser()).absolute())


def _from_file(path: Path) -> str:
    """The variable's value in a file of ``NAME=VALUE`` lines; empty when it is not there."""
    if not path.is_file():
        return ""
    value = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.strip().removeprefix("export ").partition("=")
        if name.strip() == PREFIX_VARIABLE:
            value = rest.strip()
            if value[:1] in ("'", '"') and value[:1] in value[1:]:
                value = value[1 : value.index(value[0], 1)]
            else:
                value = value.partition(" #")[0].strip()
    return value


@contextmanager
def find_run(project: str, experiment: str) -> Iterator[RunDir]:
    """The directory of a run that was submitted from here; of one on an object store, a copy of what is small in it.

    Raises:
        StoreError: the store can't be reached.
    """
    run = RunDir.of(runs_prefix(remote=False), project, experiment)
    if not is_remote(run.location):
        yield run
        return
    with fetch_metadata(run.location) as copy:
        yield copy


_SCORE = "val/score"
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run.

    Attributes:
        project: the project that it belongs to.
        experiment: its name.
        engine: where it was submitted to last; empty when it was not submitted by this program.
        job: what the engine calls it, and what it does when it does not train.
        state: how it stands.
        epoch: epochs done; None before the first.
        best: the best score on the validation data so far; None before the first.
        age: seconds since the run wrote its state last; None before the first.
        notes: the files of the run that are damaged, a line each.
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
    """The runs below a prefix, the one that was at work last at the end.

    Args:
        prefix: what runs lie below.
        project: only this project's.
    """
    runs = {path.parent for name in ("config", "predict") for path in prefix.glob(_config(project or "*", name))}
    rows = [_row(RunDir(run)) for run in sorted(runs)]
    return sorted(rows, key=lambda row: (-(row.age if row.age is not None else -1), row.project, row.experiment))


def _config(project: str, name: str) -> str:
    return f"projects/{project}/*/{name}.yaml"


def _row(run: RunDir) -> RunRow:
    notes: list[str] = []
    record = _noted(partial(latest_record, run), notes)
    state = run.read_state(notes)
    told = state.get("state", "")
    if record:
        told = known_state(run, record) or told
        # The run's own word is finer: stopped, and by what.
        told = state.get("state", told) if told == "stopped" else told
    _noted(run.done, notes)
    heartbeat = state.get("heartbeat")
    return RunRow(
        project=run.project,
        experiment=run.experiment,
        engine=record.engine if record else "",
        job=_name(record.id, record.mode) if record else "",
        state="succeeded" if told == "done" else told,
        epoch=state.get("epoch"),
        best=best_score(run, notes),
        age=None if heartbeat is None else max(0.0, time.time() - heartbeat),
        notes=tuple(notes),
    )


def _noted(read: Callable[[], Found | None], notes: list[str]) -> Found | None:
    """What a file of a run holds; what is wrong with it becomes a note: it must not hide the other runs."""
    try:
        return read()
    except RunError as error:
        notes.append(str(error))
        return None


def _name(identity: str, mode: str) -> str:
    name = identity.partition("@")[0]
    return name if mode == "fit" else f"{name} ({mode})"


def best_score(run: RunDir, notes: list[str]) -> float | None:
    """The best validation score that the run has logged; None before the first. Damage is noted, in a line."""
    scores = [float(value) for _, _, name, value in run.logged(notes) if name == _SCORE]
    return max((score for score in scores if math.isfinite(score)), default=None)
