"""The workflow that lists runs with their states and scores."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from rslp.io import is_remote
from rslp.io.terminal import printable
from rslp.launch.remote import fetch_all_metadata
from rslp.launch.runs import RunRow, overview, runs_prefix
from rslp.rundir import refuse_odd_name

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
