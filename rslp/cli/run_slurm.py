"""The workflow that a SLURM batch script starts: one run, or one run of an array."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rslp.errors import UsageError
from rslp.io.locks import no_links
from rslp.launch.engines.slurm_batch import run_step
from rslp.launch.job import Job, Mode
from rslp.rundir import RunDir


def run_slurm(
    run_dirs: list[str], mode: Mode = "fit", checkpoint: str | None = None, retries: int = 0, requeue: bool = True
) -> int:
    """Run one job inside a SLURM allocation; the batch script starts this.

    Args:
        run_dirs: the run directory; of an array of runs all of them, of which SLURM_ARRAY_TASK_ID selects one.
        mode: fit, validate, test or predict, as in the workflow run.
        checkpoint: the checkpoint to evaluate; the best one of the run when left out.
        retries: how often a failed job is queued again; not after a user's mistake.
        requeue: queue a job again that was preempted, or whose time limit was reached.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise UsageError("run_slurm is started by SLURM; launch_finetune --engine slurm submits a run")
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    job = Job(run=RunDir(Path(run_dirs[index])), mode=mode, checkpoint=checkpoint, retries=retries)
    if len(run_dirs) > 1:
        _redirect_output(job.run.logs / f"slurm-{os.environ['SLURM_ARRAY_JOB_ID']}_{index}.log")
    return run_step(job, requeue=requeue)


def _redirect_output(log: Path) -> None:
    """Append the output of this process and its children to a file: SLURM has one log folder for a whole array."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", opener=no_links) as stream:
        for output in (sys.stdout, sys.stderr):
            output.flush()
            os.dup2(stream.fileno(), output.fileno())
