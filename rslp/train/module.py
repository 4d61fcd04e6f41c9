"""The joint Lightning module: losses, metrics by dataset and task, and the score that selects checkpoints.

What Lightning calls a batch is here one optimiser step: a list of ``Batch``, each of one dataset. ``training_step``
itself runs the backward pass of all but the last of them.
"""

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
from rslp.errors import ConfigError, Problem
from rslp.models import optim, restoring
from rslp.models.joint import JointModel, JointOutput
from rslp.models.optim import use_foreach
from rslp.runtime import collectives, preemption
from rslp.runtime.seeds import seed_torch, stable_seed
from rslp.train import baselines
from rslp.train.balance import AGGREGATIONS, BalanceName
from rslp.train.balance.aggregation import Aggregation, shared_parameters
from rslp.train.balance.losses import loss_balance, split_group
from rslp.train.callbacks import FiniteGuard, FinitePolicy, OnNonfinite
from rslp.train.losses import LossMeter, all_reduce_denominators, loss_factors
from rslp.train.metrics import Resampler, TaskMetrics, TaskResult
from rslp.upstream.task_kinds import tasks_by_name

# Keys of checkpoints; their values are part of the format.
BASELINES_KEY = "rslp_floors"
LOSSES_KEY = "rslp_train_losses"
FINITE_KEY = "rslp_nonfinite"
THRESHOLDS_KEY = "rslp_thresholds"
BALANCE_KEY = "rslp_balance"
# The results of an evaluation by (dataset, task).
Results = dict[tuple[str, str], TaskResult]


class JointModule(RslearnLightningModule):
    """Trains a ``JointModel`` on the optimiser steps of a ``MultiDatasetDataModule``.

    The loss of a step of m batches, m_t of them with task t, over all processes r and batches j, is

        L = sum over t of (m_t / m) w_t (sum over j, r of n_tjr l_tjr) / (sum over j, r of n_tjr)

    where l is the head's mean loss over n units (pixels, samples or class weights, ``rslp.models.denominators``) and w
    the task's entry in ``loss_weights``. So within a step a task's loss is one mean over the units of all its batches
    and processes. The gradient of each batch is computed separately, so that one graph is in memory at a time.

    Logs ``{train,val,test}/<dataset>/<task>/<metric>``, the normalised score ``{val,test}/score``, and the same values
    under rslearn's names (``val_loss``, ``val_<task>/<metric>``), which callbacks of existing configs monitor.

    Args:
        model: the model.
        task: the tasks of all datasets, in one MultiTask.
        optimizer: the optimizer factory; AdamW with ``lr`` when None.
        scheduler: the scheduler factory. The scheduler steps once an epoch; a plateau scheduler follows the validation
            score.
        restore_config: weights to start from that are not a checkpoint of a run.
        lr: learning rate when no optimizer is given.
        plateau: a plateau scheduler when no scheduler is given.
        plateau_factor: its factor.
        plateau_patience: its patience, epochs.
        plateau_min_lr: its smallest learning rate.
        plateau_cooldown: its cooldown, epochs.
        on_nonfinite: whether a step whose loss or gradients are not finite ends the run (``stop``) or is left out, with
            weights and optimiser unchanged (``skip``).
        max_nonfinite: how many steps may be skipped; one more ends the run.
        balance: how the tasks' losses, or the datasets' gradients on the encoder, are weighted; see
            ``rslp.train.balance``.

    Attributes:
        seed: the run's seed.
        constants: the baselines: for each dataset and task the best constant prediction, learnt from training labels.
        results: the results of the last evaluation of each split.
        thresholds: for each dataset and task of a detector the score threshold chosen on the last validation.
        finite: checks that losses and gradients are finite.
        meters: the mean losses of each split since the epoch began.
        records_samples: whether evaluations that begin now record their samples (``TaskResult.records``).
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
        balance: BalanceName = "none",
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
        # Ours take their place: rslearn's do not distinguish datasets, and ignore tasks that a batch does not have.
        del self.val_metrics, self.test_metrics
        self.seed = 0
        self.finite = FiniteGuard(FinitePolicy(on_nonfinite, max_nonfinite))
        self._eval_mode = optim.FrozenInEvalMode()
        self.balance_name = balance
        self.balance = loss_balance(balance, self.model.loss_weights)
        # Made when a training begins: an evaluation needs no TorchJD.
        self._aggregation: Aggregation | None = None
        self.constants: baselines.Baselines = {}
        self.results: dict[str, Results] = {}
        self.thresholds: dict[str, dict[str, float]] = {}
        # The loss of the last validation by dataset, and under None of the run.
        self._val_losses: dict[str | None, float] = {}
        # (split, dataset, task) that the user was warned about.
        self._warned: set[tuple[str, str, str]] = set()
        # Losses that are not finite (of skipped steps) are left out of a training epoch's mean.
        self.meters = {split: LossMeter(only_finite=split == "train") for split in ("train", "val", "test")}
        self._preempted = False
        self.records_samples = False
        # By (dataset, task).
        self._metrics: dict[tuple[str, str], TaskMetrics] = {}
        self._tasks: dict[tuple[str, str], Task] = {}

    def setup(self, stage: str) -> None:
        """Take the datasets and their tasks from the data module; before training, fit the baselines."""
        data = self._data_module()
        self.model.set_datasets(data.tasks())
        data.background = self.model.with_background()
        self.balance.set_tasks(task for tasks in data.tasks().values() for task in tasks)
        self._tasks, self._metrics = {}, {}
        for dataset, module in data.data_modules.items():
            for name, task in tasks_by_name(module.task, dataset).items():
                self._tasks[dataset, name] = task
                self._metrics[dataset, name] = TaskMetrics(task, record=self.records_samples)
        if stage == "fit" and not self.constants:
            data.setup("fit")
            fitted: baselines.Baselines = {}
            if self.trainer.is_global_zero:
                fitted = baselines.fit_baselines(
                    data.sources("train"), skip=data.bad_sample_record.policy.skips_bad_samples
                )
            self.constants = self.trainer.strategy.broadcast(fitted)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save baselines (from training labels), thresholds (from validation) and the losses since the epoch began."""
        checkpoint[BASELINES_KEY] = self.constants
        checkpoint[THRESHOLDS_KEY] = self.thresholds
        checkpoint[LOSSES_KEY] = self.meters["train"].state()
        checkpoint[FINITE_KEY] = self.finite.state_dict()
        if self.balance_name != "none":
            checkpoint[BALANCE_KEY] = self.balance_name

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore baselines, thresholds and losses of a resumed run."""
        self.constants = checkpoint.get(BASELINES_KEY, {})
        self.thresholds = checkpoint.get(THRESHOLDS_KEY, {})
        if LOSSES_KEY in checkpoint and collectives.is_rank_zero():
            self.meters["train"].load([checkpoint[LOSSES_KEY]])
        if FINITE_KEY in checkpoint:
            self.finite.load_state_dict(checkpoint[FINITE_KEY])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimizer and the scheduler; a plateau scheduler follows 1 - score of the last validation.

        Parameters that thaw in a later epoch are in the optimizer from the start, so that schedulers know their groups.

        Raises:
            ConfigError: a plateau scheduler without validation.
        """
        freezes = optim.freeze_callbacks(self.trainer)
        thaw_later = [p for freeze in freezes if freeze.thaw_at_epoch is not None for p in freeze.parameters]
        thaw_never = {p for freeze in freezes if freeze.thaw_at_epoch is None for p in freeze.parameters}
        # The factory takes the parameters that require gradients; set_trainable freezes them again.
        for parameter in thaw_later:
            parameter.requires_grad = parameter not in thaw_never
        optimizer = self.optimizer_factory.build(self)
        optim.set_trainable(self.trainer, epoch=0)
        split_group(optimizer, self.balance)
        optim.split_groups(optimizer, freezes)
        self._aggregation = self._make_aggregation(optimizer)
        optim.attach_warmup(optimizer)
        use_foreach(optimizer)
        if self.scheduler_factory is None:
            return {"optimizer": optimizer}  # type: ignore[typeddict-item]
        scheduler = self.schedulers["scheduler"] = self.scheduler_factory.build(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            if self.trainer.limit_val_batches == 0:
                message = "a plateau scheduler follows the validation score, and trainer.limit_val_batches is 0"
                raise ConfigError(Problem(message, key="model.init_args.scheduler"))
            frequency = self.trainer.check_val_every_n_epoch or 1
            # Not strict: Lightning then steps no scheduler, instead of an error, if there is no score (no valid label).
            config |= {"monitor": "val/score_loss", "frequency": frequency, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[typeddict-item]

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any | None) -> None:
        """Step a scheduler; for a plateau scheduler, a lower validation loss at an equal score is an improvement."""
        if isinstance(scheduler, ReduceLROnPlateau):
            optim.forgive_ties(scheduler, float(metric or 0), loss=self.validation_loss())
        super().lr_scheduler_step(scheduler, metric)

    def on_fit_start(self) -> None:
        """Load the weights of ``restore_config``, unless the run resumes.

        Raises:
            ConfigError: they can't be loaded, or an epoch is shorter than ``val_check_interval``.
        """
        trainer = self.trainer
        if trainer.ckpt_path is None and self.restore_config:
            restoring.load(self.restore_config, self.model)
        interval, steps = trainer.val_check_interval, self._data_module().steps()
        if trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and interval > steps:
            message = f"{interval} steps, but an epoch has {steps}; check_val_every_n_epoch: null counts over epochs"
            raise ConfigError(Problem(message, key="trainer.val_check_interval"))

    def on_train_start(self) -> None:
        """Put frozen modules into evaluation mode; a resume inside an epoch does not call ``on_train_epoch_start``."""
        self._eval_mode.update(self.model.encoder)

    def on_train_epoch_start(self) -> None:
        """Put frozen modules into evaluation mode, after callbacks have frozen and thawed for this epoch."""
        self._eval_mode.update(self.model.encoder)

    def on_train_epoch_end(self) -> None:
        """Log the mean losses of the epoch."""
        self.meters["train"].reduce_to_rank_zero()
        self.log_dict(self._from_rank_zero(self.meters["train"].values("train")))
        weights = self.balance.weights()
        self.log_dict({f"train/{d}/{task}/weight": weights[task] for d, task in self._tasks if task in weights})
        upstream.let_schedulers_step(self.trainer)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: ``training_step`` sets the gradients to zero itself, before the first of its batches."""

    def training_step(self, batch: list[Batch], batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Compute the gradients of all batches of a step but the last, and return the last one's loss to Lightning.

        Each loss is multiplied by its task's factor in the step's loss, see the class.

        Args:
            batch: the step's batches; those without inputs (no share on this rank, or only bad samples) are left out.
            batch_idx: number of the step in the epoch.
            dataloader_idx: not used.
        """
        optimizer = self.optimizers()
        if not isinstance(optimizer, LightningOptimizer):
            raise TypeError("JointModule trains with one optimizer")
        optimizer.zero_grad()
        self.finite.begin()
        self.balance.begin()
        if self._aggregation is not None:
            self._aggregation.begin(part.dataset for part in batch)
        denominators = [
            self.model.loss_denominators(part.dataset, part.targets) if part.inputs else {} for part in batch
        ]
        factors = self._loss_factors(batch, denominators)
        # The loss of the last batch so far, whose backward pass is still to be done.
        pending: torch.Tensor | None = None
        for position, part in enumerate(batch):
            if not part.inputs:
                continue
            if pending is not None:
                upstream.backward(self.trainer, pending)
            if self._aggregation is not None:
                self._aggregation.dataset = part.dataset
            # Dropout and sampled anchors depend on the batch's position alone, so that a resumed run repeats them.
            seed_torch(
                stable_seed(self.seed, "step", self.current_epoch, batch_idx, position, self.global_rank), self.device
            )
            output = self._forward(part)
            self.finite.note(part, output.loss_dict)
            self.meters["train"].add(
                part.dataset, losses=output.losses, counts=denominators[position], samples=len(part.inputs)
            )
            pending = self.balance.loss(output.losses, factors[position], like=next(self.parameters()))
        # A rank without a sample in the whole step contributes a loss of 0.
        return pending if pending is not None else torch.zeros((), device=self.device, requires_grad=True)

    def on_after_backward(self) -> None:
        """Collect the gradients of the batch's dataset, where datasets' gradients are aggregated."""
        if self._aggregation is not None:
            self._aggregation.collect()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Aggregate gradients, and check that losses and gradients are finite; the policy ends the run or skips it."""
        step = self.trainer.global_step
        if self._aggregation is not None:
            weights = self._aggregation.apply(seed=stable_seed(self.seed, "balance", step))
            if (step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                # Not by ``log``, which would repeat the last weights of datasets that the step does not have.
                values = {f"train/{dataset}/weight": weight for dataset, weight in weights.items()}
                for logger in self.trainer.loggers:
                    logger.log_metrics({**values, "epoch": self.current_epoch}, step=step)
        scaled = upstream.scales_gradients(self.trainer)
        if self.finite.check(self, optimizer, step=step, gradients=not scaled):
            self.balance.update()

    def validation_step(self, batch: list[Batch], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Add batches to the validation metrics."""
        # Of several ranks none may end alone: a preempted one skips the remaining batches, and all end after the loop.
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
        """Predict batches: for each batch and each of its samples the outputs by task."""
        return [self.outputs(part) if part.inputs else [] for part in batch]

    def on_validation_epoch_start(self) -> None:
        """Move the metrics to the device of the outputs."""
        self._move_metrics()

    def on_test_epoch_start(self) -> None:
        """Move the metrics to the device of the outputs."""
        self._move_metrics()

    def on_validation_epoch_end(self) -> None:
        """Compute and log the validation metrics and the score."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Compute and log the test metrics and the score."""
        self._finish("test")

    def stop_requested(self) -> bool:
        """Whether the run is preempted. Of several ranks, all give the same answer, exchanged when the step began."""
        return self._preempted if collectives.is_distributed() else preemption.preemption_flag.received is not None

    def reads_cached_features(self) -> bool:
        """Whether the last training epoch and its validation read nothing but cached features."""
        data = self._data_module()
        splits = ["train"] if self.trainer.limit_val_batches == 0 else ["train", "val"]
        return all(data.frozen.covers(split, data.data_modules) for split in splits)

    def datasets(self) -> list[str]:
        """The keys of the datasets."""
        return sorted({dataset for dataset, _ in self._metrics})

    def resampler(self, split: str, key: tuple[str, str]) -> Resampler:
        """The values of a task's metrics, by (dataset, task), for resamples of the recorded samples of a split."""
        return self._metrics[key].resampler(self.results[split][key])

    def score(self, split: str, dataset: str | None = None) -> float | None:
        """Mean score of the tasks, of the run or of one dataset; None before an evaluation, or if no task has one."""
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

    def _loss_factors(
        self, step: list[Batch], denominators: list[dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """For each batch of a step and each of its tasks the factor on its mean loss, (m_t / m) n / (sum of all n).

        The all-reduce that adds up the denominators also tells each rank whether any of them is preempted.
        """
        preempted = preemption.preemption_flag.received is not None
        totals, preempted_ranks = all_reduce_denominators(
            denominators, tasks=self.model.tasks, preempted=preempted, device=self.device
        )
        if collectives.is_distributed():
            self._preempted = bool(preempted_ranks.item())
        tasks = [self.model.tasks_of(batch.dataset) for batch in step]
        return loss_factors(denominators, totals=totals, tasks=tasks)

    def _make_aggregation(self, optimizer: Optimizer) -> Aggregation | None:
        """The aggregation of gradients, if ``balance`` names one; a ConfigError if no epoch trains the encoder."""
        if self.balance_name not in AGGREGATIONS:
            return None
        shared = shared_parameters(self.model)
        if not {p for group in optimizer.param_groups for p in group["params"]} & {*shared}:
            message = f"{self.balance_name} aggregates gradients on the encoder, which is frozen for the whole run"
            raise ConfigError(Problem(message, key="model.init_args.balance"))
        return Aggregation(self.balance_name, shared)

    def _forward(self, batch: Batch) -> JointOutput:
        context = ModelContext(inputs=batch.inputs, metadatas=batch.metadatas)
        output: JointOutput = self.model(context, batch.targets, features=batch.features)
        return output

    def task_of(self, key: tuple[str, str]) -> Task:
        """The task of (dataset, task)."""
        return self._tasks[key]

    def outputs(self, batch: Batch) -> list[dict[str, Any]]:
        """For each sample of a batch the outputs by task."""
        output: JointOutput = self(ModelContext(inputs=batch.inputs, metadatas=batch.metadatas))
        return list(output.outputs)

    def _evaluation_step(self, split: str, batches: list[Batch]) -> None:
        for batch in batches:
            if batch.inputs:
                self._evaluate(split, batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        """Add a batch to the losses and metrics of a split, and its baselines' outputs to the metrics' floors."""
        output = self._forward(batch)
        denominators = self.model.loss_denominators(batch.dataset, batch.targets)
        self.meters[split].add(batch.dataset, losses=output.losses, counts=denominators, samples=len(batch.inputs))
        outputs = list(output.outputs)
        overlap = self._data_module().sources(split)[batch.dataset].overlap
        places = [crop_place(metadata, overlap=overlap) for metadata in batch.metadatas]
        for task in self.model.tasks_of(batch.dataset):
            targets = [target[task] for target in batch.targets]
            metrics = self._metrics[batch.dataset, task]
            constants = self._baseline_outputs(batch.dataset, task=task, targets=targets)
            metrics.update([out[task] for out in outputs], targets=targets, constants=constants, places=places)

    def _baseline_outputs(self, dataset: str, *, task: str, targets: list[dict[str, Any]]) -> list[Any] | None:
        """For each sample the output that the task's baseline would have; None for a task without one."""
        constant = self.constants.get(dataset, {}).get(task)
        if constant is None:
            return None
        return [baselines.baseline_output(self._tasks[dataset, task], constant, target) for target in targets]

    def _gather_metrics(self, split: str) -> None:
        """Give each rank the metrics of all ranks' samples.

        Raises:
            Preempted: a rank was preempted during a training's validation.
        """
        if not collectives.is_distributed():
            return
        leave = split == "val" and preemption.preemption_flag.received is not None
        states = {key: metrics.state() for key, metrics in self._metrics.items()}
        ranks = collectives.all_gather((leave, states))
        if any(leave for leave, _ in ranks) and upstream.has_trained(self.trainer):
            raise preemption.Preempted("during a validation")
        for key, metrics in self._metrics.items():
            metrics.merge([states[key] for _, states in ranks])

    def _from_rank_zero(self, values: dict[str, float]) -> dict[str, float]:
        """Rank 0's values on all ranks: callbacks (early stopping) decide by them, and have to decide alike."""
        shared: dict[str, float] = self.trainer.strategy.broadcast(values)
        return shared

    def _finish(self, split: str) -> None:
        """Compute the results of an evaluation from the samples of all ranks, and log them."""
        self._gather_metrics(split)
        self.meters[split].reduce_to_rank_zero()
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
        """Compute the result of a task, and warn once where its primary metric has no value.

        A detector's score threshold is chosen in a validation, and that one is used in a test.
        """
        chosen = self.thresholds.get(dataset, {}).get(task)
        result = self._metrics[dataset, task].result(threshold=chosen, tune=split == "val")
        if split == "val" and result.threshold is not None:
            self.thresholds.setdefault(dataset, {})[task] = result.threshold
        if result.primary and result.score is None and (split, dataset, task) not in self._warned:
            self._warned.add((split, dataset, task))
            lack = "no object" if result.n else "no valid label"
            message = f"{dataset}/{task}: {lack} in the {split} split: {result.primary} has no value there"
            if collectives.is_rank_zero():
                sys.stderr.write(f"warning: {message}, and the score leaves it out\n")
        return result
