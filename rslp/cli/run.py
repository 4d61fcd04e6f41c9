"""The job itself: what every engine starts."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from pathlib import Path

from rslp.errors import RunError
from rslp.io import is_remote
from rslp.launch.job import Mode
from rslp.launch.remote import run_in_copy
from rslp.launch.snapshot import record_software
from rslp.rundir import RunDir
from rslp.runtime import preemption


def run(run_dir: str, mode: Mode = "fit", checkpoint: str | None = None) -> int:
    """Run one job in its run directory; the launcher starts this, here or on a cluster.

    Args:
        run_dir: the run directory, with its config.yaml.
        mode: fit trains or goes on training; validate evaluates the validation split, test the validation and the test
            split; predict writes predictions as files.
        checkpoint: the checkpoint to evaluate or to predict with; the best one of the run when left out.
    """
    # rslearn gives each of its loggers a handler of its own, at a level that is read from here when it is imported.
    os.environ.setdefault("RSLEARN_LOGLEVEL", "WARNING")
    if is_remote(run_dir):
        start = (sys.executable, "-m", "rslp.main", "helios", "run", "--mode", mode)
        return run_in_copy(run_dir, start, checkpoint=checkpoint, trains=mode == "fit", predicts=mode == "predict")
    directory = RunDir(Path(run_dir))
    directory.refuse_folders()
    config = next((path for path in (directory.config_of(mode), directory.config) if path.is_file()), None)
    if config is None:
        raise RunError(f"{directory.config} does not exist: start the run with launch_finetune")
    if mode == "fit":
        if _is_rank_zero():
            record_software(directory)
        # Before the imports of the training stack, which take seconds.
        preemption.preemption_flag.install()
    # The imports make a million objects that stay: the garbage collector does not search them, now or later.
    gc.disable()
    from rslp.evaluate.evaluation import evaluate
    from rslp.evaluate.prediction import predict
    from rslp.train.fit import fit

    gc.freeze()
    gc.enable()
    # At exit, native modules would report what is still frozen as leaked.
    atexit.register(gc.unfreeze)
    if mode == "fit":
        return fit(directory)
    if mode == "predict":
        return predict(directory, checkpoint=checkpoint)
    evaluate(directory, splits=("val", "test") if mode == "test" else ("val",), checkpoint=checkpoint)
    return 0


def _is_rank_zero() -> bool:
    """Whether this is the job's first process, the only one that writes."""
    rank = {"torchrun": "RANK", "slurm": "SLURM_PROCID"}.get(os.environ.get("RSLP_RANKS", ""))
    return rank is None or os.environ.get(rank, "0") == "0"
