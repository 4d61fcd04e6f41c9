"""The workflows that list runs, show the output of one, and ask one to stop."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from rslp.errors import RunError
from rslp.io import is_remote
from rslp.io.terminal import print_message, printable
from rslp.launch.engines.engine import engine
from rslp.launch.job import Mode
from rslp.launch.record import find_record
from rslp.launch.remote import fetch_all_metadata
from rslp.launch.runs import RunRow, find_run, overview, runs_prefix
from rslp.rundir import refuse_odd_name
from rslp.runtime import streams

_HEADINGS = ("project", "experiment", "engine", "job", "state", "epoch", "best", "age")


def jobs(rslp_project: str | None = None) -> int:
    """List the runs below RSLP_PREFIX: engine, job, state, epochs, best score, and age of the last heartbeat.

    Args:
        rslp_project: only the runs of this project.
    """
    prefix = runs_prefix(remote=False)
    if rslp_project is not None:
        refuse_odd_name("project", rslp_project, Path(prefix, "projects", rslp_project))
    with fetch_all_metadata(prefix, rslp_project or "") if is_remote(prefix) else nullcontext(Path(prefix)) as folder:
        rows = overview(folder, rslp_project)
    sys.stderr.writelines(f"warning: {note}\n" for row in rows for note in row.notes)
    if not rows:
        sys.stdout.write(f"no runs in {prefix}\n")
        return 0
    table = [_HEADINGS, *(tuple(map(printable, _cells(row))) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(padded).rstrip() + "\n")
    return 0


def _cells(row: RunRow) -> tuple[str, ...]:
    epoch = "" if row.epoch is None else str(row.epoch)
    best = "" if row.best is None else f"{row.best:.3f}"
    return (row.project, row.experiment, row.engine, row.job, row.state, epoch, best, _duration(row.age))


def _duration(seconds: float | None) -> str:
    """A duration in its largest unit."""
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def logs(
    experiment_id: str,
    rslp_project: str = "helios_finetuning",
    mode: Mode | None = None,
    follow: bool = False,
) -> int:
    """Show the output of a run, of all its starts.

    Args:
        experiment_id: the run's name.
        rslp_project: the project that the run belongs to.
        mode: mode of the job whose output is shown; the job that was submitted last when left out.
        follow: go on until the job ends; exit code 0 when it has succeeded, 1 when not.
    """
    with find_run(rslp_project, experiment_id) as run:
        record = find_record(run, mode)
        job_engine = engine(record.engine)
        printed = False
        for text in job_engine.log(run, record, follow=follow):
            sys.stdout.write(text)
            printed = True
            if streams.output_error():
                # The reader of the pipe has ended, such as `… | head`.
                return 0
        if printed and not follow:
            return 0
        state = job_engine.state(run, record)
    print_message(f"{run.location}: {state}" if follow else f"{run.location} has printed nothing yet: {state}")
    return 1 if follow and state != "succeeded" else 0


def cancel(experiment_id: str, rslp_project: str = "helios_finetuning", mode: Mode | None = None) -> int:
    """Ask a run to save and stop; launched again, it goes on from there.

    Args:
        experiment_id: the run's name.
        rslp_project: the project that the run belongs to.
        mode: mode of the job to stop; the job that was submitted last when left out.
    """
    with find_run(rslp_project, experiment_id) as run:
        record = find_record(run, mode)
        job_engine = engine(record.engine)
        state = job_engine.state(run, record)
        if state not in ("queued", "running", "unknown"):
            raise RunError(f"{run.location} is neither queued nor running: {state}")
        job_engine.cancel(run, record)
    sys.stdout.write(f"asked {run.location} to stop ({record.engine} {record.id.partition('@')[0]}, was {state})\n")
    return 0
