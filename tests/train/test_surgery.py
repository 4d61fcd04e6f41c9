"""Gradient surgery: what works against earlier batches of a step is taken out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from rslp.train.callbacks import MiniPCGrad
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run
from tests.train.test_fit import logged


class Two(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.shared = torch.nn.Parameter(torch.zeros(2))
        self.head = torch.nn.Parameter(torch.zeros(2))


def step(callback: MiniPCGrad, *gradients: tuple[float, float]) -> Two:
    module, trainer = Two(), Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    callback.on_train_batch_start(trainer, module, batch=None, batch_idx=0)
    for gradient in gradients:
        for parameter in module.parameters():
            new = torch.tensor(gradient)
            parameter.grad = new if parameter.grad is None else parameter.grad + new
        callback.on_after_backward(trainer, module)
    return module


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1.0, 0.0), (-1.0, 1.0), (1.0, 1.0)),  # the part against the first is gone
        ((1.0, 0.0), (0.5, 1.0), (1.5, 1.0)),  # no conflict: a plain sum
        ((0.0, 0.0), (-1.0, 1.0), (-1.0, 1.0)),  # nothing before
        ((2.0, 0.0), (-3.0, 0.0), (2.0, 0.0)),
    ],
)
def test_a_conflict_is_projected_away(
    first: tuple[float, float], second: tuple[float, float], expected: tuple[float, float]
) -> None:
    module = step(MiniPCGrad(["shared", "head"], deselectors=["head"]), first, second)
    assert module.shared.grad is not None and module.head.grad is not None
    torch.testing.assert_close(module.shared.grad, torch.tensor(expected))
    torch.testing.assert_close(module.head.grad, torch.tensor(first) + torch.tensor(second))


def test_watching_changes_nothing() -> None:
    module = step(MiniPCGrad(["shared"], only_monitor=True), (1.0, 0.0), (-1.0, 1.0))
    assert module.shared.grad is not None
    assert module.shared.grad.tolist() == [0.0, 1.0]


def test_it_acts_within_the_steps_of_a_run(tmp_path: Path) -> None:
    data = {kind: (str(write_dataset(tmp_path / kind, kind, train=4, val=1)), kind) for kind in ("classify", "regress")}
    config: dict[str, Any] = run_config(data, epochs=1, datasets_per_step=2)
    init_args = {"selectors": ["encoder"], "only_monitor": False}
    config["trainer"]["callbacks"] = [{"class_path": "rslp.train.surgery.MiniPCGrad", "init_args": init_args}]
    config["trainer"]["log_every_n_steps"] = 1
    run = write_run(tmp_path, config)
    assert fit(run) == 0
    cosines = [float(row["value"]) for row in logged(run) if row["name"] == "train/gradient_cosine"]
    assert len(cosines) == 2
    assert all(-1.001 <= value <= 1.001 for value in cosines)
