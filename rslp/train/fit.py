"""Train a run: from its last checkpoint if there is one, to its last epoch."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import Trainer

from rslp.errors import CheckpointError
from rslp.run import RunDir
from rslp.train import preemption
from rslp.train.checkpoints import read_checkpoint
from rslp.train.cli import build
from rslp.train.direct import Made
from rslp.train.metrics_log import MetricsLog

INTERRUPTED = 130


def fit(run: RunDir) -> int:
    """Train, or go on training, and mark the run as done.

    Args:
        run: the run directory.

    Returns:
        the exit code: 0 when the run is done, 130 when the user interrupted it, 143 when a scheduler asked it to leave.

    Raises:
        RunError: another process trains in this directory.
        ConfigError: the config can't be run.
        DataError: a dataset can't be used, or a sample can't be read.
        CheckpointError: no checkpoint of the run can be read, or weights don't fit.
    """
    with run.locked():
        resume = resume_point(run)
        cli = build(run, training=True)
        step, epoch = _progress(resume)
        if run.done() and epoch >= (cli.trainer.max_epochs or 0):
            _say(f"{run.path} is done: {epoch} epochs, {step} steps. More epochs in its config go on from there.")
            return 0
        if resume:
            _say(f"going on from {resume} (epoch {epoch}, step {step})")
        run.done_marker.unlink(missing_ok=True)
        return _train(cli, run=run, resume=resume, step=step)


def resume_point(run: RunDir) -> Path | None:
    """The newest checkpoint of the run that can be read; None for a run that has none.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    candidates = [path for path in (run.last, run.last.with_name("previous.ckpt")) if path.exists()]
    for path in candidates:
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            _say(f"warning: {error}; trying the one before")
        else:
            return path
    if candidates:
        raise CheckpointError(f"none of {', '.join(map(str, candidates))} can be read; remove them to start anew")
    return None


def _progress(resume: Path | None) -> tuple[int, int]:
    """Steps and epochs of a checkpoint."""
    if resume is None:
        return 0, 0
    checkpoint = read_checkpoint(resume)
    return checkpoint["global_step"], checkpoint["epoch"]


def _train(cli: Made, *, run: RunDir, resume: Path | None, step: int) -> int:
    trainer = cli.trainer
    for logger in trainer.loggers:
        if isinstance(logger, MetricsLog):
            logger.rewind(step)
    run.write_state(state="running", epoch=trainer.current_epoch, step=step, score=None)
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=True)
    except (SystemExit, preemption.Preempted):
        # Lightning ends the process itself after a Ctrl-C, and after a SIGTERM at an epoch's end.
        return _left(trainer, run=run)
    score = cli.model.score("val")
    finished = f"{trainer.current_epoch} epochs, {trainer.global_step} steps"
    _say(f"done: {finished}; --do_eval true evaluates the best checkpoint")
    run.write_state(state="done", epoch=trainer.current_epoch, step=trainer.global_step, score=score)
    run.mark_done(step=trainer.global_step, epoch=trainer.current_epoch, checkpoint=run.last)
    return 0


def _left(trainer: Trainer, *, run: RunDir) -> int:
    """Say why training ended early; the exit code."""
    signal = preemption.notice.received
    state, code = ("preempted", preemption.EXIT_CODE) if signal else ("interrupted", INTERRUPTED)
    run.write_state(state=state, epoch=trainer.current_epoch, step=trainer.global_step, score=None)
    _say(f"{signal.name if signal else state}: the same command goes on from the last checkpoint")
    return code


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
