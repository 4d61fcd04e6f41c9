"""The joint Lightning module: losses, metrics by dataset and task, and the score that selects checkpoints."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerLRSchedulerConfig
from rslearn.train.lightning_module import RestoreConfig, RslearnLightningModule
from rslearn.train.model_context import ModelContext
from rslearn.train.optimizer import OptimizerFactory
from rslearn.train.scheduler import SchedulerFactory
from rslearn.train.tasks import Task
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rslp import upstream
from rslp.data.batches import Batch
from rslp.data.crops import crop_place
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.data.samples import seed_torch, stable_seed
from rslp.errors import ConfigError, Problem
from rslp.models import optim, restoring
from rslp.models.joint import JointModel, JointOutput
from rslp.models.optim import use_foreach
from rslp.runtime import collectives, preemption
from rslp.train import baselines
from rslp.train.callbacks import FiniteGuard, FinitePolicy, OnNonfinite
from rslp.train.losses import LossMeter, all_reduce_denominators, loss_factors, weighted
from rslp.train.metrics import TaskMetrics, TaskResult

BASELINES_KEY = "rslp_floors"
LOSSES_KEY = "rslp_train_losses"
FINITE_KEY = "rslp_nonfinite"
THRESHOLDS_KEY = "rslp_thresholds"
Results = dict[tuple[str, str], TaskResult]


class JointModule(RslearnLightningModule):
    """Trains a ``JointModel`` on the optimiser steps of a ``MultiDatasetDataModule``.

    The loss of a step of m batches, m_t of them with task t, over all processes r and batches j, is

        L = sum over t of (m_t / m) w_t (sum over j, r of n_tjr l_tjr) / (sum over j, r of n_tjr)

    l being the head's mean over n units (see ``models.denominators``) and w the task's weight in ``loss_weights``. Each
    batch's part is differentiated by itself, so one graph is held at a time; the last one is left to Lightning.

    Logs ``{train,val,test}/<dataset>/<task>/<metric>``, the normalised score ``{val,test}/score``, and beside them
    rslearn's names (``val_loss``, ``val_<task>/<metric>``), which callbacks of existing configs monitor.

    Args:
        model: the model.
        task: the tasks of all datasets, united.
        optimizer: the optimizer factory; AdamW with ``lr`` when None.
        scheduler: the scheduler factory, stepped once an epoch; a plateau scheduler follows the validation score.
        restore_config: weights to start from that are no checkpoint of ours.
        lr: learning rate when no optimizer is given.
        plateau: a plateau scheduler when no scheduler is given.
        plateau_factor: its factor.
        plateau_patience: its patience, epochs.
        plateau_min_lr: its smallest learning rate.
        plateau_cooldown: its cooldown, epochs.
        on_nonfinite: what is done about a step whose loss or gradients are not finite: ``stop``, or ``skip``, which
            leaves weights and optimiser as they are.
        max_nonfinite: so many steps may be skipped; one more ends the run.
    """

    model: JointModel

    def __init__(
        self,
        model: torch.nn.Module,
        task: Task,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        restore_config: RestoreConfig | None = None,
        lr: float = 1e-3,
        plateau: bool = False,
        plateau_factor: float = 0.1,
        plateau_patience: int = 10,
        plateau_min_lr: float = 0,
        plateau_cooldown: int = 0,
        on_nonfinite: OnNonfinite = "stop",
        max_nonfinite: int = 10,
    ) -> None:
        super().__init__(
            model=model,
            task=task,
            optimizer=optimizer,
            scheduler=scheduler,
            restore_config=restore_config,
            lr=lr,
            plateau=plateau,
            plateau_factor=plateau_factor,
            plateau_patience=plateau_patience,
            plateau_min_lr=plateau_min_lr,
            plateau_cooldown=plateau_cooldown,
        )
        # rslearn's united metrics hide which dataset a value is of, and swallow errors of keys.
        del self.val_metrics, self.test_metrics
        self.seed = 0
        self.finite = FiniteGuard(FinitePolicy(on_nonfinite, max_nonfinite))
        self._resting = optim.FrozenInEvalMode()
        self.constants: baselines.Baselines = {}
        self.results: dict[str, Results] = {}
        # Score thresholds of detectors, chosen on the last validation: dataset -> task -> threshold.
        self.thresholds: dict[str, dict[str, float]] = {}
        self._val_losses: dict[str | None, float] = {}
        self._without_value: set[tuple[str, str, str]] = set()
        # A step that is left out because it is not finite is not in the epoch's mean either.
        self.meters = {split: LossMeter(only_finite=split == "train") for split in ("train", "val", "test")}
        self._asked_to_leave = False
        self._metrics: dict[tuple[str, str], TaskMetrics] = {}
        self._tasks: dict[tuple[str, str], Task] = {}

    def setup(self, stage: str) -> None:
        """Learn from the data module which dataset has which tasks, and, before training, the floors."""
        data = self._data_module()
        self.model.set_datasets(data.tasks())
        data.background = self.model.with_background()
        for dataset, module in data.data_modules.items():
            for name, task in baselines.tasks_by_name(module.task, dataset).items():
                self._tasks[dataset, name] = task
                self._metrics[dataset, name] = TaskMetrics(task)
        if stage == "fit" and not self.constants:
            data.setup("fit")
            learnt: baselines.Baselines = {}
            if self.trainer.is_global_zero:
                learnt = baselines.fit_baselines(
                    data.sources("train"), skip=data.bad_sample_record.policy.skips_bad_samples
                )
            self.constants = self.trainer.strategy.broadcast(learnt)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep floors and thresholds, which come from other splits, and the losses since the epoch began."""
        checkpoint[BASELINES_KEY] = self.constants
        checkpoint[THRESHOLDS_KEY] = self.thresholds
        checkpoint[LOSSES_KEY] = self.meters["train"].state()
        checkpoint[FINITE_KEY] = self.finite.state_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the floors, thresholds and losses of the run that is gone on with."""
        self.constants = checkpoint.get(BASELINES_KEY, {})
        self.thresholds = checkpoint.get(THRESHOLDS_KEY, {})
        if LOSSES_KEY in checkpoint and collectives.is_rank_zero():
            self.meters["train"].load([checkpoint[LOSSES_KEY]])
        if FINITE_KEY in checkpoint:
            self.finite.load_state_dict(checkpoint[FINITE_KEY])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimizer and scheduler; a plateau scheduler follows 1 - score of the last validation.

        What thaws later is in the optimizer from the start, so that schedulers know its groups.
        """
        stages = optim.freeze_callbacks(self.trainer)
        later = [p for stage in stages if stage.thaw_at_epoch is not None for p in stage.parameters]
        never = {p for stage in stages if stage.thaw_at_epoch is None for p in stage.parameters}
        for parameter in later:
            parameter.requires_grad = parameter not in never
        optimizer = self.optimizer_factory.build(self)
        optim.set_trainable(self.trainer, epoch=0)
        optim.split_groups(optimizer, stages)
        optim.attach(optimizer)
        use_foreach(optimizer)
        if self.scheduler_factory is None:
            return {"optimizer": optimizer}  # type: ignore[typeddict-item]
        scheduler = self.schedulers["scheduler"] = self.scheduler_factory.build(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            if self.trainer.limit_val_batches == 0:
                what = "a plateau scheduler follows the validation score, and trainer.limit_val_batches is 0"
                raise ConfigError(Problem(what, key="model.init_args.scheduler"))
            frequency = self.trainer.check_val_every_n_epoch or 1
            # An epoch without a score, as of a split without a valid label, is no step of the scheduler.
            config |= {"monitor": "val/score_loss", "frequency": frequency, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[typeddict-item]

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any | None) -> None:
        """Step a scheduler; a plateau scheduler looks at the validation loss where the score stays what it was."""
        if isinstance(scheduler, ReduceLROnPlateau):
            optim.forgive_ties(scheduler, float(metric or 0), loss=self.validation_loss())
        super().lr_scheduler_step(scheduler, metric)

    def on_fit_start(self) -> None:
        """At a run's first start, load the weights that ``restore_config`` names.

        Raises:
            ConfigError: they can't be loaded, or no validation would come in an epoch.
        """
        trainer = self.trainer
        if trainer.ckpt_path is None and self.restore_config:
            restoring.load(self.restore_config, self.model)
        between, steps = trainer.val_check_interval, self._data_module().steps()
        if trainer.check_val_every_n_epoch is not None and isinstance(between, int) and between > steps:
            what = f"{between} steps, but an epoch has {steps}; check_val_every_n_epoch: null counts over epochs"
            raise ConfigError(Problem(what, key="trainer.val_check_interval"))

    def on_train_start(self) -> None:
        """Let what is frozen rest, after callbacks have frozen and thawed, also where a run goes on inside an epoch."""
        self._resting.follow(self.model.encoder)

    def on_train_epoch_start(self) -> None:
        """Let what is frozen rest, after callbacks have frozen and thawed for this epoch."""
        self._resting.follow(self.model.encoder)

    def on_train_epoch_end(self) -> None:
        """Log the mean losses of the epoch."""
        self.meters["train"].settle()
        self.log_dict(self._from_rank_zero(self.meters["train"].values("train")))
        upstream.let_schedulers_step(self.trainer)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: Lightning would clear what the first batches of a step have given; it is done before them."""

    def training_step(self, batch: list[Batch], batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Differentiate all batches of a step but the last, whose part of the loss is returned."""
        optimizer = self.optimizers()
        if not isinstance(optimizer, LightningOptimizer):
            raise TypeError("JointModule trains with one optimizer")
        optimizer.zero_grad()
        self.finite.begin()
        counts = [self.model.loss_denominators(part.dataset, part.targets) if part.inputs else {} for part in batch]
        shares = self._loss_factors(batch, counts)
        pending: torch.Tensor | None = None
        for place, part in enumerate(batch):
            if not part.inputs:
                continue
            if pending is not None:
                upstream.backward(self.trainer, pending)
            # The randomness of dropout and of sampled anchors depends on the place alone: a resumed run repeats it.
            seed_torch(
                stable_seed(self.seed, "step", self.current_epoch, batch_idx, place, self.global_rank), self.device
            )
            output = self._forward(part)
            self.finite.note(part, output.loss_dict)
            self.meters["train"].add(part.dataset, losses=output.losses, counts=counts[place], samples=len(part.inputs))
            pending = weighted(output.losses, shares[place], like=self._any_parameter())
        # A process without a sample in the whole step takes part in it with nothing.
        return pending if pending is not None else torch.zeros((), device=self.device, requires_grad=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Look whether the step can be taken."""
        scaled = upstream.scales_gradients(self.trainer)
        self.finite.check(self, optimizer, step=self.trainer.global_step, gradients=not scaled)

    def validation_step(self, batch: list[Batch], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Add batches to the validation metrics."""
        # All processes meet after the loop; one that has to leave hurries there.
        if not (collectives.is_distributed() and preemption.preemption_flag.received):
            self._evaluation_step("val", batch)

    def test_step(self, batch: list[Batch], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Add batches to the test metrics."""
        self._evaluation_step("test", batch)

    def predict_step(  # type: ignore[override]
        self,
        batch: list[Batch],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> list[list[dict[str, Any]]]:
        """For each batch the outputs of its samples by task."""
        return [self._predict(part) if part.inputs else [] for part in batch]

    def on_validation_epoch_start(self) -> None:
        """Put the metrics where the outputs will be."""
        self._move_metrics()

    def on_test_epoch_start(self) -> None:
        """Put the metrics where the outputs will be."""
        self._move_metrics()

    def on_validation_epoch_end(self) -> None:
        """Compute and log the validation metrics and the score."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Compute and log the test metrics and the score."""
        self._finish("test")

    def stop_requested(self) -> bool:
        """Whether a scheduler wants the machine: the answer that all processes agreed on at the step's begin."""
        return self._asked_to_leave if collectives.is_distributed() else preemption.preemption_flag.received is not None

    def reads_cached_features(self) -> bool:
        """Whether the last training epoch and its validation read kept features alone."""
        data = self._data_module()
        read = ["train"] if self.trainer.limit_val_batches == 0 else ["train", "val"]
        return all(data.frozen.covers(split, data.data_modules) for split in read)

    def datasets(self) -> list[str]:
        """The keys of the datasets."""
        return sorted({dataset for dataset, _ in self._metrics})

    def score(self, split: str, dataset: str | None = None) -> float | None:
        """Mean normalised score of the tasks, of the run or of one dataset; None before an evaluation."""
        results = self.results.get(split, {})
        scores = [r.score for (d, _), r in results.items() if r.score is not None and dataset in (None, d)]
        return sum(scores) / len(scores) if scores else None

    def validation_loss(self, dataset: str | None = None) -> float:
        """The loss of the last validation, of the run or of one dataset; infinite where there is none."""
        loss = self._val_losses.get(dataset, math.inf)
        return loss if math.isfinite(loss) else math.inf

    def primary_metrics(self, dataset: str | None = None) -> dict[str, str | None]:
        """The names of the primary metrics by ``<dataset>/<task>``, of the run or of one dataset."""
        return {
            f"{d}/{task}": None if metrics.primary is None else metrics.primary.name
            for (d, task), metrics in sorted(self._metrics.items())
            if dataset in (None, d)
        }

    def _move_metrics(self) -> None:
        for metrics in self._metrics.values():
            metrics.to(self.device)

    def _data_module(self) -> MultiDatasetDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MultiDatasetDataModule):
            raise TypeError(f"JointModule needs a MultiDatasetDataModule, got {type(data).__name__}")
        return data

    def _any_parameter(self) -> torch.Tensor:
        return next(self.parameters())

    def _loss_factors(self, step: list[Batch], counts: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """The factor on each batch's mean loss of each task; whether to leave is agreed on by the same message."""
        asked = preemption.preemption_flag.received is not None
        totals, asked_somewhere = all_reduce_denominators(
            counts, tasks=self.model.tasks, asked=asked, device=self.device
        )
        if collectives.is_distributed():
            self._asked_to_leave = bool(asked_somewhere.item())
        return loss_factors(counts, totals=totals, tasks=[self.model.tasks_of(batch.dataset) for batch in step])

    def _forward(self, batch: Batch) -> JointOutput:
        context = ModelContext(inputs=batch.inputs, metadatas=batch.metadatas)
        output: JointOutput = self.model(context, batch.targets, features=batch.features)
        return output

    def _predict(self, batch: Batch) -> list[dict[str, Any]]:
        output: JointOutput = self(ModelContext(inputs=batch.inputs, metadatas=batch.metadatas))
        return list(output.outputs)

    def _evaluation_step(self, split: str, batches: list[Batch]) -> None:
        for batch in batches:
            if batch.inputs:
                self._evaluate(split, batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        output = self._forward(batch)
        counts = self.model.loss_denominators(batch.dataset, batch.targets)
        self.meters[split].add(batch.dataset, losses=output.losses, counts=counts, samples=len(batch.inputs))
        outputs = list(output.outputs)
        overlap = self._data_module().sources(split)[batch.dataset].overlap
        places = [crop_place(metadata, overlap=overlap) for metadata in batch.metadatas]
        for task in self._tasks_of(batch.dataset):
            targets = [target[task] for target in batch.targets]
            metrics = self._metrics[batch.dataset, task]
            constants = self._constants(batch.dataset, task=task, targets=targets)
            metrics.update([out[task] for out in outputs], targets=targets, constants=constants, places=places)

    def _constants(self, dataset: str, *, task: str, targets: list[dict[str, Any]]) -> list[Any] | None:
        constant = self.constants.get(dataset, {}).get(task)
        if constant is None:
            return None
        kind = self._tasks[dataset, task]
        return [baselines.baseline_output(kind, constant, target) for target in targets]

    def _tasks_of(self, dataset: str) -> list[str]:
        return [task for d, task in self._metrics if d == dataset]

    def _gather_metrics(self, split: str) -> None:
        """Let every process know what all have seen.

        Raises:
            Preempted: one of them was asked to leave during a training's validation.
        """
        if not collectives.is_distributed():
            return
        leave = split == "val" and preemption.preemption_flag.received is not None
        states = {key: metrics.state() for key, metrics in self._metrics.items()}
        told = collectives.all_gather((leave, states))
        if any(leave for leave, _ in told) and upstream.has_trained(self.trainer):
            raise preemption.Preempted("during a validation")
        for key, metrics in self._metrics.items():
            metrics.merge([states[key] for _, states in told])

    def _from_rank_zero(self, values: dict[str, float]) -> dict[str, float]:
        """What the first process has, in all of them: callbacks decide by it, and have to decide alike."""
        told: dict[str, float] = self.trainer.strategy.broadcast(values)
        return told

    def _finish(self, split: str) -> None:
        self._gather_metrics(split)
        self.meters[split].settle()
        self.results[split] = {key: self._result(split, *key) for key in self._metrics}
        logged = self._from_rank_zero(self.meters[split].values(split))
        if split == "val":
            self._val_losses = {d: logged.get(f"val/{d}/loss", math.inf) for d in self.datasets()}
            self._val_losses[None] = logged.get("val_loss", math.inf)
        for (dataset, task), result in self.results[split].items():
            for name, value in result.values.items():
                if value is not None:
                    logged[f"{split}/{dataset}/{task}/{name}"] = value
                    logged[f"{split}_{task}/{name}"] = value
        score = self.score(split)
        if score is not None:
            logged[f"{split}/score"] = score
            logged[f"{split}/score_loss"] = 1 - score
        self.log_dict(logged)

    def _result(self, split: str, dataset: str, task: str) -> TaskResult:
        """What a split says of a task; says once where it says nothing."""
        chosen = self.thresholds.get(dataset, {}).get(task)
        result = self._metrics[dataset, task].result(threshold=chosen, tune=split == "val")
        if split == "val" and result.threshold is not None:
            self.thresholds.setdefault(dataset, {})[task] = result.threshold
        if result.primary and result.score is None and (split, dataset, task) not in self._without_value:
            self._without_value.add((split, dataset, task))
            what = "no object" if result.n else "no valid label"
            message = f"{dataset}/{task}: {what} in the {split} split: {result.primary} has no value there"
            if collectives.is_rank_zero():
                sys.stderr.write(f"warning: {message}, and the score leaves it out\n")
        return result
