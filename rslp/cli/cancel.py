"""The workflow that asks a queued or running job to stop."""

from __future__ import annotations

import sys

from rslp.errors import RunError
from rslp.launch.engines.engine import engine
from rslp.launch.job import Mode
from rslp.launch.record import find_record
from rslp.launch.runs import find_run


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
