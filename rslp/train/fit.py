"""Train a run: from its last checkpoint if there is one, to its last epoch."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from rslp import upstream
from rslp.data.batches import explain_worker_death
from rslp.errors import INTERRUPTED, PREEMPTED, CheckpointError, RunError
from rslp.io import read_yaml
from rslp.io.terminal import print_message
from rslp.rundir import RunDir
from rslp.runtime import preemption
from rslp.runtime.world import read_world
from rslp.train.build import InstantiatedRun, build
from rslp.train.callbacks import MetricsLog
from rslp.train.checkpoints import RUN_KEY, RunCheckpoints, load_weights, read_checkpoint, refuse_foreign

# The arguments of the trainer that may stop a training before its limits.
_STOPPING = ("callbacks", "max_time")


def reached(trainer: Trainer, *, epoch: int, step: int) -> bool:
    """Whether so many epochs and optimiser steps are all that the config wants; -1 is no limit."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return (epochs is not None and 0 <= epochs <= epoch) or 0 <= steps <= step


def ended_early(trainer: Trainer, config: Path) -> dict[str, str] | None:
    """What stopped a training before its limits; None if nothing did.

    Args:
        trainer: the trainer, after the training.
        config: the run's config.

    Returns:
        ``by``: in words what stopped it; ``of``: what it had before it; ``settings``: see ``stopping_settings``.
    """
    if not trainer.should_stop or reached(trainer, epoch=trainer.current_epoch, step=trainer.global_step):
        return None
    limited = trainer.max_epochs is not None and trainer.max_epochs >= 0
    limit = f"{trainer.max_epochs} epochs" if limited else f"{trainer.max_steps} steps"
    return {"by": _culprit(trainer), "of": limit, "settings": stopping_settings(config)}


def _culprit(trainer: Trainer) -> str:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            return f"EarlyStopping ({(callback.stopping_reason_message or callback.monitor).strip().rstrip('.')})"
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return "its time limit (max_time)"
    own = [
        type(one).__name__ for one in callbacks if type(one).__module__.partition(".")[0] not in ("rslp", "lightning")
    ]
    return f"a callback ({' or '.join(own)})" if own else "a callback"


def stopping_settings(config: Path) -> str:
    """A hash of what in a run config may stop a training before its limits: with another one it goes on."""
    trainer = read_yaml(config).data.get("trainer") or {}
    said = {key: trainer[key] for key in _STOPPING if trainer.get(key)}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def fit_to_callbacks(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Change the states of callbacks in a checkpoint to what the config says now.

    Early stopping would restore the patience that it had, whatever the config says since. What a callback left that the
    config has no more is dropped: Lightning would ask for the callback back, which was taken out to go on.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    states = checkpoint.get("callbacks") or {}
    checkpoint["callbacks"] = {one.state_key: states[one.state_key] for one in callbacks if one.state_key in states}
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
            state |= {"patience": callback.patience, "stopping_reason": EarlyStoppingReason.NOT_STOPPED.value}


def fit(run: RunDir) -> int:
    """Train, or go on training, and mark the run as done; of several processes, the first alone writes and speaks.

    Args:
        run: the run directory.

    Returns:
        the exit code: 0 when the run is done, 130 when the user interrupted it, 143 when a scheduler asked it to leave.

    Raises:
        RunError: another process trains in this directory, or another run's checkpoint or a damaged marker is in it.
        ConfigError: the config can't be run.
        DataError: a dataset can't be used, or a sample can't be read.
        TrainingError: a loss is not a number.
        MachineError: memory or the disk lacks room, or a worker process was killed.
        CheckpointError: no checkpoint of the run can be read, or weights don't fit.
    """
    first = read_world(os.environ).first
    with run.locked() if first else nullcontext():
        if first:
            run.sweep()
        notes: list[str] = []
        run.read_state(notes)
        resume = resume_point(run)
        for note in notes:
            _say(f"warning: {note}; it is written anew")
        cli = build(run, training=True)
        if (why := _is_done(cli.trainer, run=run, resume=resume)) is not None:
            _say(why)
            return 0
        if resume:
            _say(f"going on from {resume.path} (epoch {resume.epoch}, step {resume.step})")
        if first:
            run.done_marker.unlink(missing_ok=True)
        return _train(cli, run=run, resume=resume)


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run goes on from.

    Attributes:
        path: the file.
        checkpoint: its content; empty once the trainer has taken it over.
        epoch: epochs that are through.
        step: optimiser steps that are through.
    """

    path: Path
    checkpoint: dict[str, Any]
    epoch: int
    step: int


def resume_point(run: RunDir) -> Resume | None:
    """The newest checkpoint of the run that can be read; None for a run that has none.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
        RunError: the newest of them is of another run.
    """
    faults: list[str] = []
    for path in (run.last, run.last.with_name("previous.ckpt")):
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
            if "optimizer_states" not in checkpoint:
                raise CheckpointError(f"{path} holds weights alone, from which no run can go on")
        except CheckpointError as error:
            faults.append(str(error))
            continue
        refuse_foreign(run, checkpoint, path=path)
        for fault in faults:
            _say(f"warning: {fault}; the one before is taken")
        return Resume(path, checkpoint, epoch=checkpoint["epoch"], step=checkpoint["global_step"])
    if faults:
        raise CheckpointError(f"no checkpoint can be gone on from; remove them to start anew: {'; '.join(faults)}")
    return None


def _is_done(trainer: Trainer, *, run: RunDir, resume: Resume | None) -> str | None:
    """What is said of a run that is done; None for one that has something left to train."""
    marker = run.done()
    if marker is None or resume is None:
        return None
    so_far = f"{run.path} is done: {resume.epoch} epochs, {resume.step} steps"
    if reached(trainer, epoch=resume.epoch, step=resume.step):
        return f"{so_far}. More epochs or steps in its config go on from there."
    if (early := marker.get("ended_early")) and early["settings"] == stopping_settings(run.config):
        return (
            f"{so_far}; it ended early (of {early['of']}), by {early['by']}. "
            "With that changed or removed in its config, the same command goes on from there."
        )
    return None


def _train(cli: InstantiatedRun, *, run: RunDir, resume: Resume | None) -> int:
    trainer, step = cli.trainer, resume.step if resume else 0
    for logger in trainer.loggers:
        if isinstance(logger, MetricsLog) and (damage := logger.rewind(step)):
            _say(f"warning: {damage}")
    run_id = resume.checkpoint.get(RUN_KEY) if resume else None
    _write_state(run, trainer, state="running", step=step, run_id=run_id)
    upstream.keep_signal_handlers(trainer)
    if resume:
        load_weights(cli.model, resume.checkpoint, path=resume.path)
        fit_to_callbacks(resume.checkpoint, trainer)
        upstream.hand_checkpoint(trainer, resume.checkpoint, path=resume.path)
    path = resume.path if resume else None
    try:
        with (
            explain_worker_death(),
            preemption.preemption_flag.noting_interrupts(alone=read_world(os.environ).size == 1),
        ):
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=path, weights_only=True)
    except preemption.Preempted:
        return _left(trainer, run=run, resume=resume)
    except SystemExit as leaving:
        # Lightning ends the process itself after a Ctrl-C that was not noted.
        if not isinstance(leaving.__context__, KeyboardInterrupt):
            raise
        preemption.preemption_flag.received = Signals.SIGINT
        return _left(trainer, run=run, resume=resume)
    if trainer.is_global_zero and not run.last.exists():
        raise RunError(f"{run.config}: nothing was trained: its trainer allows no step (max_time, max_steps, …)")
    _finish(cli, run=run)
    return 0


def _finish(cli: InstantiatedRun, *, run: RunDir) -> None:
    """Say what was done and what was left out, and mark the run as done."""
    trainer, faults = cli.trainer, cli.datamodule.faults.counts()
    left_out = [f"{count} {split} samples that can't be used" for split, count in faults.items()]
    if odd := len(cli.model.finite.skipped):
        left_out.append(f"{odd} steps that were not finite")
    without = f", without {', '.join(left_out)}" if left_out else ""
    early = ended_early(trainer, run.config)
    epoch, step = _saved(trainer) or (trainer.current_epoch, trainer.global_step)
    reached = f"{epoch} epochs, {step} steps"
    reached += f" (it ended early, of {early['of']}, by {early['by']})" if early else ""
    _say(f"done: {reached}{without}; --do_eval true evaluates the best checkpoint")
    unmoved = _unmoved(trainer)
    if unmoved:
        named = ", ".join(unmoved)
        _say(f"warning: {named}: the score was 0 in every epoch, no better than the baseline: see the validation loss")
    left = {"faults": faults, "nonfinite_steps": odd, "unmoved": unmoved}
    _write_state(run, trainer, state="done", step=trainer.global_step, score=cli.model.score("val"), **left)
    if trainer.is_global_zero:
        run.mark_done(step=step, epoch=epoch, checkpoint=run.last, ended_early=early)


def _unmoved(trainer: Trainer) -> list[str]:
    """The tasks that were never better than their baseline."""
    return [
        task
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, RunCheckpoints)
        for task in callback.selection.unmoved()
    ]


def _left(trainer: Trainer, *, run: RunDir, resume: Resume | None) -> int:
    """Say why training was left, and from where the same command goes on; the exit code."""
    signal = preemption.preemption_flag.received
    by_hand = signal is Signals.SIGINT
    state, code = ("interrupted", INTERRUPTED) if by_hand else ("preempted", PREEMPTED)
    _write_state(run, trainer, state=state, step=trainer.global_step)
    saved = _saved(trainer) or ((resume.epoch, resume.step) if resume else None)
    where = f"goes on from epoch {saved[0]}, step {saved[1]}" if saved else "starts anew: no step of it was saved yet"
    _say(f"{signal.name if signal and not by_hand else state}: the same command {where}")
    return code


def _saved(trainer: Trainer) -> tuple[int, int] | None:
    """Complete epochs and steps of the last checkpoint that this process has written to go on from."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback.saved for callback in callbacks if isinstance(callback, RunCheckpoints)), None)


def _write_state(run: RunDir, trainer: Trainer, *, state: str, step: int, **more: Any) -> None:
    if trainer.is_global_zero:
        run.write_state(**{"state": state, "epoch": trainer.current_epoch, "step": step, "score": None} | more)


def _say(text: str) -> None:
    if read_world(os.environ).first:
        print_message(text)
