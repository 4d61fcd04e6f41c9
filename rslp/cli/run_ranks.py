"""The workflow that runs one machine's processes of a job, started by the local engine and by Beaker's replicas."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rslp.errors import INTERRUPTED, PREEMPTED, UsageError
from rslp.io import is_remote
from rslp.io.terminal import print_message
from rslp.launch.job import Job, Mode
from rslp.launch.processes import RankGroup, free_port, run_group
from rslp.launch.record import verified_exit_code
from rslp.launch.remote import run_in_copy
from rslp.rundir import RunDir

_NO_RETRY = (0, 2, INTERRUPTED, PREEMPTED)


def run_ranks(
    run_dir: str,
    ranks: int,
    mode: Mode = "fit",
    checkpoint: str | None = None,
    retries: int = 0,
    nodes: int = 1,
    node: int = 0,
    address: str = "127.0.0.1",
    port: int = 0,
) -> int:
    """Run one job as several processes of this machine; the launcher starts this.

    Args:
        run_dir: the run directory, with its config.yaml.
        ranks: processes on this machine.
        mode: fit, validate, test or predict, as in the workflow run.
        checkpoint: the checkpoint to evaluate; the best one of the run when left out.
        retries: how often all processes are started again after one of them failed; not after a user's mistake.
        nodes: machines of the job; each of them runs this.
        node: which of them this is, from 0.
        address: the address of machine 0.
        port: a port of machine 0 that is free; may be left out on a single machine.
    """
    if nodes > 1 and not port:
        raise UsageError("--port is needed with several machines: all of them have to know the port of machine 0")
    if is_remote(run_dir):
        options = {"ranks": ranks, "retries": retries, "nodes": nodes, "node": node, "address": address, "port": port}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = (sys.executable, "-m", "rslp.main", "helios", "run_ranks", *words)
        return run_in_copy(run_dir, command, mode=mode, checkpoint=checkpoint, writes=node == 0)
    job = Job(run=RunDir(Path(run_dir)), mode=mode, checkpoint=checkpoint, gpus=ranks, nodes=nodes, retries=retries)
    for attempt in range(job.retries + 1):
        group = RankGroup(per_node=job.gpus, nodes=job.nodes, node=node, address=address, port=port or free_port())
        code = run_group(job.command(sys.executable), group, logs=job.run.logs, environment=os.environ)
        if code in _NO_RETRY or attempt == job.retries:
            break
        print_message(f"exit code {code}; starting again ({attempt + 1} of {job.retries} retries)")
    # Machine 0 writes the marker of success; the others may not see it yet.
    return verified_exit_code(job.run, job.mode, code) if node == 0 else code
