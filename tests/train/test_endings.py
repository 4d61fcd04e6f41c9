"""How a training ends before its last step, what is said of it, and what the same command does then."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rslp.rundir import RunDir
from rslp.runtime import preemption
from rslp.train import checkpoints
from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run

HERE = "tests.train.test_endings"
STOPS_AT_ONCE = {
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "val/score", "patience": 1, "min_delta": 10.0, "mode": "max"},
}


class StopAt(Callback):
    """A callback of the user's own that has seen enough."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


class CtrlC(Callback):
    """A person presses Ctrl-C, so many times, in the middle of a step or of a validation."""

    def __init__(self, step: int, times: int = 1, validating: bool = False) -> None:
        self.step, self.times, self.validating = step, times, validating

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.validating:
            self._press()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step and self.validating:
            self._press()

    def _press(self) -> None:
        for _ in range(self.times):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("data")
    return {kind: (str(write_dataset(folder / kind, kind)), kind) for kind in ("classify", "regress")}


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption.preemption_flag, "received", None)


def start(
    folder: Path,
    data: dict[str, tuple[str, str]],
    *callbacks: dict[str, Any],
    frozen: int | None = None,
    **trainer: Any,
) -> tuple[RunDir, int]:
    """Write the config (again) and run: six steps an epoch."""
    config = copy.deepcopy(run_config(data, epochs=4, dropout=0.2))
    config["trainer"] |= {"enable_progress_bar": False, "callbacks": list(callbacks), **trainer}
    if frozen is not None:
        config["trainer"]["callbacks"].append(
            {"class_path": "rslp.train.Freeze", "init_args": {"thaw_at_epoch": frozen}}
        )
    run = RunDir(folder / "projects" / "tests" / "tiny")
    if not run.path.exists():
        write_run(folder, config)
    run.config.write_text(json.dumps(config))
    return run, fit(run)


def own(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"{HERE}.{name}", "init_args": arguments}


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = read_checkpoint(run.last)["state_dict"]
    return found


def same(a: RunDir, b: RunDir) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize(
    ("callbacks", "trainer", "by"),
    [
        ([STOPS_AT_ONCE], {}, "EarlyStopping (Monitored metric val/score did not improve"),
        ([own("StopAt", step=3)], {}, "a callback (StopAt)"),
        ([], {"max_time": {"seconds": 0}, "min_epochs": 1}, "its time limit (max_time)"),
    ],
)
def test_a_run_that_ended_early_is_done_until_what_ended_it_changes(
    tmp_path: Path,
    data: dict[str, tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
    callbacks: list[dict[str, Any]],
    trainer: dict[str, Any],
    by: str,
) -> None:
    run, code = start(tmp_path, data, *callbacks, **trainer)
    before, marker = weights(run), run.done()
    assert code == 0 and marker is not None
    assert f"of 4 epochs, by {by}" in capsys.readouterr().err
    for _ in range(2):
        # More epochs alone would not keep it from ending.
        assert start(tmp_path, data, *callbacks, **{"max_epochs": 5, **trainer})[1] == 0
        said = capsys.readouterr().err
        assert "is done" in said and f"it ended early (of 4 epochs), by {by}" in said and "changed or removed" in said
        assert run.done() == marker and all(torch.equal(before[key], w) for key, w in weights(run).items())
    assert start(tmp_path, data)[1] == 0
    assert "going on from" in (said := capsys.readouterr().err) and "ended early" not in said
    assert (run.done() or {})["epoch"] == 4 and "ended_early" not in (run.done() or {})


def test_more_patience_is_patience_for_a_run_that_ended_early(tmp_path: Path, data: dict[str, tuple[str, str]]) -> None:
    run, _ = start(tmp_path, data, STOPS_AT_ONCE)
    assert (run.done() or {})["epoch"] == 2
    patient = copy.deepcopy(STOPS_AT_ONCE)
    patient["init_args"]["patience"] = 2
    start(tmp_path, data, patient)
    assert (run.done() or {})["epoch"] == 3


@pytest.mark.parametrize("trainer", [{"max_steps": 8}, {"max_steps": 8, "max_epochs": None}])
def test_a_run_out_of_steps_is_done_and_more_steps_go_on_inside_the_epoch(
    tmp_path: Path, data: dict[str, tuple[str, str]], capsys: pytest.CaptureFixture[str], trainer: dict[str, Any]
) -> None:
    run, _ = start(tmp_path / "short", data, **trainer)
    marker = run.done()
    capsys.readouterr()
    start(tmp_path / "short", data, **trainer)
    assert "is done: 1 epoch, 8 steps" in capsys.readouterr().err
    assert run.done() == marker
    start(tmp_path / "short", data, **{**trainer, "max_steps": 15})
    whole, _ = start(tmp_path / "whole", data, **{**trainer, "max_steps": 15})
    assert same(run, whole)


def test_a_callback_that_stops_inside_an_epoch_does_not_cost_its_other_steps(
    tmp_path: Path, data: dict[str, tuple[str, str]]
) -> None:
    run, _ = start(tmp_path / "cut", data, own("StopAt", step=9), min_epochs=1)
    assert read_checkpoint(run.last)["global_step"] == 9
    start(tmp_path / "cut", data)
    whole, _ = start(tmp_path / "whole", data)
    assert same(run, whole)


@pytest.mark.usefixtures("noted")
@pytest.mark.parametrize(
    ("press", "frozen", "says", "step"),
    [
        # In the first epoch; in its last step, after which nothing is saved; in its validation.
        ({"step": 1}, None, "interrupted: the same command goes on from epoch 0, step 2", 2),
        ({"step": 5}, None, "interrupted: the same command starts anew: no step of it was saved yet", None),
        ({"step": 6, "validating": True}, None, "interrupted: the same command starts anew", None),
        ({"step": 6, "validating": True}, 2, "interrupted: the same command starts anew", None),
        # Frozen epochs save nothing; the first one that trains more begins with a checkpoint.
        ({"step": 13}, 2, "interrupted: the same command goes on from epoch 2, step 14", 14),
        ({"step": 17}, 2, "interrupted: the same command goes on from epoch 2, step 12", 12),
        # A second time: at once.
        ({"step": 1, "times": 2}, None, "interrupted: the same command starts anew", None),
        ({"step": 13, "times": 2}, 2, "interrupted: the same command goes on from epoch 2, step 12", 12),
    ],
)
def test_ctrl_c_saves_and_says_from_where_the_run_goes_on(
    tmp_path: Path,
    data: dict[str, tuple[str, str]],
    capfd: pytest.CaptureFixture[str],
    press: dict[str, Any],
    frozen: int | None,
    says: str,
    step: int | None,
) -> None:
    before = signal.getsignal(signal.SIGINT)
    run, code = start(tmp_path / "left", data, own("CtrlC", **press), frozen=frozen)
    signal.signal(signal.SIGINT, before)
    said = capfd.readouterr().err
    assert code == 130 and says in said and "Traceback" not in said
    assert json.loads(run.state.read_text())["state"] == "interrupted"
    assert run.last.exists() == (step is not None)
    assert not list(run.path.rglob("*.tmp"))
    preemption.preemption_flag.received = None
    again, code = start(tmp_path / "left", data, frozen=frozen)
    assert code == 0
    said = capfd.readouterr().err
    assert (f"step {step})" in said) if step else ("going on" not in said)
    if press["step"] in (1, 13):
        assert same(again, start(tmp_path / "whole", data, frozen=frozen)[0])


def test_a_resume_reads_its_checkpoint_once(
    tmp_path: Path, data: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, data, max_epochs=1)
    read: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: read.append(a[0]) or load(*a, **k))
    run, _ = start(tmp_path, data, max_epochs=2)
    assert [stream.name for stream in read] == [str(run.last)]
    assert read_checkpoint(run.last)["epoch"] == 2


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_a_run_have_the_mode_that_the_umask_leaves(
    tmp_path: Path, data: dict[str, tuple[str, str]], mask: int, mode: int
) -> None:
    former = os.umask(mask)
    try:
        run, _ = start(tmp_path, data, max_epochs=2)
    finally:
        os.umask(former)
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"last.ckpt", "best.ckpt", "DONE.json", "state.json", "metrics.csv"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {p.name: oct(mode) for p in files}


@pytest.mark.parametrize("links", [True, False])
def test_best_checkpoints_of_one_validation_are_one_file(
    tmp_path: Path, data: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    run, _ = start(tmp_path, data, max_epochs=1)
    best = [run.best(), *map(run.best, data)]
    content = {path.read_bytes() for path in best}
    assert len(content) == 1
    assert len({path.stat().st_ino for path in best}) == (1 if links else 3)
    # Another validation replaces one of them: the others keep what they hold.
    checkpoints.write_checkpoint({"state_dict": {}}, run.best())
    assert {path.read_bytes() for path in best[1:]} == content
    assert read_checkpoint(run.best())["state_dict"] == {}


def _no_links(*_: Any, **__: Any) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize(
    ("limits", "lines"),
    [
        ({"max_epochs": 2}, ["epoch 1/2", "epoch 2/2"]),
        ({"max_epochs": -1, "max_steps": 12}, ["epoch 1, step 6/12", "epoch 2, step 12/12"]),
        ({"max_epochs": 2, "max_steps": 100}, ["epoch 1/2, step 6/100", "epoch 2/2, step 12/100"]),
    ],
)
def test_each_validation_prints_how_far_the_training_has_come(
    tmp_path: Path,
    data: dict[str, tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
    limits: dict[str, int],
    lines: list[str],
) -> None:
    _, code = start(tmp_path, data, **{"enable_progress_bar": True, **limits})
    shown = [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert code == 0 and shown == lines
