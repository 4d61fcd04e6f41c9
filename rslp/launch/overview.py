"""All runs below a prefix, with how they stand: what the engine says, and what the run has written of itself."""

from __future__ import annotations

import csv
import re
import time
from dataclasses import dataclass
from pathlib import Path

from rslp.launch.engines import known_state
from rslp.launch.record import latest
from rslp.run import RunDir

_SCORE = "val/score"


@dataclass(frozen=True, kw_only=True)
class Row:
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
    """

    project: str
    experiment: str
    engine: str
    job: str
    state: str
    epoch: int | None
    best: float | None
    age: float | None


def overview(prefix: Path, project: str | None = None) -> list[Row]:
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


def _row(run: RunDir) -> Row:
    record = latest(run)
    state = run.read_state()
    told = state.get("state", "")
    if record:
        told = known_state(run, record) or told
        # The run's own word is finer: stopped, and by what.
        told = state.get("state", told) if told == "stopped" else told
    heartbeat = state.get("heartbeat")
    return Row(
        project=run.project,
        experiment=run.experiment,
        engine=record.engine if record else "",
        job=_name(record.id, record.mode) if record else "",
        state="succeeded" if told == "done" else told,
        epoch=state.get("epoch"),
        best=best_score(run),
        age=None if heartbeat is None else max(0.0, time.time() - heartbeat),
    )


def _name(identity: str, mode: str) -> str:
    name = identity.partition("@")[0]
    return name if mode == "fit" else f"{name} ({mode})"


def best_score(run: RunDir) -> float | None:
    """The best validation score that the run has logged; None before the first."""
    if not run.metrics.exists():
        return None
    with run.metrics.open(newline="", encoding="utf-8", errors="replace") as handle:
        # A kill, or a full disk, may have cut the last line short.
        scores = [row["value"] for row in csv.DictReader(handle) if row["name"] == _SCORE and _is_number(row["value"])]
    return max(map(float, scores), default=None)


def _is_number(text: str | None) -> bool:
    return bool(text) and re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", str(text)) is not None
