"""The workflow that ends a run from outside."""

from __future__ import annotations

import sys

from rslp.errors import RunError
from rslp.launch.engines.engine import engine
from rslp.launch.job import Mode
from rslp.launch.record import find_record
from rslp.launch.runs import find_run


def cancel(experiment_id: str, rslp_project: str = "helios_finetuning", mode: Mode | None = None) -> int:
    """Ask a run to save and leave; launched again, it goes on from there.

    Args:
        experiment_id: the run's name.
        rslp_project: the project that the run belongs to.
        mode: which of its jobs; the one that was submitted last when left out.
    """
    with find_run(rslp_project, experiment_id) as run:
        record = find_record(run, mode)
        where = engine(record.engine)
        state = where.state(run, record)
        if state not in ("queued", "running", "unknown"):
            raise RunError(f"{run.location} is not at work: {state}")
        where.cancel(run, record)
    sys.stdout.write(f"asked {run.location} to leave ({record.engine} {record.id.partition('@')[0]}, was {state})\n")
    return 0
