"""The workflow that shows what a run prints."""

from __future__ import annotations

import sys

from rslp.launch.engines.engine import engine
from rslp.launch.job import Mode
from rslp.launch.record import find_record
from rslp.launch.runs import find_run
from rslp.runtime import streams


def logs(
    experiment_id: str,
    rslp_project: str = "helios_finetuning",
    mode: Mode | None = None,
    follow: bool = False,
) -> int:
    """Show what a run has printed, over all its starts.

    Args:
        experiment_id: the run's name.
        rslp_project: the project that the run belongs to.
        mode: which of its jobs; the one that was submitted last when left out.
        follow: go on until the job ends; exit code 0 when it has succeeded, 1 when not.
    """
    with find_run(rslp_project, experiment_id) as run:
        record = find_record(run, mode)
        where = engine(record.engine)
        silent = True
        for piece in where.log(run, record, follow=follow):
            sys.stdout.write(piece)
            silent = False
            if streams.output_error():
                # Nobody reads any more.
                return 0
        if not follow and not silent:
            return 0
        state = where.state(run, record)
    if not follow:
        sys.stderr.write(f"{run.location} has printed nothing yet: {state}\n")
        return 0
    sys.stderr.write(f"{run.location}: {state}\n")
    return 0 if state == "succeeded" else 1
