"""The record of a submission, a small JSON file in the run directory, and whether the submission succeeded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rslp.errors import RunError
from rslp.io import json_with_checksum, read_json
from rslp.io.terminal import print_message
from rslp.launch.job import MODES, Job, Mode
from rslp.rundir import RunDir

_SCHEMA = 1
_TYPES = {"engine": str, "id": str, "plan": str, "log": str, "failures": int, "standstills": int, "cancelled": bool}


@dataclass(frozen=True, kw_only=True)
class SubmissionRecord:
    """One submission of one run in one mode.

    Attributes:
        engine: name of the engine.
        id: the engine's name of it.
        mode: mode of the job.
        submitted: time of the submission, ISO 8601 in UTC.
        plan: the plan as text, as ``--dry_run`` prints it.
        log: the file with its output; empty when the engine keeps the output, or when it went to a terminal.
        failures: number of failures so far.
        standstills: number of preemptions in a row without one more step.
        cancelled: whether a person cancelled it.
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

    def text(self) -> str:
        """The content of its file."""
        return json_with_checksum({"schema": _SCHEMA, **asdict(self)})


def write_record(run: RunDir, record: SubmissionRecord) -> None:
    """Write the record to the run directory; it replaces that of an earlier submission in this mode."""
    run.files().write(run.job(record.mode).name, record.text().encode())


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
    # Others may write to the file: only logs of this run are shown, whatever it names.
    return replace(record, log=record.log and str(run.logs / Path(record.log).name))


def latest_record(run: RunDir, modes: Iterable[str] = MODES) -> SubmissionRecord | None:
    """The newest submission of a run in any of the modes."""
    records = [record for mode in modes if (record := read_record(run, mode))]  # type: ignore[arg-type]
    return max(records, key=lambda record: record.submitted, default=None)


def find_record(run: RunDir, mode: Mode | None = None) -> SubmissionRecord:
    """The run's last submission, or its last in a mode.

    Raises:
        RunError: the run was never submitted, or not in this mode.
    """
    record = latest_record(run) if mode is None else read_record(run, mode)
    if record is None:
        reason = "was never submitted" if run.config.exists() else "does not exist"
        raise RunError(f"{run.location} {reason}{f' in mode {mode}' if mode else ''}; `helios jobs` lists the runs")
    return record


def note_failure(run: RunDir, mode: Mode) -> int:
    """Add one failure to the run's record; returns the number of failures."""
    record = read_record(run, mode)
    if record is not None:
        write_record(run, replace(record, failures=record.failures + 1))
    return record.failures + 1 if record else 1


def note_standstill(run: RunDir, mode: Mode, *, progressed: bool) -> int:
    """Record whether a preempted run had made progress; returns the number of preemptions in a row without any."""
    record = read_record(run, mode)
    if record is None:
        return 0
    count = 0 if progressed else record.standstills + 1
    write_record(run, replace(record, standstills=count))
    return count


def note_cancelled(run: RunDir, record: SubmissionRecord) -> None:
    """Record that a person cancelled the submission, so that it does not queue itself again."""
    write_record(run, replace(record, cancelled=True))


# Clocks of a file server and of the submitting machine differ, and a record's time has no fractions. Seconds.
_CLOCK_TOLERANCE = 5.0
_SPLITS: dict[str, tuple[str, ...]] = {"validate": ("val",), "test": ("val", "test")}


def succeeded(run: RunDir, record: SubmissionRecord) -> bool:
    """Whether a submission has written its result: the marker of success, the evaluation or the predictions."""
    since = datetime.fromisoformat(record.submitted).timestamp() - _CLOCK_TOLERANCE
    return _finished(run, record.mode, since=since)


def _finished(run: RunDir, mode: Mode, *, since: float = 0) -> bool:
    if mode == "fit":
        return run.done() is not None
    if mode == "predict":
        return run.prediction_marker.exists() and run.prediction_marker.stat().st_mtime >= since
    # Of any checkpoint; runs of earlier versions have the files in `eval/` alone.
    written = [[run.evaluation(split), *run.evaluations(split)] for split in _SPLITS.get(mode, ())]
    return bool(written) and all(any(p.exists() and p.stat().st_mtime >= since for p in paths) for paths in written)


def verified_exit_code(run: RunDir, mode: Mode, code: int) -> int:
    """The exit code of a job: 1, with a message, where its processes ended with 0 but the job's result is missing.

    Args:
        run: the run directory.
        mode: mode of the job.
        code: the exit code of its processes.
    """
    if code or _finished(run, mode):
        return code
    result = {"fit": run.done_marker, "predict": run.prediction_marker}.get(mode, run.path / "eval")
    print_message(f"the job ended with exit code 0, but {result} is not there: it has not succeeded")
    return 1


def steps_done(run: RunDir, mode: Mode = "fit") -> int | None:
    """Progress of a run: optimiser steps, or predicted windows; None before the first."""
    if mode == "predict":
        progress = run.prediction_progress
        return progress.read_bytes().count(b"\n") if progress.exists() else None
    step: int | None = run.read_state().get("step")
    return step
