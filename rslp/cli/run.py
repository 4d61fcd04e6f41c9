"""The workflows that are the job itself: a process of it, all processes of one machine, a job inside SLURM."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import sys
from pathlib import Path
from signal import Signals

from rslp.errors import INTERRUPTED, PREEMPTED, RunError, UsageError
from rslp.io import is_remote, read_yaml
from rslp.io.locks import no_links
from rslp.io.terminal import print_message, quieten_rslearn
from rslp.launch.engines.slurm_batch import run_step
from rslp.launch.job import Job, Mode
from rslp.launch.processes import RankGroup, free_port, run_group
from rslp.launch.record import verified_exit_code
from rslp.launch.remote import run_in_copy
from rslp.launch.snapshot import record_software
from rslp.rundir import RunDir
from rslp.runtime import preemption
from rslp.runtime.world import read_world


def run(run_dir: str, mode: Mode = "fit", checkpoint: str | None = None, evaluate: bool = False) -> int:
    """Run one job in its run directory; the launcher starts this, here or on a cluster.

    Args:
        run_dir: the run directory, with its config.yaml.
        mode: fit trains, or resumes a training; validate evaluates the validation split, test the validation and the
            test split; predict writes predictions as files.
        checkpoint: the checkpoint to evaluate or to predict with; the best one of the run when left out.
        evaluate: after a training, evaluate its best checkpoint on the validation and the test split.
    """
    quieten_rslearn()
    if is_remote(run_dir):
        command = (sys.executable, "-m", "rslp.main", "helios", "run", *(("--evaluate", "true") if evaluate else ()))
        return run_in_copy(run_dir, command, mode=mode, checkpoint=checkpoint)
    directory = RunDir(Path(run_dir))
    directory.refuse_folders()
    config = next((path for path in (directory.config_of(mode), directory.config) if path.is_file()), None)
    if config is None:
        raise RunError(f"{directory.config} does not exist: start the run with launch_finetune")
    if mode == "fit":
        if read_world(os.environ).first:
            record_software(directory)
        # Before the training stack is imported: that takes seconds, in which a signal would kill the process.
        preemption.preemption_flag.install()
    # The imports make a million objects that live on: the garbage collector need not search them, now or later.
    gc.disable()
    from rslp.evaluate.evaluation import evaluate as evaluate_run
    from rslp.evaluate.prediction import predict
    from rslp.evaluate.table import print_predictions, print_table
    from rslp.train.fit import fit

    gc.freeze()
    gc.enable()
    # Native modules report objects that are still frozen at exit as leaked.
    atexit.register(gc.unfreeze)
    if mode == "fit":
        code = fit(directory)
        if code or not evaluate or (code := _stopped()):
            return code
    if mode == "predict":
        if (summary := predict(directory, checkpoint=checkpoint)) is None:
            print_message("interrupted: the same command goes on from the last window that was written")
            return INTERRUPTED
        print_predictions(summary)
        return 0
    splits = ("val",) if mode == "validate" else ("val", "test")
    # After a training of a study, the one best checkpoint is compared.
    own_best = checkpoint is None and mode != "fit"
    evaluations = evaluate_run(directory, splits=splits, checkpoint=checkpoint, own_best=own_best)
    if read_world(os.environ).first:
        whole, own = evaluations[: len(splits)], evaluations[len(splits) :]
        notes: list[str] = []
        print_table(whole, own=own, unmoved=directory.read_state(notes).get("unmoved") or ())
        sys.stderr.writelines(f"warning: {note}\n" for note in notes)
        _show(directory)
    return 0


def _show(run: RunDir) -> None:
    """Send the figures of an evaluation to the run's trackers, and say how to make a report of it."""
    if names := read_yaml(run.config).data.get("rslp_trackers"):
        from rslp.report.track import send_figures

        send_figures(run, names)
    print_message(f"to look at it: python -m rslp.main helios report --run {shlex.quote(run.location)}")


def _stopped() -> int:
    """After a training, let signals end the process again; returns the exit code if one was received meanwhile."""
    flag = preemption.preemption_flag
    flag.uninstall()
    if flag.received is None:
        return 0
    return INTERRUPTED if flag.received is Signals.SIGINT else PREEMPTED


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


def run_slurm(
    run_dirs: list[str],
    mode: Mode = "fit",
    checkpoint: str | None = None,
    retries: int = 0,
    requeue: bool = True,
    evaluate: bool = False,
) -> int:
    """Run one job inside a SLURM allocation; the batch script starts this.

    Args:
        run_dirs: the run directory; of an array of runs all of them, of which SLURM_ARRAY_TASK_ID selects one.
        mode: fit, validate, test or predict, as in the workflow run.
        checkpoint: the checkpoint to evaluate; the best one of the run when left out.
        retries: how often a failed job is queued again; not after a user's mistake.
        requeue: queue a job again that was preempted, or whose time limit was reached.
        evaluate: after a training, evaluate its best checkpoint.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise UsageError("run_slurm is started by SLURM; launch_finetune --engine slurm submits a run")
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    run_dir = RunDir(Path(run_dirs[index]))
    job = Job(run=run_dir, mode=mode, checkpoint=checkpoint, retries=retries, evaluate=evaluate)
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
