"""The workflow that shows the output of a run."""

from __future__ import annotations

import sys

from rslp.io.terminal import print_message
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
