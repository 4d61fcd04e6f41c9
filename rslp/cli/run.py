"""The workflow that is the job itself: every engine starts it."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from pathlib import Path

from rslp.cli.run_configs import quieten_rslearn
from rslp.errors import INTERRUPTED, RunError
from rslp.io import is_remote
from rslp.io.terminal import print_message
from rslp.launch.job import Mode
from rslp.launch.remote import run_in_copy
from rslp.launch.snapshot import record_software
from rslp.rundir import RunDir
from rslp.runtime import preemption
from rslp.runtime.world import read_world


def run(run_dir: str, mode: Mode = "fit", checkpoint: str | None = None) -> int:
    """Run one job in its run directory; the launcher starts this, here or on a cluster.

    Args:
        run_dir: the run directory, with its config.yaml.
        mode: fit trains, or resumes a training; validate evaluates the validation split, test the validation and the
            test split; predict writes predictions as files.
        checkpoint: the checkpoint to evaluate or to predict with; the best one of the run when left out.
    """
    quieten_rslearn()
    if is_remote(run_dir):
        command = (sys.executable, "-m", "rslp.main", "helios", "run")
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
    from rslp.evaluate.evaluation import evaluate
    from rslp.evaluate.prediction import predict
    from rslp.evaluate.table import print_predictions, print_table
    from rslp.train.fit import fit

    gc.freeze()
    gc.enable()
    # Native modules report objects that are still frozen at exit as leaked.
    atexit.register(gc.unfreeze)
    if mode == "fit":
        return fit(directory)
    if mode == "predict":
        if (summary := predict(directory, checkpoint=checkpoint)) is None:
            print_message("interrupted: the same command goes on from the last window that was written")
            return INTERRUPTED
        print_predictions(summary)
        return 0
    evaluations = evaluate(directory, splits=("val", "test") if mode == "test" else ("val",), checkpoint=checkpoint)
    if read_world(os.environ).first:
        notes: list[str] = []
        print_table(evaluations, unmoved=directory.read_state(notes).get("unmoved") or ())
        sys.stderr.writelines(f"warning: {note}\n" for note in notes)
    return 0
