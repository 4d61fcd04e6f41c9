"""Train a run to its last epoch, from its last checkpoint if there is one."""

from __future__ import annotations

import hashlib
import io
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
from rslp.io import read_yaml, write_atomic
from rslp.io.terminal import counted, print_message
from rslp.rundir import RunDir
from rslp.runtime import preemption
from rslp.runtime.world import read_world
from rslp.train.build import InstantiatedRun, build
from rslp.train.callbacks import MetricsLog
from rslp.train.checkpoints import RUN_KEY, RunCheckpoints, load_weights, read_checkpoint, refuse_foreign
from rslp.train.trackers import Tracker

# Windows of a dataset's split that a map shows.
_MAPPED = 1000


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run resumes from.

    Attributes:
        path: the file.
        checkpoint: its content; empty once the trainer has loaded it.
        epoch: number of complete epochs.
        step: number of optimiser steps.
    """

    path: Path
    checkpoint: dict[str, Any]
    epoch: int
    step: int


def fit(run: RunDir) -> int:
    """Train or resume a run, and mark it as done; rank 0 alone writes files and prints.

    Args:
        run: the run directory.

    Returns:
        the exit code: 0 when the run is done, 130 when the user interrupted it, 143 when it was preempted.

    Raises:
        RunError: another process trains in this directory, or it has another run's checkpoint or a damaged marker.
        ConfigError: the run config is invalid.
        DataError: a dataset or a sample can't be read.
        TrainingError: a loss or a gradient is not finite.
        MachineError: memory or disk space runs out, or a worker process was killed.
        CheckpointError: no checkpoint of the run can be read, or its weights don't fit the model.
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
        if (message := _done_message(cli.trainer, run=run, resume=resume)) is not None:
            _say(message)
            return 0
        if resume:
            _say(f"going on from {resume.path} (epoch {resume.epoch}, step {resume.step})")
        if first:
            run.done_marker.unlink(missing_ok=True)
        return _train(cli, run=run, resume=resume)


def resume_point(run: RunDir) -> Resume | None:
    """Read the newest readable checkpoint of the run; None if it has no checkpoint.

    Raises:
        CheckpointError: none of its checkpoints can be read.
        RunError: the checkpoint is of another run.
    """
    faults: list[str] = []
    for path in (run.last, run.previous):
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
        raise CheckpointError(f"no checkpoint can be resumed from; remove them to start anew: {'; '.join(faults)}")
    return None


def _done_message(trainer: Trainer, *, run: RunDir, resume: Resume | None) -> str | None:
    """The message for a run that is done; None for one that has something left to train."""
    marker = run.done()
    if marker is None or resume is None:
        return None
    so_far = f"{run.path} is done: {counted(resume.epoch, 'epoch')}, {counted(resume.step, 'step')}"
    if limits_reached(trainer, epoch=resume.epoch, step=resume.step):
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
        elif isinstance(logger, Tracker):
            logger.rewind(step)
    run_id = resume.checkpoint.get(RUN_KEY) if resume else None
    _write_state(run, trainer, state="running", step=step, run_id=run_id)
    upstream.keep_signal_handlers(trainer)
    if resume:
        load_weights(cli.model, resume.checkpoint, path=resume.path, resumed=True)
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
        # Lightning ends the process itself after a Ctrl-C that the preemption flag did not record.
        if not isinstance(leaving.__context__, KeyboardInterrupt):
            raise
        preemption.preemption_flag.received = Signals.SIGINT
        return _left(trainer, run=run, resume=resume)
    if trainer.is_global_zero and not run.last.exists():
        raise RunError(f"{run.config}: nothing was trained: its trainer allows no step (max_time, max_steps, …)")
    _finish(cli, run=run)
    return 0


def _finish(cli: InstantiatedRun, *, run: RunDir) -> None:
    """Print a summary, and mark the run as done."""
    trainer, bad_samples = cli.trainer, cli.datamodule.bad_sample_record.counts()
    skipped = [f"{count} {split} samples that can't be used" for split, count in bad_samples.items()]
    if nonfinite := len(cli.model.finite.skipped):
        skipped.append(f"{nonfinite} steps that were not finite")
    without = f", without {', '.join(skipped)}" if skipped else ""
    early = ended_early(trainer, run.config)
    epoch, step = _saved(trainer) or (trainer.current_epoch, trainer.global_step)
    progress = f"{counted(epoch, 'epoch')}, {counted(step, 'step')}"
    progress += f" (it ended early, of {early['of']}, by {early['by']})" if early else ""
    if (adapters := cli.model.model.adapters) is not None:
        total = cli.model.model.parameter_count(cli.model.datasets())
        _say(f"adapters: {trained_parameters(cli):,} of {total:,} parameters trained; {adapters.describe()}")
        if idle := adapters.idle():
            _say(f"warning: adapters without effect, since no batch used their layers: {', '.join(idle)}")
    _say(f"done: {progress}{without}; --do_eval true evaluates the best checkpoint")
    if unmoved := _unmoved(trainer):
        warning = "the score was 0 in every epoch, no better than the baseline: see the validation loss"
        _say(f"warning: {', '.join(unmoved)}: {warning}")
    summary = {"faults": bad_samples, "nonfinite_steps": nonfinite, "unmoved": unmoved, "score": cli.model.score("val")}
    _write_state(run, trainer, state="done", step=trainer.global_step, **summary)
    if trainer.is_global_zero:
        _write_windows(run, cli)
        run.mark_done(step=step, epoch=epoch, checkpoint=run.last, ended_early=early, cost=_cost(cli, step=step))


def _write_windows(run: RunDir, cli: InstantiatedRun) -> None:
    """Write ``windows.parquet``, from which a map is drawn: at most ``_MAPPED`` windows of each dataset and split."""
    # Not at the start of a run, which it would slow down.
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        (dataset, split, *place)
        for split in ("train", "val")
        for dataset, source in cli.datamodule.sources(split).items()
        for place in source.window_places(_MAPPED)
    ]
    columns = ("dataset", "split", "group", "window", "lon", "lat")
    stream = io.BytesIO()
    pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), stream)
    write_atomic(run.windows, stream.getvalue())


def _cost(cli: InstantiatedRun, *, step: int) -> dict[str, Any]:
    """What the training took: parameters of its datasets' model, samples of all ranks, optimiser steps, seconds."""
    ours = next((c for c in cli.trainer.checkpoint_callbacks if isinstance(c, RunCheckpoints)), None)
    spent = {} if ours is None else {"samples": ours.samples * cli.trainer.world_size, "seconds": ours.seconds}
    total = cli.model.model.parameter_count(cli.model.datasets())
    return {"parameters": total, "trained": trained_parameters(cli), "steps": step, **spent}


def trained_parameters(cli: InstantiatedRun) -> int:
    """Number of parameters that train at some time of a run; those that are frozen to the end are not among them."""
    return sum(p.numel() for o in cli.trainer.optimizers for group in o.param_groups for p in group["params"])


def _unmoved(trainer: Trainer) -> list[str]:
    """The tasks that were never better than their baseline."""
    ours = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoints)]
    return [task for callback in ours for task in callback.selection.unmoved()]


def _left(trainer: Trainer, *, run: RunDir, resume: Resume | None) -> int:
    """Print why training stopped and from where the same command resumes; returns the exit code."""
    signal = preemption.preemption_flag.received
    by_hand = signal is Signals.SIGINT
    state, code = ("interrupted", INTERRUPTED) if by_hand else ("preempted", PREEMPTED)
    _write_state(run, trainer, state=state, step=trainer.global_step)
    saved = _saved(trainer) or ((resume.epoch, resume.step) if resume else None)
    where = f"goes on from epoch {saved[0]}, step {saved[1]}" if saved else "starts anew: no step of it was saved yet"
    _say(f"{signal.name if signal and not by_hand else state}: the same command {where}")
    return code


def _saved(trainer: Trainer) -> tuple[int, int] | None:
    """Complete epochs and steps of the last checkpoint that this process wrote to resume from."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback.saved for callback in callbacks if isinstance(callback, RunCheckpoints)), None)


def _write_state(run: RunDir, trainer: Trainer, *, state: str, step: int, **more: Any) -> None:
    if trainer.is_global_zero:
        run.write_state(**{"state": state, "epoch": trainer.current_epoch, "step": step, "score": None} | more)


def _say(text: str) -> None:
    if read_world(os.environ).first:
        print_message(text)


# Arguments of the trainer that may end a training before its limits.
_STOPPING = ("callbacks", "max_time")


def limits_reached(trainer: Trainer, *, epoch: int, step: int) -> bool:
    """Whether epochs or optimiser steps have reached the trainer's limits; -1 means no limit."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return (epochs is not None and 0 <= epochs <= epoch) or 0 <= steps <= step


def ended_early(trainer: Trainer, config: Path) -> dict[str, str] | None:
    """How a training ended before its limits; None if it did not.

    Args:
        trainer: the trainer, after the training.
        config: the run config's path.

    Returns:
        ``by``: what ended it, in words; ``of``: its limit, in words; ``settings``: see ``stopping_settings``.
    """
    if not trainer.should_stop or limits_reached(trainer, epoch=trainer.current_epoch, step=trainer.global_step):
        return None
    limited = trainer.max_epochs is not None and trainer.max_epochs >= 0
    limit = counted(int(trainer.max_epochs or 0), "epoch") if limited else counted(trainer.max_steps, "step")
    return {"by": _culprit(trainer), "of": limit, "settings": stopping_settings(config)}


def _culprit(trainer: Trainer) -> str:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            return f"EarlyStopping ({(callback.stopping_reason_message or callback.monitor).strip().rstrip('.')})"
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return "its time limit (max_time)"
    kinds = map(type, callbacks)
    foreign = [kind.__name__ for kind in kinds if kind.__module__.partition(".")[0] not in ("rslp", "lightning")]
    return f"a callback ({' or '.join(foreign)})" if foreign else "a callback"


def stopping_settings(config: Path) -> str:
    """A hash of the settings that may end a training before its limits: once they change, the run continues."""
    trainer = read_yaml(config).data.get("trainer") or {}
    settings = {key: trainer[key] for key in _STOPPING if trainer.get(key)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def fit_to_callbacks(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Adapt the states of callbacks in a checkpoint to the present config.

    Early stopping takes its patience from the config, not from the checkpoint. States of callbacks that the config no
    longer has are dropped: Lightning would warn that these are missing.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    states = checkpoint.get("callbacks") or {}
    checkpoint["callbacks"] = {c.state_key: states[c.state_key] for c in callbacks if c.state_key in states}
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
            state |= {"patience": callback.patience, "stopping_reason": EarlyStoppingReason.NOT_STOPPED.value}
