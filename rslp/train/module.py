"""The joint Lightning module: losses, metrics by dataset and task, and the score that selects checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rslearn.train.lightning_module import RestoreConfig, RslearnLightningModule
from rslearn.train.model_context import ModelContext, ModelOutput
from rslearn.train.optimizer import OptimizerFactory
from rslearn.train.scheduler import SchedulerFactory
from rslearn.train.tasks import Task
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rslp.train import adapters, floors, freezing, warmup
from rslp.train.batches import Batch
from rslp.train.data import MultiDatasetDataModule
from rslp.train.finite import FiniteGuard, FinitePolicy, OnNonfinite
from rslp.train.metrics import TaskMetrics, TaskResult
from rslp.train.model import JointModel
from rslp.train.samples import seed_of

FLOORS_KEY = "rslp_floors"
FINITE_KEY = "rslp_nonfinite"
Results = dict[tuple[str, str], TaskResult]


class JointModule(RslearnLightningModule):
    """Trains a ``JointModel`` on the batches of a ``MultiDatasetDataModule``.

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
        self._resting = freezing.Resting()
        self.constants: floors.Constants = {}
        self.results: dict[str, Results] = {}
        self._metrics: dict[tuple[str, str], TaskMetrics] = {}
        self._tasks: dict[tuple[str, str], Task] = {}

    def setup(self, stage: str) -> None:
        """Learn from the data module which dataset has which tasks, and, before training, the floors."""
        data = self._data_module()
        self.model.set_datasets(data.tasks())
        for dataset, module in data.data_modules.items():
            for name, task in floors.tasks_by_name(module.task, dataset).items():
                self._tasks[dataset, name] = task
                self._metrics[dataset, name] = TaskMetrics(task)
        if stage == "fit" and not self.constants:
            data.setup("fit")
            self.constants = floors.learn_constants(data.sources("train"), skip=data.faults.policy.skips)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the floors with the weights: an evaluation needs no training labels."""
        checkpoint[FLOORS_KEY] = self.constants
        checkpoint[FINITE_KEY] = self.finite.state_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the floors of the run that is gone on with."""
        self.constants = checkpoint.get(FLOORS_KEY, {})
        if FINITE_KEY in checkpoint:
            self.finite.load_state_dict(checkpoint[FINITE_KEY])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimizer and scheduler; a plateau scheduler follows 1 - score of the last validation.

        What thaws later is in the optimizer from the start, so that schedulers know its groups.
        """
        stages = freezing.stages_of(self.trainer)
        later = [p for stage in stages if stage.thaw_at_epoch is not None for p in stage.parameters]
        never = {p for stage in stages if stage.thaw_at_epoch is None for p in stage.parameters}
        for parameter in later:
            parameter.requires_grad = parameter not in never
        optimizer = self.optimizer_factory.build(self)
        freezing.apply(self.trainer, epoch=0)
        freezing.split_groups(optimizer, stages)
        warmup.attach(optimizer)
        if self.scheduler_factory is None:
            return {"optimizer": optimizer}  # type: ignore[typeddict-item]
        scheduler = self.schedulers["scheduler"] = self.scheduler_factory.build(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            config |= {"monitor": "val/score_loss", "frequency": self.trainer.check_val_every_n_epoch or 1}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[typeddict-item]

    def on_train_start(self) -> None:
        """Let what is frozen rest, after callbacks have frozen and thawed, also where a run goes on inside an epoch."""
        self._resting.follow(self.model.encoder)

    def on_train_epoch_start(self) -> None:
        """Let what is frozen rest, after callbacks have frozen and thawed for this epoch."""
        self._resting.follow(self.model.encoder)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Seed the step's randomness (dropout, sampled anchors) by its place alone: a resumed run repeats it."""
        torch.manual_seed(seed_of(self.seed, "step", self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:  # noqa: ARG002
        """The batch's loss: the weighted sum of its tasks' losses."""
        output = self._forward(batch)
        self.finite.note(batch, output.loss_dict)
        loss = _total(output.loss_dict, like=next(self.parameters()))
        self._log_losses("train", batch=batch, output=output, loss=loss)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Look whether the step can be taken."""
        scaled = adapters.scales_gradients(self.trainer)
        self.finite.check(self, optimizer, step=self.trainer.global_step, gradients=not scaled)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Add a batch to the validation metrics."""
        self._evaluation_step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Add a batch to the test metrics."""
        self._evaluation_step("test", batch)

    def on_validation_epoch_start(self) -> None:
        """Put the metrics where the outputs will be."""
        self._place_metrics()

    def on_test_epoch_start(self) -> None:
        """Put the metrics where the outputs will be."""
        self._place_metrics()

    def on_validation_epoch_end(self) -> None:
        """Compute and log the validation metrics and the score."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Compute and log the test metrics and the score."""
        self._finish("test")

    def datasets(self) -> list[str]:
        """The keys of the datasets."""
        return sorted({dataset for dataset, _ in self._metrics})

    def score(self, split: str, dataset: str | None = None) -> float | None:
        """Mean normalised score of the tasks, of the run or of one dataset; None before an evaluation."""
        results = self.results.get(split, {})
        scores = [r.score for (d, _), r in results.items() if r.score is not None and dataset in (None, d)]
        return sum(scores) / len(scores) if scores else None

    def _place_metrics(self) -> None:
        for metrics in self._metrics.values():
            metrics.to(self.device)

    def _data_module(self) -> MultiDatasetDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MultiDatasetDataModule):
            raise TypeError(f"JointModule needs a MultiDatasetDataModule, got {type(data).__name__}")
        return data

    def _forward(self, batch: Batch) -> ModelOutput:
        output: ModelOutput = self(ModelContext(inputs=batch.inputs, metadatas=batch.metadatas), batch.targets)
        return output

    def _evaluation_step(self, split: str, batch: Batch) -> None:
        if not batch.inputs:
            return
        output = self._forward(batch)
        loss = _total(output.loss_dict, like=next(self.parameters()))
        self._log_losses(split, batch=batch, output=output, loss=loss)
        outputs = list(output.outputs)
        for task in self._tasks_of(batch.dataset):
            targets = [target[task] for target in batch.targets]
            metrics = self._metrics[batch.dataset, task]
            constants = self._constants(batch.dataset, task=task, targets=targets)
            metrics.update([out[task] for out in outputs], targets=targets, constants=constants)

    def _constants(self, dataset: str, *, task: str, targets: list[dict[str, Any]]) -> list[Any] | None:
        constant = self.constants.get(dataset, {}).get(task)
        if constant is None:
            return None
        kind = self._tasks[dataset, task]
        return [floors.constant_output(kind, constant, target) for target in targets]

    def _tasks_of(self, dataset: str) -> list[str]:
        return [task for d, task in self._metrics if d == dataset]

    def _log_losses(self, split: str, *, batch: Batch, output: ModelOutput, loss: torch.Tensor) -> None:
        size = len(batch.inputs)
        options = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": size}
        self.log(f"{split}_loss", loss, prog_bar=True, **options)  # type: ignore[arg-type]
        self.log(f"{split}/{batch.dataset}/loss", loss, **options)  # type: ignore[arg-type]
        for name, value in output.loss_dict.items():
            self.log(f"{split}_{name}", value, **options)  # type: ignore[arg-type]

    def _finish(self, split: str) -> None:
        results = {key: metrics.result() for key, metrics in self._metrics.items()}
        self.results[split] = results
        logged: dict[str, float] = {}
        for (dataset, task), result in results.items():
            for name, value in result.values.items():
                logged[f"{split}/{dataset}/{task}/{name}"] = value
                logged[f"{split}_{task}/{name}"] = value
        score = self.score(split)
        if score is not None:
            logged[f"{split}/score"] = score
            logged[f"{split}/score_loss"] = 1 - score
        self.log_dict(logged)


def _total(losses: Mapping[str, torch.Tensor], *, like: torch.Tensor) -> torch.Tensor:
    return sum(losses.values(), start=torch.zeros((), device=like.device))
