"""Submissions: what is known of one, in a small file of the run directory, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rslp.errors import RunError
from rslp.io import read_json, write_json
from rslp.launch.job import MODES, Job, Mode
from rslp.rundir import RunDir

_SCHEMA = 1
_TYPES = {"engine": str, "id": str, "plan": str, "log": str, "failures": int, "standstills": int, "cancelled": bool}


@dataclass(frozen=True, kw_only=True)
class SubmissionRecord:
    """One submission of one run in one mode.

    Attributes:
        engine: where it went.
        id: what the engine calls it.
        mode: what it does with the run.
        submitted: when, ISO 8601 in UTC.
        plan: what was sent, as it was printed.
        log: the file with its output; empty when the engine keeps it, or when it went to a terminal.
        failures: how often it has failed.
        standstills: how often in a row it was taken away without having got further.
        cancelled: a person cancelled it.
    """

    engine: str
    id: str
    mode: Mode
    submitted: str
    plan: str
    log: str = ""
    failures: int = 0
    standstills: int = 0
    cancelled: bool = False

    @classmethod
    def of(cls, job: Job, *, engine: str, id: str, plan: str, log: str = "") -> SubmissionRecord:
        """The record of a job that is submitted now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(engine=engine, id=id, mode=job.mode, submitted=now, plan=plan, log=log)


def write_record(run: RunDir, record: SubmissionRecord) -> None:
    """Keep the record in the run directory; the one of an earlier submission in this mode is replaced."""
    write_json(run.job(record.mode), {"schema": _SCHEMA, **asdict(record)})


def read_record(run: RunDir, mode: Mode = "fit") -> SubmissionRecord | None:
    """The run's last submission in a mode, or None when there was none.

    Raises:
        RunError: the file is not what ``write_record`` wrote.
    """
    path = run.job(mode)
    try:
        content = read_json(path)
        if content is None:
            return None
        schema = content.pop("schema")
        if schema != _SCHEMA:
            raise RunError(f"{path} is of schema {schema}; this version of rslp reads schema {_SCHEMA}")
        record = SubmissionRecord(**content)
        datetime.fromisoformat(record.submitted)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is no record of a submission: {error}") from error
    wrong = [name for name, kind in _TYPES.items() if not isinstance(getattr(record, name), kind)]
    if wrong or record.mode != mode:
        raise RunError(f"{path} is no record of a submission in mode {mode}: see its {', '.join(wrong or ['mode'])}")
    # Whatever the file names: of the run's own.
    return replace(record, log=record.log and str(run.logs / Path(record.log).name))


def latest_record(run: RunDir, modes: Iterable[str] = MODES) -> SubmissionRecord | None:
    """The newest submission of a run, whatever it does."""
    records = [record for mode in modes if (record := read_record(run, mode))]  # type: ignore[arg-type]
    return max(records, key=lambda record: record.submitted, default=None)


def find_record(run: RunDir, mode: Mode | None = None) -> SubmissionRecord:
    """The run's last submission, or its last in a mode.

    Raises:
        RunError: there is none.
    """
    record = latest_record(run) if mode is None else read_record(run, mode)
    if record is None:
        known = "was never submitted" if run.config.exists() else "does not exist"
        raise RunError(f"{run.location} {known}{f' in mode {mode}' if mode else ''}; `helios jobs` lists the runs")
    return record


def note_failure(run: RunDir, mode: Mode) -> int:
    """Count one more failure of the run's submission.

    Returns:
        how often it has failed by now.
    """
    record = read_record(run, mode)
    if record is None:
        return 1
    write_record(run, replace(record, failures=record.failures + 1))
    return record.failures + 1


def note_standstill(run: RunDir, mode: Mode, *, stood: bool) -> int:
    """Keep whether the run has got further before it was taken away.

    Returns:
        how often in a row it has not.
    """
    record = read_record(run, mode)
    if record is None:
        return 0
    count = record.standstills + 1 if stood else 0
    write_record(run, replace(record, standstills=count))
    return count


def note_cancelled(run: RunDir, record: SubmissionRecord) -> None:
    """Keep that a person cancelled it: it must not start itself again."""
    write_record(run, replace(record, cancelled=True))


# A file's time and the record's come from different clocks, and the record's has no fractions.
_SLACK = 5.0
_SPLITS: dict[str, tuple[str, ...]] = {"validate": ("val",), "test": ("val", "test")}


def succeeded(run: RunDir, record: SubmissionRecord) -> bool:
    """Whether a submission has done what it was to do: trained to the marker of success, or written its evaluation."""
    since = datetime.fromisoformat(record.submitted).timestamp() - _SLACK
    return _finished(run, record.mode, since=since)


def _finished(run: RunDir, mode: Mode, *, since: float = 0) -> bool:
    if mode == "fit":
        return run.done() is not None
    if mode == "predict":
        return run.prediction_marker.exists() and run.prediction_marker.stat().st_mtime >= since
    # Of whichever checkpoint; a run of an earlier version has them in `eval/` alone.
    written = [[run.evaluation(split), *run.evaluations(split)] for split in _SPLITS.get(mode, ())]
    return bool(written) and all(any(p.exists() and p.stat().st_mtime >= since for p in paths) for paths in written)


def checked_code(run: RunDir, mode: Mode, code: int) -> tuple[int, str]:
    """The exit code of a job, and what is wrong when it says 0 without having done its work.

    Args:
        run: the run directory.
        mode: what the job was to do.
        code: what its processes ended with.
    """
    if code == 0 and not _finished(run, mode):
        left = {"fit": run.done_marker, "predict": run.prediction_marker}.get(mode, run.path / "eval")
        return 1, f"the job ended with exit code 0, but {left} is not there: it has not succeeded"
    return code, ""


def steps_done(run: RunDir, mode: Mode = "fit") -> int | None:
    """How far the run is: the optimiser steps of its state, or windows that are predicted; None before the first."""
    if mode == "predict":
        progress = run.prediction_progress
        return progress.read_bytes().count(b"\n") if progress.exists() else None
    step: int | None = run.read_state().get("step")
    return step
