"""Samples that can't be used: each kind is named by sample and layer; stop or skip, also across a resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SplitConfig
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.tasks.task import Task

from rslp.data.bad_samples import BadSample, BadSamplePolicy, BadSampleRecord
from rslp.data.batches import read_or_replace
from rslp.data.samples import SampleKey, SampleSource
from rslp.errors import ConfigError, DataError, MachineError
from rslp.evaluate.evaluation import evaluate
from rslp.helios.norm import HeliosNormalize
from rslp.rundir import RunDir
from rslp.train.baselines import fit_baselines
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run
from tests.train.test_fit import logged, same, start, weights

TASKS: dict[str, Callable[[], Task]] = {
    "classify": lambda: ClassificationTask(property_name="value", classes=["low", "high"]),
    "regress": lambda: RegressionTask(property_name="value", filters=[]),
    "segment": lambda: SegmentationTask(num_classes=2),
}


def source(path: Path, kind: str, *, cls: type[SampleSource] = SampleSource, **settings: Any) -> SampleSource:
    label = (
        DataInput("raster", ["label"], bands=["class"], is_target=True)
        if kind == "segment"
        else DataInput("vector", ["label"], is_target=True)
    )
    module = RslearnDataModule(
        path=str(path),
        inputs={"image": DataInput("raster", ["image"], bands=["a", "b"], passthrough=True), "label": label},
        task=MultiTask({kind: TASKS[kind]()}, input_mapping={kind: {"label": "targets"}}),
        train_config=SplitConfig(tags={"split": "train"}, **settings),
    )
    return cls("crops", data_module=module, split="train", seed=0)


def file_of(path: Path, layer: str, window: str = "w000") -> Path:
    (found,) = [
        p for p in path.glob(f"windows/default/{window}/layers/{layer}/**/*.*") if p.suffix in (".tif", ".geojson")
    ]
    return found


def rewrite(tif: Path, change: Callable[[np.ndarray], None]) -> None:
    with rasterio.open(tif) as raster:
        profile, image = raster.profile, raster.read()
    change(image)
    with rasterio.open(tif, "w", **profile) as raster:
        raster.write(image)


def set_nan(image: np.ndarray) -> None:
    image[1, 2:4] = np.nan


def set_infinite(image: np.ndarray) -> None:
    image[0, 0, 0] = np.inf


def set_class(image: np.ndarray) -> None:
    image[0, :1] = 7


def properties(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    for feature in content["features"]:
        feature["properties"] = values
    path.write_text(json.dumps(content))


def empty(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "features": []}))


# What befalls a file of a kind of dataset, and what is said of it.
FAULTS: list[tuple[str, str, Callable[[Path], Any], str]] = [
    ("classify", "image", lambda p: p.write_bytes(b"this is no GeoTIFF"), "can't read the sample: RasterioIOError"),
    ("classify", "image", lambda p: p.write_bytes(p.read_bytes()[:300]), "can't read the sample"),
    ("classify", "image", lambda p: p.unlink(), "can't read the sample"),
    ("classify", "image", lambda p: rewrite(p, set_nan), r"12\.50% .* NaN, infinite or declared nodata \(band b\)"),
    ("classify", "image", lambda p: rewrite(p, set_infinite), r"0\.78% .* NaN, infinite or declared nodata \(band a\)"),
    ("classify", "label", lambda p: p.write_text("{"), "can't read the sample"),
    ("classify", "label", lambda p: p.unlink(), "can't read the sample"),
    ("classify", "label", empty, "no feature found providing class label"),
    ("classify", "label", lambda p: properties(p, value="middling"), "rslearn's own check failed"),
    ("classify", "label", lambda p: properties(p, value=None), "'value' of the feature is null, and the task needs a"),
    ("regress", "label", empty, "no feature found providing regression label"),
    ("regress", "label", lambda p: properties(p, value="warm"), "could not convert"),
    ("regress", "label", lambda p: properties(p, value=None), "property 'value' of the feature is null, and"),
    ("regress", "label", lambda p: properties(p, value="nan"), "1 of 1 labels are NaN"),
    ("segment", "label", lambda p: rewrite(p, set_class), "8 of 64 labels are no class of the task: got 7, allowed"),
]  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    for kind in TASKS:
        write_dataset(folder / kind, kind)
    return folder


@pytest.mark.parametrize(("kind", "layer", "spoil", "message"), FAULTS)
def test_a_fault_is_named_by_sample_and_layer(
    kind: str, layer: str, spoil: Callable[[Path], Any], message: str, tmp_path: Path, clean: Path
) -> None:
    path = Path(shutil.copytree(clean / kind, tmp_path / kind))
    spoil(file_of(path, layer))
    found = source(path, kind)
    index = next(i for i in range(len(found)) if "/w000/" in found.identity(i))
    with pytest.raises(DataError, match=rf"^crops/default/w000/0_0_8_8: layer {layer}: .*({message})") as caught:
        found.sample(index)
    assert "\n" not in str(caught.value)
    for other in set(range(len(found))) - {index}:
        found.sample(other)


def test_a_label_that_the_task_passes_over_is_no_fault(tmp_path: Path, clean: Path) -> None:
    path = Path(shutil.copytree(clean / "classify", tmp_path / "classify"))
    for window in path.glob("windows/default/*"):
        properties(window / "layers/label/data.geojson", value=None)
    found = source(path, "classify")
    task = found.task.tasks["classify"]  # type: ignore[attr-defined]
    task.skip_unknown_categories = task.allow_invalid = True
    assert found.sample(0)[1]["classify"]["valid"] == 0


def test_a_modality_that_a_window_lacks_is_named_with_what_is_there(tmp_path: Path, clean: Path) -> None:
    path = Path(shutil.copytree(clean / "classify", tmp_path / "classify"))
    found = source(path, "classify", transforms=[HeliosNormalize({"sentinel1": ["vv", "vh"]})])
    with pytest.raises(DataError) as caught:
        found.sample(0)
    what = "the transforms fail: HeliosNormalize: the sample has no input 'sentinel1'; its inputs: classify, image; "
    assert f"{what}skip_missing: true normalises those that a sample has" in str(caught.value)
    assert str(caught.value).startswith("crops/default/w00")


def test_a_sample_in_a_faulty_ones_place_is_a_pure_function_of_the_key(tmp_path: Path, clean: Path) -> None:
    path = Path(shutil.copytree(clean / "classify", tmp_path / "data"))
    for window in ("w000", "w002", "w004"):
        file_of(path, "image", window).write_bytes(b"")
    found = source(path, "classify")
    index = next(i for i in range(len(found)) if "/w000/" in found.identity(i))
    taken = set()
    for draw in range(6):
        sample, faults = read_or_replace(found, SampleKey("crops", index, draw), replace=True)
        again, same_faults = read_or_replace(source(path, "classify"), SampleKey("crops", index, draw), replace=True)
        assert sample is not None
        assert again is not None
        assert torch.equal(sample[0]["image"].image, again[0]["image"].image)
        assert faults == same_faults
        assert faults[0].sample == found.identity(index)
        taken.add(sample[2].window_name)
    assert len(taken) > 1
    assert taken <= {"w001", "w003", "w005"}
    assert read_or_replace(found, SampleKey("crops", index, 0), replace=False)[0] is None
    assert fit_baselines({"crops": found}, skip=True) == {"crops": {"classify": 0.0}}


def test_a_dataset_without_one_good_sample_is_given_up(tmp_path: Path, clean: Path) -> None:
    path = Path(shutil.copytree(clean / "classify", tmp_path / "data"))
    for number in range(6):
        file_of(path, "image", f"w{number:03d}").write_bytes(b"")
    sample, faults = read_or_replace(source(path, "classify"), SampleKey("crops", 0, 0), replace=True)
    assert sample is None
    assert len({fault.sample for fault in faults}) == 6


def test_the_limit_counts_samples_not_how_often_they_are_met(capsys: pytest.CaptureFixture[str]) -> None:
    record = BadSampleRecord(BadSamplePolicy("skip", max_faults=2))
    faults = [BadSample("train", name, f"{name}: gone") for name in "abc"]
    for _ in range(3):
        record.add(faults[:2])
    assert record.counts() == {"train": 2}
    assert capsys.readouterr().err.count("gone") == 2
    resumed = BadSampleRecord(BadSamplePolicy("skip", max_faults=2))
    resumed.load_state_dict(json.loads(json.dumps(record.state_dict())))
    with pytest.raises(
        DataError, match=r"3 samples can't be used, and max_faults is 2:\n  a: gone\n  b: gone\n  c: gone"
    ):
        resumed.add(faults[2:])


@pytest.mark.parametrize(
    ("policy", "message"), [({"on_fault": "ignore"}, "stop or skip"), ({"max_faults": -1}, "0 or more")]
)
def test_a_policy_that_cannot_be(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BadSamplePolicy(**policy)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Two datasets, in which two training windows, a validation batch and a test window can't be used."""
    folder = tmp_path_factory.mktemp("faulty")
    for window in ("w001", "w004", "w006", "w007", "w010"):
        path = folder / "classify"
        file_of(path if path.exists() else write_dataset(path, "classify"), "image", window).write_bytes(b"")
    write_dataset(folder / "regress", "regress")
    return {kind: (str(folder / kind), kind) for kind in ("classify", "regress")}


def skipping(faulty: dict[str, tuple[str, str]], **data: Any) -> dict[str, Any]:
    return run_config(faulty, epochs=3, dropout=0.2, on_fault="skip", **data)


def test_faults_are_skipped_counted_and_survive_a_resume(
    tmp_path: Path, faulty: dict[str, tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    reference = start(tmp_path / "a", skipping(faulty))
    state = json.loads((reference.path / "state.json").read_text())
    assert state["faults"] == {"train": 2, "val": 2}
    assert "without 2 train samples that can't be used, 2 val samples" in capsys.readouterr().err
    config = skipping(faulty, num_workers=2)
    killed = start(tmp_path / "b", config, die_at=8)
    capsys.readouterr()
    start(tmp_path / "b", config)
    assert same(weights(killed.last), weights(reference.last))
    assert logged(killed) == logged(reference)
    assert "skipped (" not in capsys.readouterr().err  # all were met, and told of, before the kill
    assert json.loads((killed.path / "state.json").read_text())["faults"] == state["faults"]
    evaluation = evaluate(reference, splits=("test",))[0]
    assert {row.dataset: row.n for row in evaluation.rows if row.primary} == {"classify": 2, "regress": 3}
    (fault,) = json.loads(reference.evaluation("test").read_text())["bad_samples"]
    assert fault.startswith("classify/default/w010/")


def test_one_more_than_the_limit_stops_with_the_list(tmp_path: Path, faulty: dict[str, tuple[str, str]]) -> None:
    run = write_run(tmp_path, skipping(faulty, max_faults=1))
    with pytest.raises(DataError, match=r"2 samples can't be used, and max_faults is 1:\n  classify/.*\n  classify/"):
        fit(run)


class KillWorker(Callback):
    """Kills a reading worker, as the kernel does where memory runs out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            import multiprocessing

            pid = multiprocessing.active_children()[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(120)
def test_a_killed_worker_is_one_line_and_the_run_goes_on(tmp_path: Path, clean: Path) -> None:
    data = {"classify": (str(clean / "classify"), "classify")}
    config = run_config(data, epochs=40, num_workers=2)
    run = RunDir(tmp_path / "projects" / "tests" / "tiny")
    config["trainer"]["callbacks"] = [
        {"class_path": "tests.data.test_bad_samples.KillWorker", "init_args": {"step": 5}}
    ]
    write_run(tmp_path, config)
    with pytest.raises(
        MachineError,
        match=r"reads samples (was killed|died) \(.*limit: .* GiB.* set data\.init_args\.num_workers lower",
    ) as caught:
        fit(run)
    assert "\n" not in str(caught.value)
    assert run.last.exists()
    config["trainer"] |= {"callbacks": [], "max_epochs": 4}
    run.config.write_text(json.dumps(config))
    assert fit(run) == 0
