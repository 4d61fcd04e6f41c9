"""Trackers of experiments: TensorBoard, Weights & Biases and MLflow get the values that ``metrics.csv`` gets.

An evaluation sends them figures of its errors. All have the same names of metrics, and a resumed run goes on in the
same run of the tracker. Each is an extra.
"""

from __future__ import annotations

import os
import re
import time
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from rslp.rundir import RunDir

# What MLflow does not take in the name of a metric.
_REFUSED = re.compile(r"[^\w\-./: ]")
# The tag of an MLflow run with the id of our run.
_TAG = "rslp_run"


class Tracker(Logger):
    """A tracker of one run.

    Args:
        run_dir: the run directory.
    """

    def __init__(self, run_dir: str) -> None:
        super().__init__()
        self.run = RunDir(Path(run_dir))
        self._resumed_at = 0

    @property
    def name(self) -> str:
        """The project."""
        return self.run.project

    @property
    def version(self) -> str:
        """The id of the run, which a resumed run still has."""
        return str(self.run.read_state().get("run_id") or "")

    def rewind(self, step: int) -> None:
        """Note the step from which a resumed run goes on; values of later steps are logged again."""
        self._resumed_at = step

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values by name.

        Args:
            metrics: values by name; Lightning adds ``epoch``.
            step: number of optimiser steps so far.
        """
        self.write({_REFUSED.sub("_", name): float(value) for name, value in metrics.items()}, step or 0)

    @abstractmethod
    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name."""

    @abstractmethod
    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture."""


class TensorBoard(Tracker):
    """Event files in ``tensorboard/`` of the run directory."""

    _writer: Any = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            folder, resumed = str(self.run.path / "tensorboard"), self._resumed_at
            self._writer = SummaryWriter(folder, purge_step=resumed or None)
        return self._writer

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name."""
        for name, value in values.items():
            self._open().add_scalar(name, value, step)
        self._open().flush()

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture."""
        self._open().add_image(name, np.asarray(picture), step, dataformats="HWC")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the files."""
        del status
        if self._writer is not None:
            self._writer.close()


class Wandb(Tracker):
    """A run of Weights & Biases, under the id of our run; its variables (``WANDB_MODE``, …) say where."""

    _wandb_run: Any = None

    def _open(self) -> Any:
        if self._wandb_run is None:
            import wandb

            folder = os.environ.get("WANDB_DIR") or str(self.run.path)
            self._wandb_run = wandb.init(
                project=self.run.project, name=self.run.experiment, id=self.version, resume="allow", dir=folder
            )
            self._wandb_run.define_metric("*", step_metric="trainer/global_step")
        return self._wandb_run

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name; the step is the value ``trainer/global_step``, since W&B's own may not go back."""
        self._open().log({**values, "trainer/global_step": step})

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture."""
        import wandb

        self._open().log({name: wandb.Image(picture), "trainer/global_step": step})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is left."""
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code=0 if status == "success" else 1)


class MLflow(Tracker):
    """A run of MLflow, found again by a tag with the id of our run; ``MLFLOW_TRACKING_URI`` says where."""

    _client: Any = None
    _mlflow_run: str = ""

    def _open(self) -> Any:
        from mlflow import MlflowClient

        if self._client is None:
            self._client = MlflowClient()
            self._mlflow_run = self._find() or self._create()
            self._client.update_run(self._mlflow_run, status="RUNNING")
        return self._client

    def show(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture, as a file of the run."""
        self._open().log_image(self._mlflow_run, picture, artifact_file=f"{_REFUSED.sub('_', name)}-step-{step}.png")

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name."""
        from mlflow.entities import Metric

        client = self._open()
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        client.log_batch(self._mlflow_run, metrics=metrics)

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.run.project)
        return str(found.experiment_id if found else self._client.create_experiment(self.run.project))

    def _find(self) -> str | None:
        runs = self._client.search_runs([self._experiment()], filter_string=f"tags.{_TAG} = '{self.version}'")
        return str(runs[0].info.run_id) if runs else None

    def _create(self) -> str:
        tags = {_TAG: self.version}
        return str(self._client.create_run(self._experiment(), run_name=self.run.experiment, tags=tags).info.run_id)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Mark the run as ended."""
        if self._client is not None:
            self._client.set_terminated(self._mlflow_run, status="FINISHED" if status == "success" else "FAILED")


CLASSES: Mapping[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
