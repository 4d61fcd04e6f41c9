"""Train a run: from its last checkpoint if there is one, to its last epoch."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from rslp.errors import CheckpointError
from rslp.run import RunDir
from rslp.train import adapters, preemption
from rslp.train.checkpoints import RunCheckpoints, read_checkpoint
from rslp.train.cli import build
from rslp.train.direct import Made
from rslp.train.metrics_log import MetricsLog
from rslp.train.reading import workers_watched
from rslp.train.world import read_world

INTERRUPTED = 130


def fit(run: RunDir) -> int:
    """Train, or go on training, and mark the run as done; of several processes, the first alone writes and speaks.

    Args:
        run: the run directory.

    Returns:
        the exit code: 0 when the run is done, 130 when the user interrupted it, 143 when a scheduler asked it to leave.

    Raises:
        RunError: another process trains in this directory.
        ConfigError: the config can't be run.
        DataError: a dataset can't be used, or a sample can't be read.
        TrainingError: a loss is not a number, or a worker process was killed.
        CheckpointError: no checkpoint of the run can be read, or weights don't fit.
    """
    first = read_world(os.environ).first
    with run.locked() if first else nullcontext():
        if first:
            run.sweep()
        resume = resume_point(run)
        cli = build(run, training=True)
        step, epoch = _progress(resume)
        if run.done() and epoch >= (cli.trainer.max_epochs or 0):
            _say(f"{run.path} is done: {epoch} epochs, {step} steps. More epochs in its config go on from there.")
            return 0
        if resume:
            _say(f"going on from {resume} (epoch {epoch}, step {step})")
        if first:
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
    _write_state(run, trainer, state="running", step=step)
    adapters.keep_signal_handlers(trainer)
    try:
        with workers_watched():
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=True)
    except (SystemExit, preemption.Preempted) as cause:
        # Lightning ends the process itself after a Ctrl-C.
        return _left(trainer, run=run, cause=cause)
    _finish(cli, run=run)
    return 0


def _finish(cli: Made, *, run: RunDir) -> None:
    """Say what was done and what was left out, and mark the run as done."""
    trainer, faults = cli.trainer, cli.datamodule.faults.counts()
    left_out = [f"{count} {split} samples that can't be used" for split, count in faults.items()]
    if odd := len(cli.model.finite.skipped):
        left_out.append(f"{odd} steps that were not finite")
    without = f", without {', '.join(left_out)}" if left_out else ""
    reached = f"{trainer.current_epoch} epochs, {trainer.global_step} steps"
    _say(f"done: {reached}{without}; --do_eval true evaluates the best checkpoint")
    unmoved = _unmoved(trainer)
    if unmoved:
        named = ", ".join(unmoved)
        _say(f"warning: {named}: the score was 0 in every epoch, no better than the baseline: see the validation loss")
    left = {"faults": faults, "nonfinite_steps": odd, "unmoved": unmoved}
    _write_state(run, trainer, state="done", step=trainer.global_step, score=cli.model.score("val"), **left)
    if trainer.is_global_zero:
        run.mark_done(step=trainer.global_step, epoch=trainer.current_epoch, checkpoint=run.last)


def _unmoved(trainer: Trainer) -> list[str]:
    """The tasks that were never better than their baseline."""
    return [
        task
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, RunCheckpoints)
        for task in callback.selection.unmoved()
    ]


def _left(trainer: Trainer, *, run: RunDir, cause: BaseException) -> int:
    """Say why training ended early; the exit code."""
    signal = preemption.notice.received
    asked = signal is not None or isinstance(cause, preemption.Preempted)
    state, code = ("preempted", preemption.EXIT_CODE) if asked else ("interrupted", INTERRUPTED)
    _write_state(run, trainer, state=state, step=trainer.global_step)
    _say(f"{signal.name if signal else state}: the same command goes on from the last checkpoint")
    return code


def _write_state(run: RunDir, trainer: Trainer, *, state: str, step: int, **more: Any) -> None:
    if trainer.is_global_zero:
        run.write_state(**{"state": state, "epoch": trainer.current_epoch, "step": step, "score": None} | more)


def _say(text: str) -> None:
    if read_world(os.environ).first:
        sys.stderr.write(text + "\n")
