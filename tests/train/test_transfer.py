"""Batches on their way to where the model is."""

from __future__ import annotations

from pathlib import Path

import torch
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks.classification import ClassificationTask

from rslp.train import MultiDatasetDataModule
from rslp.train.batches import Batch


def test_a_batch_on_the_cpu_is_not_copied_and_moves_elsewhere(tmp_path: Path) -> None:
    task = ClassificationTask(property_name="kind", classes=["a", "b"])
    data = MultiDatasetDataModule({"d": RslearnDataModule(inputs={}, task=task, path=str(tmp_path))}, num_workers=0)
    batch = [Batch("d", [{"image": RasterImage(torch.ones(2, 1, 4, 4))}], [{"d": {"class": torch.tensor(1)}}], [])]
    assert data.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert isinstance(moved[0], Batch)
    assert moved[0].dataset == "d"
    assert moved[0].inputs[0]["image"].image.device.type == "meta"
    assert moved[0].targets[0]["d"]["class"].device.type == "meta"
    assert batch[0].inputs[0]["image"].image.device.type == "cpu"
