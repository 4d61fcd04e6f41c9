"""Frozen and thawed parts: evaluation mode, learning rates under every scheduler, several stages, kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rslearn.models.component import FeatureExtractor, FeatureMaps
from rslearn.train.callbacks.freeze_unfreeze import FreezeUnfreeze
from rslearn.train.model_context import ModelContext

from rslp.errors import ConfigError
from rslp.models.optim import Freeze, FrozenInEvalMode
from rslp.rundir import RunDir
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run
from tests.train.test_fit import Killed, logged, same, weights

STOCK = "rslearn.train.callbacks.freeze_unfreeze.FreezeUnfreeze"
SEEN: dict[str, list[Any]] = {}


class Norms(FeatureExtractor):
    """Two blocks with batch norm and dropout, and a constant that no thaw may set in motion."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Conv2d(n, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.Dropout(0.5))
            for n in (2, 8)
        )
        self.pos_embed = torch.nn.Parameter(torch.zeros(8, 1, 1), requires_grad=False)

    def forward(self, context: ModelContext) -> FeatureMaps:
        images = torch.stack([inputs["image"].image[:, 0] for inputs in context.inputs])
        for block in self.blocks:
            images = block(images)
        return FeatureMaps([images + self.pos_embed])


class Watch(Callback):
    """Writes down at each step what trains, in which mode, and how fast."""

    def __init__(self, name: str, die_at: int | None = None) -> None:
        self.name, self.die_at = name, die_at

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.die_at:
            raise Killed
        encoder = pl_module.model.encoder[0]  # type: ignore[union-attr, index]
        rates = {p: group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
        trains = {name: p.requires_grad for name, p in encoder.named_parameters()}
        at = {
            "trains": [all(trains[f"blocks.{i}.{n}.weight"] for n in (0, 1)) for i in range(2)],
            "modes": [[m.training for m in block.modules()] for block in encoder.blocks],
            "means": [block[1].running_mean.clone() for block in encoder.blocks],
            "lr": [rates[encoder.blocks[0][0].weight], rates[encoder.blocks[1][0].weight]],
            "base": rates[next(pl_module.model.decoders.parameters())],  # type: ignore[union-attr]
            "constant": not trains["pos_embed"] and encoder.pos_embed not in rates,
        }
        SEEN.setdefault(self.name, []).append(at)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    path = write_dataset(tmp_path_factory.mktemp("data") / "classify", "classify")
    return {"classify": (str(path), "classify")}


def run_of(
    folder: Path,
    data: dict[str, tuple[str, str]],
    callbacks: list[dict[str, Any]],
    *,
    name: str,
    die_at: int | None = None,
) -> RunDir:
    """A run of four epochs of three steps, cosine over three of them: the fourth is beyond its end."""
    config = run_config(data, epochs=4)
    config["model"]["init_args"]["model"]["init_args"]["encoder"] = [{"class_path": "tests.models.test_freezing.Norms"}]
    config["model"]["init_args"]["optimizer"] = {
        "class_path": "rslp.train.LayerwiseAdamW",
        "init_args": {"lr": 0.01, "encoder_lr_factor": 0.5, "layer_decay": 0.8, "warmup_steps": 4},
    }
    config["model"]["init_args"]["scheduler"] = {
        "class_path": "rslearn.train.scheduler.CosineAnnealingScheduler",
        "init_args": {"T_max": 3},
    }
    run = RunDir(folder / "projects" / "tests" / "tiny")
    watch = {"class_path": "tests.models.test_freezing.Watch", "init_args": {"name": name, "die_at": die_at}}
    saving = {
        "class_path": "rslp.train.checkpoints.RunCheckpoints",
        "init_args": {"run_dir": str(run.path), "every_n_steps": 2},
    }
    monitor = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    config["trainer"] |= {"callbacks": [*callbacks, watch, saving, monitor], "log_every_n_steps": 1}
    if not run.path.exists():
        write_run(folder, config)
    run.config.write_text(json.dumps(config))
    return run


def freeze(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "rslp.train.Freeze", "init_args": arguments}


STAGES = [
    freeze(modules="model.encoder", thaw_at_epoch=1, lr_factor=0.5, warmup_steps=2),
    freeze(modules=["model.encoder.0.blocks.0"], thaw_at_epoch=2, lr_factor=0.1),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, data: dict[str, tuple[str, str]]) -> RunDir:
    run = run_of(tmp_path_factory.mktemp("reference"), data, STAGES, name="reference")
    assert fit(run) == 0
    return run


def test_stages_thaw_in_turn_and_constants_stay(reference: RunDir) -> None:
    by_epoch = [SEEN["reference"][3 * epoch]["trains"] for epoch in range(4)]
    assert by_epoch == [[False, False], [False, True], [True, True], [True, True]]
    assert all(at["constant"] for at in SEEN["reference"])


def test_every_groups_rate_is_logged_under_its_name(reference: RunDir) -> None:
    names = {row["name"].rpartition("/")[2] for row in logged(reference) if row["name"].startswith("lr-AdamW")}
    assert {"decoders", "encoder, layer 1 (model.encoder.0.blocks.0)", "encoder, layer 2 (model.encoder)"} <= names


def test_what_is_frozen_rests_and_what_is_thawed_trains(reference: RunDir) -> None:
    for at in SEEN["reference"]:
        assert [set(modes) for modes in at["modes"]] == [{trains} for trains in at["trains"]]
    means = [at["means"] for at in SEEN["reference"]]
    assert torch.equal(means[0][0], means[5][0])  # also over two validations
    assert torch.equal(means[0][1], means[3][1])
    assert not torch.equal(means[3][1], means[4][1])


def test_every_group_is_annealed_like_the_rest(reference: RunDir) -> None:
    rates = [at["base"] for at in SEEN["reference"]]
    assert rates[0] == pytest.approx(0.01)
    assert rates[9] == pytest.approx(0.0, abs=1e-9)
    for at in SEEN["reference"]:
        assert at["lr"] == pytest.approx([at["base"] * 0.5 * 0.8**2 * 0.1, at["base"] * 0.5 * 0.8 * 0.5])


@pytest.mark.parametrize("die_at", [3, 5, 8])
def test_a_killed_run_thaws_and_warms_up_as_an_uninterrupted_one(
    die_at: int, tmp_path: Path, data: dict[str, tuple[str, str]], reference: RunDir
) -> None:
    with pytest.raises(Killed):
        fit(run_of(tmp_path, data, STAGES, name=f"killed{die_at}", die_at=die_at))
    run = run_of(tmp_path, data, STAGES, name=f"resumed{die_at}")
    assert fit(run) == 0
    assert same(weights(run.last), weights(reference.last))
    modes = [at["modes"] for at in SEEN[f"resumed{die_at}"]]
    assert modes == [at["modes"] for at in SEEN["reference"]][-len(modes) :]


def test_two_of_an_existing_configs_callbacks_are_taken_over(
    tmp_path: Path, data: dict[str, tuple[str, str]], reference: RunDir
) -> None:
    selectors = [(["model", "encoder"], 1, 2.0), (["model", "encoder", 0, "blocks", 0], 2, 10.0)]
    callbacks = [
        {"class_path": STOCK,
         "init_args": {"module_selector": selector, "unfreeze_at_epoch": epoch, "unfreeze_lr_factor": factor}}
        for selector, epoch, factor in selectors
    ]  # fmt: skip
    assert fit(run_of(tmp_path, data, callbacks, name="old")) == 0
    assert [at["lr"] for at in SEEN["old"]] == [at["lr"] for at in SEEN["reference"]]
    assert [at["trains"] for at in SEEN["old"]] == [at["trains"] for at in SEEN["reference"]]


def test_two_of_the_stock_callbacks_collide() -> None:
    callbacks = [FreezeUnfreeze(["model", "encoder"], 1), FreezeUnfreeze(["model", "encoder", 0], 2)]
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `FreezeUnfreeze`"):
        Trainer(callbacks=callbacks, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def test_a_module_that_is_not_there_is_named(tmp_path: Path, data: dict[str, tuple[str, str]]) -> None:
    run = run_of(tmp_path, data, [freeze(modules="model.encodr", thaw_at_epoch=1)], name="absent")
    with pytest.raises(ConfigError, match=r"no module 'model\.encodr'; it has balance, model, model\.decoders, "):
        fit(run)


@pytest.mark.parametrize("settings", [{"thaw_at_epoch": 0}, {"lr_factor": 0.0}, {"warmup_steps": -1}])
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Freeze: {next(iter(settings))} is"):
        Freeze(**settings)


def test_batch_norms_that_train_do_not_keep_a_frozen_part_awake() -> None:
    module = torch.nn.Sequential(Norms(), torch.nn.Linear(2, 2))
    FreezeUnfreeze.freeze(module[0])
    assert any(p.requires_grad for p in module[0].parameters())
    resting = FrozenInEvalMode()
    resting.update(module)
    assert [part.training for part in module.children()] == [False, True]
    assert module.training
    FreezeUnfreeze.make_trainable(module[0])
    resting.update(module)
    assert all(part.training for part in module.modules())
