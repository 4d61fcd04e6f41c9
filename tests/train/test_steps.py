"""An optimiser step over several batches: its loss is the formula's, and it survives a kill."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rslearn.train.model_context import ModelContext

from rslp.errors import ConfigError
from rslp.rundir import RunDir
from rslp.train.build import build
from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run
from tests.train.test_fit import logged, same, start, weights

KINDS = ("classify", "regress", "segment")
WEIGHTS = {"classify": 0.5, "regress": 2.0}


class OneGraph(Callback):
    """Computes each step's gradients a second time: all samples of a dataset at once, the loss as written down."""

    def __init__(self, clip: float | None = None) -> None:
        self.clip = clip
        self.expected: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        model = copy.deepcopy(pl_module.model)
        total = torch.zeros(())
        for dataset, often in Counter(part.dataset for part in batch).items():
            parts = [part for part in batch if part.dataset == dataset]
            inputs, targets, metadatas = (
                [entry for part in parts for entry in part[field]] for field in (1, 2, 3)
            )  # fmt: skip
            losses = model(ModelContext(inputs=inputs, metadatas=metadatas), targets).loss_dict
            total = total + often / len(batch) * sum(losses.values())
        total.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        self.expected = {name: p.grad for name, p in model.named_parameters()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, parameter in pl_module.model.named_parameters():
            expected = self.expected[name]
            if expected is None:
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("data")
    return {kind: (str(write_dataset(folder / kind, kind, train=5)), kind) for kind in KINDS}


@pytest.mark.parametrize(
    ("settings", "rounds", "clip", "steps"),
    [
        # Batches of 3 and 2 windows: 6 in an epoch.
        ({}, 1, None, 6),
        ({"sample_mode": "random"}, 4, None, 2),
        ({"datasets_per_step": 3}, 1, 0.01, 2),
        ({"datasets_per_step": 2}, 2, 0.01, 2),
        ({"steps_per_epoch": 3, "sample_mode": "proportional"}, 2, None, 3),
    ],
)
def test_gradients_are_those_of_the_formula(
    tmp_path: Path, data: dict[str, tuple[str, str]], settings: dict[str, Any], rounds: int, clip: float, steps: int
) -> None:
    config = run_config(data, epochs=1, batch_sizes=3, **settings)
    tasks = [
        config["model"]["init_args"]["task"],
        config["data"]["init_args"]["data_modules"]["segment"]["init_args"]["task"],
    ]
    for task in tasks:
        task["init_args"]["tasks"]["segment"]["init_args"]["zero_is_invalid"] = True
    config["model"]["init_args"]["model"]["init_args"]["loss_weights"] = WEIGHTS
    callback = {"class_path": "tests.train.test_steps.OneGraph", "init_args": {"clip": clip}}
    config["trainer"] |= {"accumulate_grad_batches": rounds, "gradient_clip_val": clip, "callbacks": [callback]}
    run = write_run(tmp_path, config)
    assert fit(run) == 0
    assert read_checkpoint(run.last)["global_step"] == steps


@pytest.fixture(scope="module")
def config(data: dict[str, tuple[str, str]]) -> dict[str, Any]:
    config = run_config(data, epochs=3, dropout=0.2, datasets_per_step=3, batch_sizes=1)
    config["trainer"]["accumulate_grad_batches"] = 2
    return config


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> RunDir:
    return start(tmp_path_factory.mktemp("reference"), config)


@pytest.mark.parametrize("die_at", [3, 5])
def test_a_run_killed_between_steps_of_several_batches_goes_on_exactly(
    tmp_path: Path, config: dict[str, Any], reference: RunDir, die_at: int
) -> None:
    """15 batches an epoch are 5 rounds of three, hence steps of 6, 6 and 3 batches; the encoder thaws in epoch 1."""
    start(tmp_path, config, die_at=die_at)
    run = start(tmp_path, config)
    assert read_checkpoint(run.last)["global_step"] == 9
    assert same(weights(run.last), weights(reference.last))
    # The losses of the epoch that was killed count all its steps, also those before the kill.
    assert training(run) == training(reference)


def training(run: RunDir) -> list[tuple[str, str, str]]:
    return [(row["step"], row["name"], row["value"]) for row in logged(run) if row["name"].startswith("train")]


def test_training_losses_are_logged_by_dataset_and_task(reference: RunDir) -> None:
    names = {name for _, name, _ in training(reference)}
    assert names == {
        "train_loss", "train_classify_cls", "train_segment_cls", "train_regress_regress",
        *(f"train/{kind}/loss" for kind in KINDS), *(f"train/{kind}/{kind}/loss" for kind in KINDS),
        *(f"train/{kind}/samples" for kind in KINDS),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "shortest", "refill_batches": True}, "refill_batches: contradicts stop: shortest"),
        ({"per_dataset_patch_limit": {"clasify": 3}}, "per_dataset_patch_limit: names the dataset 'clasify'"),
        ({"datasets_per_step": 4}, "datasets_per_step: got 4, but there are only 3 datasets"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, data: dict[str, tuple[str, str]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(write_run(tmp_path, run_config(data, **settings)))


def test_limits_and_the_stop_rule_reach_the_mixture(tmp_path: Path, data: dict[str, tuple[str, str]]) -> None:
    settings = {"per_dataset_patch_limit": {"classify": 2, "regress": 3}, "disabled_datasets": ["regress"]}
    cli = build(write_run(tmp_path, run_config(data, stop="shortest", **settings)), training=False)
    assert cli.datamodule.mixture.limits == {"classify": 2}
    assert cli.datamodule.mixture.stop == "shortest"


def test_a_schedule_of_accumulation_is_refused(tmp_path: Path, data: dict[str, tuple[str, str]]) -> None:
    config = run_config(data)
    scheduler = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    config["trainer"]["callbacks"] = [{"class_path": scheduler, "init_args": {"scheduling": {0: 2}}}]
    with pytest.raises(ConfigError, match="GradientAccumulationScheduler"):
        fit(write_run(tmp_path, config))
