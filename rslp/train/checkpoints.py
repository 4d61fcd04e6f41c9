"""Checkpoints of a run: the last, to resume from, and the best of the run and of each dataset."""

from __future__ import annotations

import hashlib
import math
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Callback, Checkpoint

from rslp import upstream
from rslp.errors import CheckpointError, ConfigError, Problem, RunError
from rslp.io import LOAD_ERRORS, archive_damage, atomic_stream, full_disk, link_or_copy
from rslp.models.optim import freeze_callbacks
from rslp.rundir import RunDir
from rslp.runtime import collectives, preemption
from rslp.train.module import BALANCE_KEY, JointModule

# Old checkpoints do not name the primary metrics they were chosen by. Where today's is a key here, it was the value.
_FORMER = {"average_precision": "f1_score"}
# The key that stands for the run as a whole, where others are datasets.
_RUN = ""


@dataclass
class Selection:
    """The best validations so far, by which the best checkpoints are selected.

    Attributes:
        best: score and loss of the best validation by dataset, and of the run under an empty name; a score of -1 means
            that no task had a score.
        highest: the highest score of each ``<dataset>/<task>``, at least 0.
        metrics: the primary metric of each ``<dataset>/<task>``; None before ``begin``, and from an old checkpoint.
    """

    best: dict[str, tuple[float, float]] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, str | None] | None = None

    def begin(self, module: JointModule) -> None:
        """At the start of a training, forget the scores of tasks that had another primary metric when they were set.

        A run that was begun with another version of rslp, or another config, may have such scores. The best checkpoints
        of their datasets and of the run are selected anew; a note says so.
        """
        now = module.primary_metrics()
        before = self.metrics
        if before is None:
            before = {task: _FORMER.get(name or "", name) for task, name in now.items()} if self.best else now
        changed = sorted(task for task in now if before.get(task, now[task]) != now[task])
        for task in changed:
            self.highest.pop(task, None)
        for dataset in [None, *module.datasets()]:
            tasks = [task for task in changed if task in module.primary_metrics(dataset)]
            if tasks and self.best.pop(dataset or _RUN, None) is not None and collectives.is_rank_zero():
                change = f"{tasks[0]} was judged by {before[tasks[0]]} and is judged by {now[tasks[0]]}"
                whose = "the run" if dataset is None else f"dataset {dataset!r}"
                sys.stderr.write(f"note: {change}: the best checkpoint of {whose} is chosen anew\n")
        self.metrics = now

    def improved(self, module: JointModule) -> list[str | None]:
        """Add the last validation; returns the datasets, and None for the run, for which it is the best so far."""
        for pair, result in module.results["val"].items():
            if result.score is not None:
                key = "/".join(pair)
                self.highest[key] = max(result.score, self.highest.get(key, 0.0))
        better: list[str | None] = []
        for dataset in [None, *module.datasets()]:
            score, loss = module.score("val", dataset), module.validation_loss(dataset)
            last = (-1.0 if score is None else score, loss)
            best = self.best.get(dataset or _RUN, (-math.inf, math.inf))
            if (last[0], -last[1]) > (best[0], -best[1]):
                self.best[dataset or _RUN] = last
                better.append(dataset)
        return better

    def best_score(self) -> float | None:
        """The run's best score; None before the first validation with one."""
        score, _ = self.best.get(_RUN, (-1.0, 0.0))
        return None if score < 0 else score

    def unmoved(self) -> list[str]:
        """The tasks, as ``<dataset>/<task>``, that were never better than their baseline."""
        return sorted(task for task, score in self.highest.items() if score <= 0)

    def state_dict(self) -> dict[str, Any]:
        """The selection as plain values, for a checkpoint."""
        best = {dataset: list(pair) for dataset, pair in self.best.items()}
        return {"best": best, "highest": dict(self.highest), "metrics": self.metrics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a selection; checkpoints of earlier versions have scores without losses."""
        pairs = {d: pair if isinstance(pair, list) else [pair, math.inf] for d, pair in state["best"].items()}
        self.best = {dataset: (score, loss) for dataset, (score, loss) in pairs.items()}
        self.highest = dict(state.get("highest", {}))
        self.metrics = state.get("metrics")


def lack_of_room(run: RunDir, module: JointModule, optimizers: Sequence[torch.optim.Optimizer]) -> str | None:
    """A warning if the disk has no room for the checkpoints; None if it has.

    Args:
        run: the run directory; its present checkpoints will be replaced.
        module: the module that is saved.
        optimizers: the optimisers that are saved with it.
    """
    weights = bytes_of(module.state_dict())
    states = [
        _states(group) * sum(p.nbytes for p in group["params"]) for opt in optimizers for group in opt.param_groups
    ]
    best = [run.best(), *map(run.best, module.datasets())]
    present = [path for path in (run.last, run.previous, *best) if path.exists()]
    # last.ckpt, previous.ckpt and one that is being written; the best checkpoints have weights alone.
    needed = 3 * (weights + sum(states)) + len(best) * weights
    missing = needed - sum(path.stat().st_size for path in present)
    free = shutil.disk_usage(run.path).free
    if missing <= free:
        return None
    files = f"last.ckpt, previous.ckpt, {len(best)} of best weights, and one more during a write"
    return f"{run.checkpoints} needs about {missing:,} bytes more ({files}), and {free:,} bytes are free there"


def _states(group: dict[str, Any]) -> int:
    """How many numbers an optimiser stores for each weight of a group: Adam and its variants 2, SGD with momentum 1."""
    return 2 if "betas" in group else int(bool(group.get("momentum")))


def bytes_of(value: Any) -> int:
    """Bytes of the tensors in a checkpoint, or in a part of it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(bytes_of, parts))


def _peak_memory(trainer: Trainer) -> int:
    """The most memory (bytes) that this process has taken: of its GPU, or of the machine where there is none."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Keys of checkpoints: the names of the parameters that train, and the id of the run.
_TRAINABLE_KEY = "rslp_trainable"
RUN_KEY = "rslp_run"
# About how many steps lie between checkpoints while epochs read cached features alone.
_CACHED_STEPS = 100
# Names of a balance's state begin so.
_BALANCE = "balance."
# Characters that are shown of each line of torch's message about weights that do not fit.
_SHOWN = 120


class RunCheckpoints(Checkpoint):
    """Writes ``checkpoints/{last,previous,best,best-<dataset>}.ckpt`` of a run directory.

    Best is the highest validation score, of equal scores the lowest validation loss. ``best*.ckpt`` have weights alone,
    no state of the optimiser. ``last.ckpt`` is written between epochs, after each ``every_n_steps`` optimiser steps, on
    preemption and at the end, never by the clock; the one before it becomes ``previous.ckpt``. Epochs on cached
    features may be shorter than a write, so between them it is written about every ``_CACHED_STEPS`` steps.

    Args:
        run_dir: the run directory.
        every_n_steps: optimiser steps between checkpoints inside an epoch.

    Raises:
        ConfigError: ``every_n_steps`` is less than 1.
    """

    def __init__(self, run_dir: str, every_n_steps: int = 200) -> None:
        if every_n_steps < 1:
            message = f"every_n_steps is {every_n_steps}; 1 or more"
            raise ConfigError(Problem(message, key="trainer.callbacks"))
        self._run = RunDir(Path(run_dir))
        self._every = every_n_steps
        self.selection = Selection()
        self._trainable: frozenset[str] | None = None
        self._run_id: str | None = None
        # Epoch and step of the last.ckpt that this process wrote; None before the first.
        self.saved: tuple[int, int] | None = None
        # Samples that this rank has drawn; and when the training began, so that seconds of earlier starts count.
        self.samples, self._began = 0, 0.0

    @property
    def seconds(self) -> float:
        """Time of training, s, as far as ``state.json`` has it; it is no part of checkpoints, whose bits are fixed."""
        return time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        """The best scores and the samples drawn so far."""
        return {**self.selection.state_dict(), "samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a resumed run."""
        self.selection.load_state_dict(state_dict)
        self.samples = state_dict.get("samples", 0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Save which parameters train; ``on_train_start`` needs it.

        When a run resumes inside an epoch, Lightning does not call what freezes and thaws at the start of an epoch.
        """
        checkpoint[_TRAINABLE_KEY] = [name for name, p in pl_module.named_parameters() if p.requires_grad]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Read which parameters train."""
        self._trainable = frozenset(checkpoint[_TRAINABLE_KEY])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the selection, warn of a disk that is too small, and freeze parameters as the checkpoint says.

        Other callbacks may have frozen them as at the start of a run.

        Raises:
            Preempted: a rank was preempted before the first step.
        """
        preemption.preemption_flag.training = True
        state = self._run.read_state()
        self._began = time.monotonic() - ((state.get("seconds") or 0.0) if trainer.global_step else 0.0)
        self._run_id = state.get("run_id")
        if collectives.any_rank(preemption.preemption_flag.received is not None, device=pl_module.device):
            _raise_preempted()
        self.selection.begin(_joint(pl_module))
        if trainer.is_global_zero and (lack := lack_of_room(self._run, _joint(pl_module), trainer.optimizers)):
            sys.stderr.write(f"warning: {lack}\n")
        if self._trainable is not None:
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad = name in self._trainable

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state between two epochs, before other callbacks change it for the next one."""
        if trainer.current_epoch > 0 and (_may_thaw(trainer) or not self._is_cheap_to_repeat(trainer, pl_module)):
            self._save_last(trainer, epoch_start=True)

    def _is_cheap_to_repeat(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the last epoch need not be saved: it read cached features alone and is too short.

        It is too short if it reached no multiple of ``_CACHED_STEPS``. All ranks give the answer of rank 0.
        """
        step, epoch_length = trainer.global_step, int(trainer.num_training_batches)
        is_short = step // _CACHED_STEPS == (step - epoch_length) // _CACHED_STEPS
        module = _joint(pl_module)
        return bool(
            trainer.strategy.broadcast(is_short and module.reads_cached_features() and not module.stop_requested())
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save inside an epoch, every ``every_n_steps`` steps and on preemption, which then ends the run.

        After an epoch's last step, ``on_train_epoch_start`` of the next epoch or ``on_train_end`` saves.

        Raises:
            Preempted: the run is preempted; its state is saved.
        """
        self.samples += sum(len(part.metadatas) for part in batch)
        ends_epoch = batch_idx + 1 >= trainer.num_training_batches
        preempted = _joint(pl_module).stop_requested()
        if not ends_epoch and (preempted or trainer.global_step % self._every == 0):
            self._save_last(trainer, epoch_start=False)
            if preempted:
                _raise_preempted()

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """End on preemption, since a validation may be long; it is repeated after a resume.

        Of several ranks none may end alone: they skip the rest, and end together after the validation.

        Raises:
            Preempted: the run is preempted.
        """
        if (
            upstream.has_trained(trainer)
            and not collectives.is_distributed()
            and preemption.preemption_flag.received is not None
        ):
            _raise_preempted()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the weights if the validation is the best so far of the run or of a dataset."""
        if trainer.sanity_checking or not upstream.has_trained(trainer):
            return
        module = _joint(pl_module)
        better = self.selection.improved(module)
        if better:
            checkpoint = upstream.dump_validated(trainer)
            self._write(trainer, checkpoint, *map(self._run.best, better))
        self._write_state(trainer, epoch=trainer.current_epoch + 1, score=module.score("val"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save the end of the run; with more epochs or steps in its config, the run goes on from there."""
        self._save_last(trainer, epoch_start=not upstream.stopped_inside(trainer), ended=True)

    def _save_last(self, trainer: Trainer, *, epoch_start: bool, ended: bool = False) -> None:
        """Write ``last.ckpt``; all ranks have to call it.

        Args:
            trainer: the trainer.
            epoch_start: the state lies between two epochs, and a resume begins the next one.
            ended: the training has ended; otherwise it goes on.
        """
        _joint(trainer.lightning_module).meters["train"].reduce_to_rank_zero()
        checkpoint = upstream.dump_checkpoint(trainer)
        if epoch_start:
            checkpoint = upstream.as_epoch_start(checkpoint, upstream.completed_epochs(trainer))
        elif ended:
            checkpoint = upstream.as_inside_epoch(checkpoint, upstream.completed_epochs(trainer) - 1)
        self._write(trainer, checkpoint, self._run.last)
        self.saved = (checkpoint["epoch"], trainer.global_step)
        self._write_state(trainer, epoch=checkpoint["epoch"], score=self.selection.best_score())
        # A rank that ends takes the others with it, so none may end before rank 0 has written the file.
        trainer.strategy.barrier()

    def _write_state(self, trainer: Trainer, *, epoch: int, score: float | None) -> None:
        if trainer.is_global_zero:
            progress = {"epoch": epoch, "step": trainer.global_step, "score": score, "seconds": self.seconds}
            self._run.write_state(state="running", **progress, run_id=self._run_id)
            samples = self.samples * trainer.world_size
            self._run.append_usage(
                step=trainer.global_step, seconds=self.seconds, samples=samples, memory=_peak_memory(trainer)
            )

    def _write(self, trainer: Trainer, checkpoint: Mapping[str, Any], path: Path, *same: Path) -> None:
        """Write a checkpoint on rank 0, and hard links (or copies) at further paths."""
        if trainer.is_global_zero:
            write_checkpoint({**checkpoint, RUN_KEY: self._run_id}, path)
            for other in same:
                link_or_copy(path, other)


def _joint(module: LightningModule) -> JointModule:
    if not isinstance(module, JointModule):
        raise TypeError(f"RunCheckpoints needs a JointModule, got {type(module).__name__}")
    return module


def _may_thaw(trainer: Trainer) -> bool:
    """Whether this epoch may train parameters that were frozen in the last, and so no longer use cached features."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    thaws = [stage.thaw_at_epoch for stage in freeze_callbacks(trainer)]
    return trainer.current_epoch in thaws or any(isinstance(callback, BaseFinetuning) for callback in callbacks)


def _raise_preempted() -> None:
    received = preemption.preemption_flag.received
    raise preemption.Preempted(received.name if received else "another process was asked to leave")


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically; an existing ``last.ckpt`` becomes ``previous.ckpt``.

    Raises:
        DiskError: the disk is full or fails; the old file is unchanged.
        RunError: the folder can't be written to.
    """
    try:
        with atomic_stream(path, needed=lambda: bytes_of(checkpoint)) as stream:
            torch.save(dict(checkpoint), stream)
            stream.flush()
            os.fsync(stream.fileno())
            if path.name == "last.ckpt" and path.exists():
                path.replace(path.with_name("previous.ckpt"))
    except OSError as error:
        raise full_disk(error, path) or RunError(f"{path} can't be written: {error.strerror or error}") from error


def read_with_digest(run: RunDir, path: Path) -> tuple[dict[str, Any], str]:
    """Read a checkpoint and the sha256 of its file: both from one open file, since a training may replace it meanwhile.

    Raises:
        CheckpointError: see ``read_checkpoint``.
        RunError: see ``refuse_foreign``.
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
    """Read a checkpoint onto the CPU, after a check for damage; only tensors and plain values are unpickled.

    Args:
        path: the file, also for messages.
        handle: the open file, if there is one.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings(), nullcontext(handle) if handle else path.open("rb") as stream:
            # torch may warn about a foreign file before it refuses it.
            warnings.simplefilter("ignore")
            stream.seek(0)
            if damage := archive_damage(stream):
                raise CheckpointError(f"{path} can't be read as a checkpoint: {damage}")
            checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        reason = str(error).strip().partition("\n")[0]
        if reason.startswith("Weights only load failed"):
            # torch's own message is about its change of a default.
            reason = "it holds more than tensors and plain values"
        raise CheckpointError(f"{path} can't be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no checkpoint: it holds no `state_dict`")
    return checkpoint


def refuse_foreign(run: RunDir, checkpoint: Mapping[str, Any], *, path: Path) -> None:
    """Raise an error for a checkpoint in the run directory that another run wrote.

    Checkpoints of earlier versions have no run id, and are accepted.

    Raises:
        RunError: its run id differs from that in ``state.json``.
    """
    own, other = run.read_state().get("run_id"), checkpoint.get(RUN_KEY)
    if own and other and own != other and path.resolve().parent == run.checkpoints.resolve():
        message = f"{path} is a checkpoint of another run: its run id is {other}, that of this run (state.json) {own}"
        raise RunError(f"{message}; put this run's own checkpoint back, or move that one away")


def load_weights(module: torch.nn.Module, checkpoint: Mapping[str, Any], *, path: Path, resumed: bool = False) -> None:
    """Load a checkpoint's weights; all of them must fit.

    Only a run that goes on needs the state of its ``balance``: an evaluation takes weights of a run with any.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape, the message lists some; or a run that goes
            on has another ``balance``.
    """
    weights, before = dict(checkpoint["state_dict"]), checkpoint.get(BALANCE_KEY, "none")
    if before != (now := getattr(module, "balance_name", "none")):
        if resumed:
            message = f"{path} was trained with balance: {before}, and the config has balance: {now}"
            raise CheckpointError(f"{message}; a run goes on with the balance it began with; start another experiment")
        weights = {name: value for name, value in weights.items() if not name.startswith(_BALANCE)}
        weights |= {name: value for name, value in module.state_dict().items() if name.startswith(_BALANCE)}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        shown = [line if len(line) <= _SHOWN else f"{line[:_SHOWN]} …" for line in lines[:3]]
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise CheckpointError(f"{path} does not fit the model: {' '.join(shown)}{more}") from error
