"""What the score decides: which weights are kept, for the run and each dataset, and when the learning rate falls."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rslp.errors import ConfigError
from rslp.models.optim import forgive_ties
from rslp.rundir import RunDir
from rslp.train.checkpoints import RunCheckpoints, read_checkpoint
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run
from tests.train.test_fit import Killed, same, weights

EPOCHS = {"max_epochs": 8}
STEPS = {"max_steps": 8 * 6}
PLATEAU = {"factor": 0.5, "patience": 0}


class Watch(Callback):
    """Writes down what each epoch began with and what its validation found."""

    def __init__(self, path: str, die_in: int | None = None, die_after: int | None = None) -> None:
        self.path, self.die_in, self.die_after = Path(path), die_in, die_after

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.die_in:
            raise Killed
        self._write(lr=trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.die_after:
            raise Killed

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scores = {name: pl_module.score("val", name) for name in (None, *pl_module.datasets())}  # type: ignore[operator]
        losses = {"": "val_loss", **{d: f"val/{d}/loss" for d in pl_module.datasets()}}  # type: ignore[operator]
        loss = {name: float(trainer.callback_metrics[key]) for name, key in losses.items()}
        self._write(scores={name or "": score for name, score in scores.items()}, loss=loss, step=trainer.global_step)

    def _write(self, **what: Any) -> None:
        with self.path.open("a") as handle:
            handle.write(json.dumps(what) + "\n")


def trained(
    folder: Path,
    data: dict[str, tuple[str, str]],
    *,
    die: dict[str, int] | None = None,
    limits: dict[str, int] = EPOCHS,
) -> RunDir:
    """Train on classification and regression with a plateau scheduler, 6 steps an epoch.

    Args:
        folder: what the run lies in.
        data: the datasets.
        die: the argument of ``Watch`` that says when training is killed; a checkpoint comes each 4 steps.
        limits: the trainer's limits.
    """
    config = run_config(data, dropout=0.2)
    config["trainer"] |= {"max_epochs": None, **limits}
    module = config["model"]["init_args"]
    module["optimizer"]["init_args"]["lr"] = 0.1
    module["scheduler"] = {"class_path": "rslearn.train.scheduler.PlateauScheduler", "init_args": PLATEAU}
    run = RunDir(folder / "projects" / "tests" / "tiny")
    checkpoints = {"run_dir": str(run.path), "every_n_steps": 4}
    config["trainer"]["callbacks"] = [
        {"class_path": "tests.train.test_selection.Watch", "init_args": {"path": str(folder / "seen"), **(die or {})}},
        {"class_path": "rslp.train.checkpoints.RunCheckpoints", "init_args": checkpoints},
    ]
    if not run.path.exists():
        write_run(folder, config)
    run.config.write_text(json.dumps(config))
    if die is None:
        assert fit(run) == 0
    else:
        with pytest.raises(Killed):
            fit(run)
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("data")
    return {kind: (str(write_dataset(folder / kind, kind, val=6)), kind) for kind in ("classify", "regress")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: dict[str, tuple[str, str]]) -> RunDir:
    return trained(tmp_path_factory.mktemp("run"), data)


def seen(run: RunDir) -> tuple[list[float], list[dict[str, Any]]]:
    """The learning rate of each epoch, and what its validation found."""
    lines = [json.loads(line) for line in (run.path.parents[2] / "seen").read_text().splitlines()]
    return [line["lr"] for line in lines if "lr" in line], [line for line in lines if "loss" in line]


def test_the_best_weights_are_those_of_the_best_score(run: RunDir) -> None:
    _, found = seen(run)
    best = {}
    for name in ("", "classify", "regress"):
        best[name] = max(found, key=lambda epoch: (epoch["scores"][name], -epoch["loss"][name]))["step"]
        assert read_checkpoint(run.best(name or None))["global_step"] == best[name]
    # A dataset's own best is not that of the run, and the last weights are none of them.
    assert len({*best.values(), found[-1]["step"]}) > 2


def rates(found: list[tuple[float, float]]) -> list[float]:
    """The learning rate of each epoch for the value and loss of each validation, and a patience of 0."""
    lr, best, said = 0.1, (math.inf, math.inf), []
    for value, loss in found:
        said.append(lr)
        if value < best[0] * (1 - 1e-4) or (value == best[0] and loss < best[1] * (1 - 1e-4)):
            best = (value, loss)
        else:
            lr *= 0.5
    return said


def test_a_plateau_of_the_score_lets_the_rate_fall_and_equal_scores_are_told_apart_by_the_loss(run: RunDir) -> None:
    lrs, found = seen(run)
    assert lrs == pytest.approx(rates([(1 - epoch["scores"][""], epoch["loss"][""]) for epoch in found]))
    assert lrs != pytest.approx(rates([(epoch["loss"][""], 0.0) for epoch in found]))


@given(st.lists(st.tuples(st.sampled_from([1.0, 0.5, 0.25]), st.sampled_from([3.0, 2.0, 1.0, 0.5])), max_size=12))
def test_the_rate_falls_unless_score_or_at_equal_scores_the_loss_is_better(found: list[tuple[float, float]]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, **PLATEAU)  # type: ignore[arg-type]
    lrs = []
    for value, loss in found:
        lrs.append(optimizer.param_groups[0]["lr"])
        again = ReduceLROnPlateau(optimizer, **PLATEAU)  # type: ignore[arg-type]
        again.load_state_dict(scheduler.state_dict())
        scheduler = again
        forgive_ties(scheduler, value, loss=loss)
        scheduler.step(value)
    assert lrs == pytest.approx(rates(found))


@pytest.mark.parametrize("limits", [EPOCHS, STEPS], ids=["epochs", "steps"])
@pytest.mark.parametrize("die", [{"die_in": 5}, {"die_after": 33}, {"die_after": 35}], ids=str)
def test_a_run_that_was_killed_chooses_and_anneals_alike(
    run: RunDir, data: dict[str, tuple[str, str]], tmp_path: Path, die: dict[str, int], limits: dict[str, int]
) -> None:
    trained(tmp_path, data, die=die, limits=limits)
    killed = trained(tmp_path, data, limits=limits)
    assert seen(killed)[0] == seen(run)[0]
    # Also where a lost step of the scheduler is of no consequence yet.
    assert read_checkpoint(killed.last)["lr_schedulers"] == read_checkpoint(run.last)["lr_schedulers"]
    for path in (run.last, *run.checkpoints.glob("best*.ckpt")):
        assert same(weights(path), weights(killed.checkpoints / path.name))


def test_checkpoints_come_every_so_many_steps_and_no_fewer_than_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every_n_steps is 0; 1 or more"):
        RunCheckpoints(str(tmp_path), every_n_steps=0)
