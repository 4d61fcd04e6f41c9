"""A run whose frozen encoder's features are kept is the run that encodes each time, without its cost."""

from __future__ import annotations

import copy
import json
import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rslp.errors import PREEMPTED
from rslp.evaluate.evaluation import evaluate
from rslp.rundir import RunDir
from rslp.runtime import preemption
from rslp.train import checkpoints
from rslp.train.checkpoints import read_checkpoint, write_checkpoint
from rslp.train.fit import fit
from rslp.train.module import JointModule
from tests.tiny import TinyEncoder, run_config, write_dataset, write_run
from tests.train.ranks import train_on

Config = dict[str, Any]
FLIP = {
    "class_path": "rslearn.train.transforms.flip.Flip",
    "init_args": {"image_selectors": ["image"], "box_selectors": []},
}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, tuple[str, str]]:
    kinds = ("classify", "segment", "regress")
    return {k: (str(write_dataset(tmp_path / "data" / k, k, train=5, val=3, test=2)), k) for k in kinds}


def config_of(data: dict[str, tuple[str, str]], *, thaw: int | None = 3, epochs: int = 4, **settings: Any) -> Config:
    """A run with a frozen encoder that thaws; one dataset has random crops and flips."""
    config = run_config(data, epochs=epochs, dropout=0.3, **settings)
    config["trainer"]["enable_progress_bar"] = False
    init_args = {} if thaw is None else {"thaw_at_epoch": thaw}
    config["trainer"]["callbacks"] = [{"class_path": "rslp.train.Freeze", "init_args": init_args}]
    if "classify" in data:
        split = config["data"]["init_args"]["data_modules"]["classify"]["init_args"]["train_config"]
        split |= {"crop_size": 6, "transforms": [FLIP]}
    return config


def result(run: RunDir) -> tuple[str, dict[str, torch.Tensor]]:
    weights = read_checkpoint(run.last)["state_dict"]
    return run.metrics.read_text(), {n: v for n, v in weights.items() if isinstance(v, torch.Tensor)}


def assert_same(a: RunDir, b: RunDir) -> None:
    (logged_a, weights_a), (logged_b, weights_b) = result(a), result(b)
    assert logged_a == logged_b
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


def assert_close(a: RunDir, b: RunDir) -> None:
    """The same but for rounding: a sample's features depend in their last bits on the batch that it is encoded in."""
    (logged_a, weights_a), (logged_b, weights_b) = result(a), result(b)
    assert all(torch.allclose(weights_a[name], weights_b[name], rtol=1e-4, atol=1e-6) for name in weights_a)
    values = [[line.rpartition(",") for line in text.splitlines()[1:]] for text in (logged_a, logged_b)]
    assert [name for name, _, _ in values[0]] == [name for name, _, _ in values[1]]
    numbers = [torch.tensor([float(value) for _, _, value in lines]) for lines in values]
    assert torch.allclose(*numbers, rtol=1e-4, atol=1e-5, equal_nan=True)


def trained(folder: Path, config: Config) -> RunDir:
    run = write_run(folder, copy.deepcopy(config))
    assert fit(run) == 0
    return run


def folders(data: dict[str, tuple[str, str]]) -> list[Path]:
    return [folder for path, _ in data.values() for folder in Path(path).glob(".rslp-store/features/*")]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each call of the encoder was given."""
    calls: list[int] = []
    forward = TinyEncoder.forward

    def counted(self: TinyEncoder, context: Any) -> Any:
        calls.append(len(context.inputs))
        return forward(self, context)

    monkeypatch.setattr(TinyEncoder, "forward", counted)
    return calls


@pytest.mark.parametrize("views", [1, pytest.param(2, marks=pytest.mark.slow), None])
def test_it_is_the_same_run(data: dict[str, tuple[str, str]], tmp_path: Path, views: int | None) -> None:
    kept = trained(tmp_path / "kept", config_of(data, frozen_views=views))
    assert_close(kept, trained(tmp_path / "off", config_of(data, frozen_views=views, features="off")))
    assert_same(kept, trained(tmp_path / "workers", config_of(data, frozen_views=views, num_workers=2)))


def test_each_sample_is_encoded_once_and_no_input_is_read_after_that(
    data: dict[str, tuple[str, str]], tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", config_of(data, thaw=None, epochs=1, frozen_views=1))
    # One epoch alone would not pay.
    run.config.write_text(run.config.read_text().replace("max_epochs: 1", "max_epochs: 2"))
    assert fit(run) == 0
    assert sum(encoded) == 3 * (5 + 3)
    encoded.clear()
    monkeypatch.setattr("rslp.data.samples.SampleSource.sample", None)
    # Another run with other heads and the same encoder, which was saved untrained, finds everything.
    other = write_run(tmp_path / "other", config_of(data, thaw=None, epochs=3, frozen_views=1))
    other.config.write_text(other.config.read_text().replace("lr: 0.01", "lr: 0.02"))
    assert fit(other) == 0
    assert not encoded


def test_a_run_that_draws_each_view_once_encodes_as_it_goes(
    data: dict[str, tuple[str, str]], tmp_path: Path, encoded: list[int]
) -> None:
    trained(tmp_path / "run", config_of({"classify": data["classify"]}, thaw=2, epochs=2, frozen_views=2))
    # Ten draws of ten views in training; the validation's three samples, the same each time, are encoded once.
    assert sum(encoded) == 10 + 3


def test_the_features_go_when_the_encoder_thaws(data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", config_of(data, thaw=2, epochs=2, frozen_views=1))
    assert fit(run) == 0
    assert len(folders(data)) == 6
    run.config.write_text(run.config.read_text().replace("max_epochs: 2", "max_epochs: 3"))
    assert fit(run) == 0
    # What a process that was stopped before the thaw has left is taken by the next run that thaws, or needs the room.
    trained(tmp_path / "next", config_of(data, thaw=2, epochs=3, frozen_views=1))
    assert not folders(data)


def test_a_module_that_thaws_before_the_others_trains(data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    one = {"segment": data["segment"]}
    config = config_of(one, epochs=4, frozen_views=1)
    refining = {"in_channels": 8, "out_channels": 8, "kernel_size": 1}
    encoder = config["model"]["init_args"]["model"]["init_args"]["encoder"]
    encoder.append({"class_path": "rslearn.models.conv.Conv", "init_args": refining})
    config["trainer"]["callbacks"] = [
        {"class_path": "rslp.train.Freeze", "init_args": {"modules": "model.encoder.0"}},
        {"class_path": "rslp.train.Freeze", "init_args": {"modules": "model.encoder.1", "thaw_at_epoch": 2}},
    ]
    cached = trained(tmp_path / "cached", config)
    assert_close(cached, trained(tmp_path / "off", config | {"data": _without_features(config)}))
    # The features of both modules, which are of no more use, are deleted; those of the first stay.
    assert len(folders(one)) == 2


def test_short_epochs_of_kept_features_share_a_checkpoint(
    data: dict[str, tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(
        checkpoints, "write_checkpoint", lambda content, path: (written.append(content["epoch"]), write(content, path))
    )
    write = write_checkpoint
    config = config_of(data, thaw=None, epochs=5, frozen_views=1)
    config["trainer"]["limit_val_batches"] = 0
    whole = trained(tmp_path / "whole", config)
    assert written == [5]
    # Killed in its fourth epoch, it repeats what lies behind no checkpoint, to the same weights.
    run = write_run(tmp_path / "killed", copy.deepcopy(config))
    step = JointModule.training_step

    def killed(module: JointModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if module.current_epoch == 3 and batch_idx == 1:
            raise RuntimeError("killed")
        return step(module, batch, batch_idx)

    monkeypatch.setattr(JointModule, "training_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(run)
    assert not run.last.exists()
    monkeypatch.setattr(JointModule, "training_step", step)
    assert fit(run) == 0
    assert_same(run, whole)
    # Encoding anew takes longer than writing.
    written.clear()
    trained(tmp_path / "off", config | {"data": _without_features(config)})
    assert written == [1, 2, 3, 4, 5]


def _without_features(config: Config) -> Config:
    data = copy.deepcopy(config["data"])
    data["init_args"]["features"] = "off"
    return dict(data)


def test_an_encoder_that_stays_frozen_serves_evaluations_too(
    data: dict[str, tuple[str, str]], tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Samples that are shown are read and predicted once more.
    monkeypatch.setattr(sys.modules["rslp.evaluate.evaluation"], "write_samples", lambda *_: None)
    run = trained(tmp_path / "run", config_of(data, thaw=None, epochs=2, frozen_views=1))
    encoded.clear()
    evaluate(run, splits=("val", "test"))
    first = {split: json.loads(run.evaluation(split).read_text())["rows"] for split in ("val", "test")}
    assert sum(encoded) == 3 * 2  # the test split, for the first time
    evaluate(run, splits=("val", "test"))
    assert sum(encoded) == 3 * 2
    for path in folders(data):
        (path / "in-use").unlink()
        for part in path.rglob("*.*"):
            part.unlink()
    evaluate(run, splits=("val", "test"))
    assert first == {split: json.loads(run.evaluation(split).read_text())["rows"] for split in ("val", "test")}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c | {"seed": 5},
        lambda c: _split(c, "train_config", {"crop_size": 4}),
        lambda c: _split(c, "train_config", {"transforms": []}),
        lambda c: _encoder(c, {"dropout": 0.1}),
        lambda c: c | {"trainer": c["trainer"] | {"precision": "bf16-mixed"}},
    ],
    ids=["seed", "crop", "transforms", "encoder", "precision"],
)
def test_what_the_config_changes_is_encoded_anew(
    data: dict[str, tuple[str, str]], tmp_path: Path, encoded: list[int], change: Callable[[Config], Config]
) -> None:
    one = {"classify": data["classify"]}
    config = config_of(one, thaw=None, epochs=2, frozen_views=1) | {"seed": 1}
    trained(tmp_path / "before", config)
    encoded.clear()
    trained(tmp_path / "same", config)
    assert not encoded
    trained(tmp_path / "changed", change(copy.deepcopy(config)))
    assert sum(encoded) >= 5


def _split(config: Config, name: str, settings: dict[str, Any]) -> Config:
    config["data"]["init_args"]["data_modules"]["classify"]["init_args"][name] |= settings
    return config


def _encoder(config: Config, settings: dict[str, Any]) -> Config:
    config["model"]["init_args"]["model"]["init_args"]["encoder"][0]["init_args"] |= settings
    return config


def test_other_weights_of_the_encoder_are_another_encoder(
    data: dict[str, tuple[str, str]], tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of({"classify": data["classify"]}, thaw=None, epochs=2, frozen_views=1)
    trained(tmp_path / "before", config)
    encoded.clear()
    made = TinyEncoder.__init__

    def other(self: TinyEncoder, dropout: float = 0.0) -> None:
        made(self, dropout)
        with torch.no_grad():
            self.layers[2].bias[0] += 1e-6

    monkeypatch.setattr(TinyEncoder, "__init__", other)
    trained(tmp_path / "after", config)
    assert sum(encoded) == 5 + 3


def test_no_room_is_told_and_the_run_is_the_same(
    data: dict[str, tuple[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = trained(tmp_path / "small", config_of(data, frozen_views=1, features_limit_gb=1e-6))
    assert "features of the frozen encoder are not cached: there is no room for them" in caplog.text
    assert_close(small, trained(tmp_path / "off", config_of(data, frozen_views=1, features="off")))


def test_a_full_disk_is_told_and_the_run_is_the_same(
    data: dict[str, tuple[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"segment": data["segment"]}
    off = trained(tmp_path / "off", config_of(one, frozen_views=1, features="off"))
    run = write_run(tmp_path / "full", config_of(one, frozen_views=1))
    from rslp.data.features.encoding import Encoding

    cache = Encoding._cache

    def with_a_small_disk(self: Encoding, *args: Any, **words: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # The kernel refuses to make a file larger than this: the same way a full disk shows, on one file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
        try:
            cache(self, *args, **words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    monkeypatch.setattr(Encoding, "_cache", with_a_small_disk)
    assert fit(run) == 0
    assert "are not cached: [Errno 27] File too large" in caplog.text
    assert_close(run, off)


def test_asked_to_leave_while_encoding_it_keeps_what_it_has_and_goes_on_to_the_same_weights(
    data: dict[str, tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    config = config_of(data, frozen_views=1, features="auto")
    undisturbed = trained(tmp_path / "undisturbed", config)
    run = write_run(tmp_path / "run", config)
    forward = TinyEncoder.forward
    encoded.clear()

    def warned(self: TinyEncoder, context: Any) -> Any:
        if len(encoded) == 5:
            preemption.preemption_flag.received = signal.SIGTERM
        return forward(self, context)

    monkeypatch.setattr(TinyEncoder, "forward", warned)
    monkeypatch.setattr(preemption.preemption_flag, "received", None)
    assert fit(run) == PREEMPTED
    before = sum(encoded)
    assert 0 < before < 3 * 5
    monkeypatch.setattr(preemption.preemption_flag, "received", None)
    monkeypatch.setattr(TinyEncoder, "forward", forward)
    assert fit(run) == 0
    assert_same(run, undisturbed)
    # The frozen epochs encode the rest once, and the last epoch everything.
    assert sum(encoded) == 3 * (5 + 3) + 3 * (5 + 3)


def test_a_sample_that_cannot_be_used_is_skipped_as_without(
    data: dict[str, tuple[str, str]], tmp_path: Path, encoded: list[int]
) -> None:
    raster = next(Path(data["regress"][0]).glob("windows/default/w001/layers/image/*/geotiff.tif"))
    raster.write_bytes(raster.read_bytes()[:100])
    kept = trained(tmp_path / "kept", config_of(data, frozen_views=1, on_fault="skip"))
    # The others once, the batch of the broken one in each of three frozen epochs, and everything in the last.
    batch = sum(encoded) - (3 * (5 + 3) - 1) - 3 * (5 + 3)
    assert 0 < batch <= 3 * 2
    assert json.loads(kept.state.read_text())["faults"] == {"train": 1}
    assert_close(kept, trained(tmp_path / "off", config_of(data, frozen_views=1, on_fault="skip", features="off")))


@pytest.mark.slow
def test_two_processes_share_the_encoding(data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    runs = {}
    for features in ("auto", "off"):
        config = config_of(data, frozen_views=1, features=features)
        runs[features] = write_run(tmp_path / features, config)
    train_on(2, [runs["auto"].path, runs["off"].path])
    assert_close(runs["auto"], runs["off"])


class Workers(Callback):
    """Notes in each training epoch which processes read."""

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.seen: list[list[int]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, index: int) -> None:
        if index == 0:
            self.seen.append(sorted(child.pid or 0 for child in multiprocessing.active_children()))
            self.out.write_text(json.dumps(self.seen))


def test_while_nothing_is_kept_the_same_workers_read_on(data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    out = tmp_path / "workers.json"
    config = run_config({"regress": data["regress"]}, epochs=4, num_workers=1)
    config["trainer"] |= {"enable_progress_bar": False, "check_val_every_n_epoch": 10}
    config["trainer"]["callbacks"] = [
        {"class_path": "tests.data.features.test_stage.Workers", "init_args": {"out": str(out)}}
    ]
    write_run(tmp_path, config)
    assert fit(RunDir(tmp_path / "projects" / "tests" / "tiny")) == 0
    seen = json.loads(out.read_text())
    assert len(seen) == 4 and seen[0] and seen == seen[:1] * 4
