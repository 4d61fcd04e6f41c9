"""Checkpoints of a run: where to go on from, and the best of the run and of each dataset."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Callback, Checkpoint

from rslp.errors import CheckpointError, ConfigError, Problem, RunError
from rslp.files import UNREADABLE, archive_damage, full_disk, replacing, same_file
from rslp.run import RunDir
from rslp.train import adapters, collectives, preemption
from rslp.train.freezing import stages_of
from rslp.train.module import JointModule
from rslp.train.room import bytes_of, lack_of_room
from rslp.train.selection import Selection

_TRAINABLE_KEY = "rslp_trainable"
RUN_KEY = "rslp_run"
# What a kill then costs again is so many steps of the heads.
_KEPT_STEPS = 100
# Of the weights that do not fit, so many characters are shown.
_SHOWN = 120


class RunCheckpoints(Checkpoint):
    """Writes ``checkpoints/{last,best,best-<dataset>}.ckpt`` of a run directory.

    Best is the highest validation score, of equal ones the lowest validation loss; see ``rslp.train.selection``.
    ``last.ckpt`` stands at the beginning of an epoch, or after a multiple of ``every_n_steps`` optimiser steps: never
    by the clock. Epochs that read kept features alone may take less time than a checkpoint does: of these, those end
    with one in which a multiple of ``_KEPT_STEPS`` steps lies. ``best*.ckpt`` hold the weights alone.

    Args:
        run_dir: the run directory.
        every_n_steps: optimiser steps between checkpoints inside an epoch.

    Raises:
        ConfigError: fewer than 1.
    """

    def __init__(self, run_dir: str, every_n_steps: int = 200) -> None:
        if every_n_steps < 1:
            what = f"every_n_steps is {every_n_steps}; 1 or more"
            raise ConfigError(Problem(what, key="trainer.callbacks"))
        self._run = RunDir(Path(run_dir))
        self._every = every_n_steps
        self.selection = Selection()
        self._trainable: frozenset[str] | None = None
        self._run_id: str | None = None
        # Epoch and step of what this process saved last as the point to go on from.
        self.saved: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best scores so far."""
        return self.selection.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best scores of the run that is gone on with."""
        self.selection.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Keep which parameters train: callbacks that thaw at an epoch's start do not act on a resume inside it."""
        checkpoint[_TRAINABLE_KEY] = [name for name, p in pl_module.named_parameters() if p.requires_grad]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Take up which parameters train."""
        self._trainable = frozenset(checkpoint[_TRAINABLE_KEY])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze and thaw as the checkpoint says, after callbacks froze for a run's beginning."""
        preemption.notice.training = True
        self._run_id = self._run.read_state().get("run_id")
        if collectives.any_of(preemption.notice.received is not None, device=pl_module.device):
            _leave()
        self.selection.begin(_joint(pl_module))
        if trainer.is_global_zero and (lack := lack_of_room(self._run, _joint(pl_module), trainer.optimizers)):
            sys.stderr.write(f"warning: {lack}\n")
        if self._trainable is not None:
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad = name in self._trainable

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state between two epochs, before any other callback begins the next one."""
        if trainer.current_epoch > 0 and (_may_thaw(trainer) or not self._soon_done_again(trainer, pl_module)):
            self._save_last(trainer, epoch_start=True)

    def _soon_done_again(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        steps, epoch = trainer.global_step, int(trainer.num_training_batches)
        short = steps // _KEPT_STEPS == (steps - epoch) // _KEPT_STEPS
        module = _joint(pl_module)
        return bool(trainer.strategy.broadcast(short and module.reads_kept() and not module.asked_to_leave()))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Save after an optimiser step inside an epoch, and leave if asked to."""
        ends_epoch = batch_idx + 1 >= trainer.num_training_batches
        leave = _joint(pl_module).asked_to_leave()
        if not ends_epoch and (leave or trainer.global_step % self._every == 0):
            self._save_last(trainer, epoch_start=False)
            if leave:
                _leave()

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Leave if asked to: a validation is repeated from the last checkpoint, and may be long.

        Several processes leave together when they meet at its end.
        """
        if adapters.has_trained(trainer) and not collectives.several() and preemption.notice.received is not None:
            _leave()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights if the score of the run or of a dataset is the best so far."""
        if trainer.sanity_checking or not adapters.has_trained(trainer):
            return
        module = _joint(pl_module)
        better = self.selection.improved(module)
        if better:
            checkpoint = adapters.dump_validated(trainer)
            self._write(trainer, checkpoint, *map(self._run.best, better))
        self._write_state(trainer, epoch=trainer.current_epoch + 1, score=module.score("val"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save the end of the run; a run with more epochs, or more steps of this one, goes on from here."""
        self._save_last(trainer, epoch_start=not adapters.stopped_inside(trainer), ended=True)

    def _save_last(self, trainer: Trainer, *, epoch_start: bool, ended: bool = False) -> None:
        _joint(trainer.lightning_module).meters["train"].settle()
        checkpoint = adapters.dump_checkpoint(trainer)
        if epoch_start:
            checkpoint = adapters.as_epoch_start(checkpoint, adapters.completed_epochs(trainer))
        elif ended:
            checkpoint = adapters.as_inside_epoch(checkpoint, adapters.completed_epochs(trainer) - 1)
        self._write(trainer, checkpoint, self._run.last)
        self.saved = (checkpoint["epoch"], trainer.global_step)
        self._write_state(trainer, epoch=checkpoint["epoch"], score=self.selection.best_score())
        # A starter ends all processes with the first that leaves: none may, before the file is there.
        trainer.strategy.barrier()

    def _write_state(self, trainer: Trainer, *, epoch: int, score: float | None) -> None:
        if trainer.is_global_zero:
            done = {"epoch": epoch, "step": trainer.global_step, "score": score}
            self._run.write_state(state="running", **done, run_id=self._run_id)

    def _write(self, trainer: Trainer, checkpoint: Mapping[str, Any], path: Path, *same: Path) -> None:
        """Write a checkpoint; further paths of the same content take no more room on the disk."""
        if trainer.is_global_zero:
            write_checkpoint({**checkpoint, RUN_KEY: self._run_id}, path)
            for other in same:
                same_file(path, other)


def _joint(module: LightningModule) -> JointModule:
    if not isinstance(module, JointModule):
        raise TypeError(f"RunCheckpoints needs a JointModule, got {type(module).__name__}")
    return module


def _may_thaw(trainer: Trainer) -> bool:
    """Whether this epoch may train what the last one did not: its steps then cost more than a checkpoint does."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    thaws = [stage.thaw_at_epoch for stage in stages_of(trainer)]
    return trainer.current_epoch in thaws or any(isinstance(callback, BaseFinetuning) for callback in callbacks)


def _leave() -> None:
    received = preemption.notice.received
    raise preemption.Preempted(received.name if received else "another process was asked to leave")


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint so that a crash leaves the old file or the new one, never a torn one.

    ``last.ckpt`` keeps its predecessor beside it as ``previous.ckpt``.

    Args:
        checkpoint: what to write.
        path: where.

    Raises:
        DiskError: the disk is full, or fails; the old file is there still.
        RunError: the folder can't be written to.
    """
    try:
        with replacing(path, needed=lambda: bytes_of(checkpoint)) as stream:
            torch.save(dict(checkpoint), stream)
            stream.flush()
            os.fsync(stream.fileno())
            if path.name == "last.ckpt" and path.exists():
                path.replace(path.with_name("previous.ckpt"))
    except OSError as error:
        raise full_disk(error, path) or RunError(f"{path} can't be written: {error.strerror or error}") from error


def read_with_digest(run: RunDir, path: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint to use and the sha256 of its file: of the same file, also where a training replaces it meanwhile.

    Raises:
        CheckpointError: as ``read_checkpoint``.
        RunError: it lies in the run directory, and is of another run.
    """
    try:
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            checkpoint = read_checkpoint(path, handle)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --checkpoint names another one") from error
    refuse_foreign(run, checkpoint, path=path)
    return checkpoint, digest


def read_checkpoint(path: Path, handle: BinaryIO | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are unpickled, and only what is undamaged.

    Args:
        path: where it is.
        handle: the file, where it is open already.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings(), nullcontext(handle) if handle else path.open("rb") as stream:
            # Of a file that is no checkpoint of ours, torch may warn before it refuses it.
            warnings.simplefilter("ignore")
            stream.seek(0)
            if damage := archive_damage(stream):
                raise CheckpointError(f"{path} can't be read as a checkpoint: {damage}")
            checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        if reason.startswith("Weights only load failed"):
            # What torch says then is of its own history.
            reason = "it holds more than tensors and plain values"
        raise CheckpointError(f"{path} can't be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no checkpoint: it holds no `state_dict`")
    return checkpoint


def refuse_foreign(run: RunDir, checkpoint: Mapping[str, Any], *, path: Path) -> None:
    """Refuse a checkpoint in a run directory that another run has written; earlier versions wrote no ids of runs.

    Raises:
        RunError: it has the id of another run than ``state.json``.
    """
    own, found = run.read_state().get("run_id"), checkpoint.get(RUN_KEY)
    if own and found and own != found and path.resolve().parent == run.checkpoints.resolve():
        what = f"{path} is a checkpoint of another run: its run id is {found}, that of this run (state.json) {own}"
        raise RunError(f"{what}; put this run's own checkpoint back, or move that one away")


def load_weights(module: torch.nn.Module, checkpoint: Mapping[str, Any], *, path: Path) -> None:
    """Load a checkpoint's weights; all of them must fit.

    Raises:
        CheckpointError: listing what is missing, unexpected or of another shape.
    """
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        shown = [line if len(line) <= _SHOWN else f"{line[:_SHOWN]} …" for line in lines[:3]]
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise CheckpointError(f"{path} does not fit the model: {' '.join(shown)}{more}") from error
