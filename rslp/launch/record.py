"""What is known of a submission: one small file in the run directory, from which it is followed and cancelled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rslp.errors import RunError
from rslp.files import read_json, write_json
from rslp.launch.job import MODES, Job, Mode
from rslp.run import RunDir

_SCHEMA = 1
_TYPES = {"engine": str, "id": str, "plan": str, "log": str, "failures": int, "standstills": int, "cancelled": bool}


@dataclass(frozen=True, kw_only=True)
class Record:
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
    def of(cls, job: Job, *, engine: str, id: str, plan: str, log: str = "") -> Record:
        """The record of a job that is submitted now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(engine=engine, id=id, mode=job.mode, submitted=now, plan=plan, log=log)


def write_record(run: RunDir, record: Record) -> None:
    """Keep the record in the run directory; the one of an earlier submission in this mode is replaced."""
    write_json(run.job(record.mode), {"schema": _SCHEMA, **asdict(record)})


def read_record(run: RunDir, mode: Mode = "fit") -> Record | None:
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
        record = Record(**content)
        datetime.fromisoformat(record.submitted)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is no record of a submission: {error}") from error
    wrong = [name for name, kind in _TYPES.items() if not isinstance(getattr(record, name), kind)]
    if wrong or record.mode != mode:
        raise RunError(f"{path} is no record of a submission in mode {mode}: see its {', '.join(wrong or ['mode'])}")
    # Whatever the file names: of the run's own.
    return replace(record, log=record.log and str(run.logs / Path(record.log).name))


def latest(run: RunDir, modes: Iterable[str] = MODES) -> Record | None:
    """The newest submission of a run, whatever it does."""
    records = [record for mode in modes if (record := read_record(run, mode))]  # type: ignore[arg-type]
    return max(records, key=lambda record: record.submitted, default=None)


def the_record(run: RunDir, mode: Mode | None = None) -> Record:
    """The run's last submission, or its last in a mode.

    Raises:
        RunError: there is none.
    """
    record = latest(run) if mode is None else read_record(run, mode)
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


def note_cancelled(run: RunDir, record: Record) -> None:
    """Keep that a person cancelled it: it must not start itself again."""
    write_record(run, replace(record, cancelled=True))
