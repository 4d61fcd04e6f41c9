"""Joint training end to end, in process, on tiny real datasets."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rslp import upstream
from rslp.errors import CheckpointError, ConfigError, DataError, RunError
from rslp.evaluate.evaluation import evaluate
from rslp.rundir import RunDir, sha256
from rslp.runtime import preemption
from rslp.train.checkpoints import read_checkpoint, read_with_digest
from rslp.train.fit import fit
from tests.tiny import four_datasets, run_config, write_dataset, write_run

DATASET = ("data", "init_args", "data_modules", "classify", "init_args")
STOCK_MODULE = "rslearn.train.lightning_module.RslearnLightningModule"


class DieAt(Callback):
    """Ends the process's training in the middle of a step, as a kill would: nothing of ours may tidy up."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Killed


class Killed(BaseException):
    pass


class SignalAt(Callback):
    """A scheduler announces, in the middle of a step, that it will take the machine."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def with_callbacks(config: dict[str, Any], run: RunDir, *, die_at: int | None = None) -> None:
    callbacks: list[dict[str, Any]] = [
        {
            "class_path": "rslearn.train.callbacks.freeze_unfreeze.FreezeUnfreeze",
            "init_args": {"module_selector": ["model", "encoder", 0], "unfreeze_at_epoch": 1, "unfreeze_lr_factor": 2},
        },
        {
            "class_path": "rslp.train.checkpoints.RunCheckpoints",
            "init_args": {"run_dir": str(run.path), "every_n_steps": 2},
        },
    ]
    if die_at is not None:
        callbacks.append({"class_path": "tests.train.test_fit.DieAt", "init_args": {"step": die_at}})
    config["trainer"]["callbacks"] = callbacks


def start(folder: Path, config: dict[str, Any], *, die_at: int | None = None) -> RunDir:
    """Write the config (again) and train."""
    run = RunDir(folder / "projects" / "tests" / "tiny")
    config = copy.deepcopy(config)
    with_callbacks(config, run, die_at=die_at)
    if not run.path.exists():
        write_run(folder, config)
    run.config.write_text(json.dumps(config))
    if die_at is None:
        assert fit(run) == 0
    else:
        with pytest.raises(Killed):
            fit(run)
    return run


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = read_checkpoint(path)["state_dict"]
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def logged(run: RunDir) -> list[dict[str, str]]:
    with run.metrics.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    return four_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(data: dict[str, tuple[str, str]]) -> dict[str, Any]:
    # Two datasets: detection draws anchors at random, classification goes through the dropout.
    config = run_config({kind: data[kind] for kind in ("classify", "detect")}, epochs=3, dropout=0.2)
    config["model"]["init_args"]["scheduler"] = {
        "class_path": "rslearn.train.scheduler.CosineAnnealingScheduler",
        "init_args": {"T_max": 3},
    }
    return config


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> RunDir:
    return start(tmp_path_factory.mktemp("reference"), config)


def test_a_run_leaves_what_the_contract_names(reference: RunDir) -> None:
    assert {p.name for p in reference.checkpoints.iterdir()} >= {"last.ckpt", "best.ckpt"}
    assert reference.done() is not None
    assert json.loads((reference.path / "state.json").read_text())["state"] == "done"
    names = {row["name"] for row in logged(reference)}
    detect = {f"val/detect/detect/{name}" for name in ("average_precision", "f1_score", "f1_tuned")}
    assert {"val/classify/classify/balanced_accuracy", "val/score", *detect} <= names
    assert {"val_loss", "val_classify/accuracy", "train_loss"} <= names  # what callbacks of old configs monitor


def test_every_validation_sample_is_counted_once(reference: RunDir) -> None:
    evaluation = evaluate(reference, splits=("val", "test"))
    assert [(row.dataset, row.n) for e in evaluation for row in e.rows if row.primary] == [
        (k, 3) for k in ("classify", "detect")
    ] * 2


def test_an_evaluation_is_written_with_its_floor_and_checkpoint(reference: RunDir) -> None:
    evaluate(reference, splits=("val",))
    content = json.loads(reference.evaluation("val").read_text())
    rows = {(row["dataset"], row["metric"]): row for row in content["rows"]}
    assert content["schema"] == 2
    assert content["checkpoint"] == "checkpoints/best.ckpt"
    assert rows["classify", "balanced_accuracy"]["floor"] == 0.5
    assert rows["detect", "average_precision"]["floor"] == 0.0
    keys = {"dataset", "task", "metric", "class", "value", "low", "high", "interval", "n", "n_windows", "valid_share"}
    keys |= {"classes", "floor", "higher_is_better", "primary"}
    assert all(set(row) == keys for row in content["rows"])


def test_each_checkpoint_has_its_own_evaluation_and_the_best_one_a_copy(tmp_path: Path, reference: RunDir) -> None:
    evaluate(reference, splits=("val", "test"))
    best = {split: reference.evaluation(split).read_text() for split in ("val", "test")}
    elsewhere = tmp_path / "mine.ckpt"
    shutil.copyfile(reference.last, elsewhere)
    digest = sha256(elsewhere)
    for path, folder in ((reference.last, "last"), (reference.best("detect"), "best-detect"), (elsewhere, digest[:12])):
        evaluate(reference, splits=("val",), checkpoint=str(path))
        content = json.loads(reference.evaluation("val", folder).read_text())
        assert content["checkpoint_sha256"] == sha256(path)
    assert {split: reference.evaluation(split).read_text() for split in best} == best
    assert {split: reference.evaluation(split, "best").read_text() for split in best} == best
    folders = {path.parent.name for path in reference.evaluations("val")}
    assert folders == {"best", "last", "best-detect", digest[:12]}
    assert len(reference.evaluations("test")) == 1


def test_a_checkpoint_is_read_and_hashed_as_one_file(tmp_path: Path, reference: RunDir) -> None:
    """A training may replace it between the two."""
    path = tmp_path / "best.ckpt"
    shutil.copyfile(reference.last, path)
    content, digest = read_with_digest(RunDir(tmp_path), path)
    assert digest == sha256(path)
    assert same(content["state_dict"], weights(reference.last))
    for broken in (tmp_path / "missing.ckpt", tmp_path):
        with pytest.raises(CheckpointError):
            read_with_digest(RunDir(tmp_path), broken)


def test_each_kind_of_task_has_its_primary_metric_and_floor(tmp_path: Path, data: dict[str, tuple[str, str]]) -> None:
    run = write_run(tmp_path, run_config(data, epochs=1))
    assert fit(run) == 0
    (evaluation,) = evaluate(run, splits=("test",))
    primary = {row.dataset: (row.metric, row.n, row.floor) for row in evaluation.rows if row.primary}
    assert {name: entry[:2] for name, entry in primary.items()} == {
        "classify": ("balanced_accuracy", 3),
        "detect": ("average_precision", 3),
        "regress": ("r2", 3),
        "segment": ("miou", 3),
    }
    floors = {name: entry[2] for name, entry in primary.items()}
    assert floors["classify"] == 0.5
    assert floors["detect"] == 0.0
    assert floors["regress"] is not None and floors["regress"] <= 0.0
    assert floors["segment"] is not None and 0.0 < floors["segment"] < 0.5
    directions = {row.metric: row.higher_is_better for row in evaluation.rows}
    assert directions["mse"] is False
    assert directions["accuracy"] is True


def test_the_logged_score_is_what_the_evaluation_finds(reference: RunDir) -> None:
    best = max(float(row["value"]) for row in logged(reference) if row["name"] == "val/score")
    (evaluation,) = evaluate(reference, splits=("val",))
    assert evaluation.score == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("die_at", [1, 6, 7, 11, 15])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    die_at: int, tmp_path: Path, config: dict[str, Any], reference: RunDir
) -> None:
    run = start(tmp_path, config, die_at=die_at)
    assert run.done() is None
    start(tmp_path, config)
    assert same(weights(run.last), weights(reference.last))
    assert same(weights(run.best()), weights(reference.best()))


@pytest.mark.parametrize(("step", "saved"), [(3, 4), (5, 4), (8, 9)])
def test_a_preempted_run_saves_leaves_with_143_and_goes_on(
    step: int, saved: int, tmp_path: Path, config: dict[str, Any], reference: RunDir
) -> None:
    run = RunDir(tmp_path / "projects" / "tests" / "tiny")
    stopped = copy.deepcopy(config)
    with_callbacks(stopped, run)
    callback = {"class_path": "tests.train.test_fit.SignalAt", "init_args": {"step": step}}
    stopped["trainer"]["callbacks"].append(callback)
    write_run(tmp_path, stopped)
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    preemption.preemption_flag.install()
    try:
        assert fit(run) == 143
    finally:
        preemption.preemption_flag.received = None
        for number, handler in zip(preemption.SIGNALS, before, strict=True):
            signal.signal(number, handler)
    # Step 5 is an epoch's last: the validation after it is left, and repeated from the checkpoint before.
    assert read_checkpoint(run.last)["global_step"] == saved
    assert json.loads((run.path / "state.json").read_text())["state"] == "preempted"
    start(tmp_path, config)
    assert same(weights(run.last), weights(reference.last))


def test_a_resumed_run_logs_each_validation_once(tmp_path: Path, config: dict[str, Any], reference: RunDir) -> None:
    start(tmp_path, config, die_at=8)
    run = start(tmp_path, config)

    def scores(of: RunDir) -> list[tuple[str, str]]:
        return [(row["step"], row["value"]) for row in logged(of) if row["name"] == "val/score"]

    assert scores(run) == scores(reference)


def test_workers_do_not_change_the_weights(tmp_path: Path, config: dict[str, Any], reference: RunDir) -> None:
    config = copy.deepcopy(config)
    config["data"]["init_args"]["num_workers"] = 2
    assert same(weights(start(tmp_path, config).last), weights(reference.last))


def test_another_seed_gives_other_weights(tmp_path: Path, config: dict[str, Any], reference: RunDir) -> None:
    assert not same(weights(start(tmp_path, {**config, "seed": 1}).last), weights(reference.last))


def test_a_finished_run_says_so_and_more_epochs_go_on(
    tmp_path: Path, data: dict[str, tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"classify": data["classify"], "regress": data["regress"]}
    run = write_run(tmp_path, run_config(data, epochs=1))
    assert fit(run) == 0
    before = weights(run.last)
    assert fit(run) == 0
    assert "is done: 1 epoch, 6 steps" in capsys.readouterr().err
    assert same(weights(run.last), before)
    run.config.write_text(json.dumps(run_config(data, epochs=2)))
    assert fit(run) == 0
    assert read_checkpoint(run.last)["global_step"] == 12
    assert "going on from" in capsys.readouterr().err


def test_a_torn_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, config: dict[str, Any], reference: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path, config, die_at=11)
    run.last.write_bytes(run.last.read_bytes()[:-1000])
    start(tmp_path, config)
    assert "can't be read as a checkpoint" in capsys.readouterr().err
    assert same(weights(run.last), weights(reference.last))


def test_without_a_readable_checkpoint_nothing_is_trained_anew(tmp_path: Path, config: dict[str, Any]) -> None:
    run = start(tmp_path, config, die_at=5)
    for path in run.checkpoints.glob("*.ckpt"):
        path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be resumed from; remove them .*last\.ckpt"):
        fit(run)


def test_a_second_trainer_is_refused(reference: RunDir) -> None:
    with reference.locked(), pytest.raises(RunError, match=r"process .* is already training"):
        fit(reference)


def test_an_unreadable_sample_stops_the_run_and_is_named(tmp_path: Path) -> None:
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        path = write_dataset(folder / "data", "classify")
        for tif in path.glob("windows/default/w00[0-5]/layers/image/*/*.tif"):
            tif.write_bytes(b"this is no GeoTIFF")
        run = write_run(folder, run_config({"crops": (str(path), "classify")}, num_workers=workers))
        with pytest.raises(DataError, match=r"^crops/default/w00\d/\d+_0_\d+_8: layer image: can't read") as caught:
            fit(run)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((*DATASET, "path"), "/nowhere/at/all", "'classify': /nowhere/at/all does not exist"),
        ((*DATASET, "train_config", "tags", "split"), "trian", "no windows for split 'train'"),
        (("data", "init_args", "batch_sizes"), {"clasify": 3}, "names the dataset 'clasify'"),
        (("data", "init_args", "sample_mode"), "weights", "weights"),
        (("model", "init_args", "model", "init_args", "loss_weights"), {"nothing": 1.0}, "names the task 'nothing'"),
        (("trainer", "max_epoch"), 3, "max_epoch"),
        (("trainer", "devices"), 2, "2 processes asked for"),
        (("model", "init_args", "optimizer", "class_path"), "rslearn.train.optimizer.AdamX", "AdamX"),
        (("model", "class_path"), STOCK_MODULE, "use rslp.train.JointModule"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_one_clear_error(
    tmp_path: Path, data: dict[str, tuple[str, str]], place: tuple[str, ...], value: Any, message: str
) -> None:
    config = run_config({"classify": data["classify"]})
    at: Any = config
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    run = write_run(tmp_path, config)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        fit(run)
    assert len(str(caught.value)) < 400
    assert not run.checkpoints.exists()


def test_a_checkpoint_of_another_model_lists_what_does_not_fit(
    tmp_path: Path, data: dict[str, tuple[str, str]], reference: RunDir
) -> None:
    run = write_run(tmp_path, run_config({"classify": data["classify"]}))
    with pytest.raises(CheckpointError, match=r"does not fit the model.*decoders\.detect"):
        evaluate(run, splits=("val",), checkpoint=str(reference.best()))


def test_evaluating_an_untrained_run_names_the_folder(tmp_path: Path, data: dict[str, tuple[str, str]]) -> None:
    run = write_run(tmp_path, run_config(data))
    with pytest.raises(RunError, match=rf"no checkpoint best\.ckpt in {run.checkpoints}"):
        evaluate(run, splits=("val",))


def test_training_crops_are_drawn_anew_and_repeatably(tmp_path: Path) -> None:
    from rslp.train.build import build

    path = write_dataset(tmp_path / "data", "classify", size=16)
    config = run_config({"crops": (str(path), "classify")})
    config["data"]["init_args"]["data_modules"]["crops"]["init_args"]["train_config"]["crop_size"] = 8
    source = build(write_run(tmp_path, config), training=False).datamodule.sources("train")["crops"]
    bounds = [source.sample(0, draw=draw)[2].crop_bounds for draw in range(8)]
    assert len(set(bounds)) > 1
    assert bounds == [source.sample(0, draw=draw)[2].crop_bounds for draw in range(8)]
    a, b = source.sample(0, draw=3)[0]["image"].image, source.sample(0, draw=3)[0]["image"].image
    assert torch.equal(a, b)
    assert a.shape == (2, 1, 8, 8)


def test_all_crops_of_a_window_are_samples_of_their_own(tmp_path: Path) -> None:
    from rslp.train.build import build

    path = write_dataset(tmp_path / "data", "segment", size=20)
    config = run_config({"fields": (str(path), "segment")})
    module = config["data"]["init_args"]["data_modules"]["fields"]["init_args"]
    module["val_config"] |= {"crop_size": 8, "load_all_crops": True}
    source = build(write_run(tmp_path, config), training=False).datamodule.sources("val")["fields"]
    assert len(source) == 3 * 9
    covered = {
        (x, y)
        for i in range(9)
        for x0, y0, x1, y1 in [source.sample(i)[2].crop_bounds]
        for x in range(x0, x1)
        for y in range(y0, y1)
    }
    assert len(covered) == 20 * 20


def test_upstream_reads_lightning_where_we_think(reference: RunDir) -> None:
    checkpoint = read_checkpoint(reference.last)
    loop = checkpoint["loops"]["fit_loop"]
    assert set(loop["epoch_progress"]["current"].values()) == {3}
    assert set(loop["epoch_loop.batch_progress"]["current"].values()) == {0}
    assert upstream.as_epoch_start(checkpoint, 3)["epoch"] == 3
