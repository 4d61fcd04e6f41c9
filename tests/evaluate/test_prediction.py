"""Predictions as files: right, whole, each window once, and never over what is read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fiona.crs
import fiona.transform
import numpy as np
import pytest
import rasterio
import torch
import yaml
from rslearn.config import LayerConfig, StorageConfig
from rslearn.dataset import Dataset
from rslearn.models.component import Predictor
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.lightning_module import RslearnLightningModule
from rslearn.train.model_context import ModelContext, ModelOutput
from rslearn.train.prediction_writer import RasterMerger, RslearnWriter
from upath import UPath

from rslp.errors import ConfigError, DataError, RunError
from rslp.evaluate.evaluation import evaluate
from rslp.evaluate.prediction import predict
from rslp.evaluate.rows import Evaluation
from rslp.rundir import RunDir
from rslp.train.build import build
from rslp.train.checkpoints import load_weights, read_checkpoint
from rslp.train.fit import fit
from tests.children import Python
from tests.hold import until
from tests.tiny import TinyEncoder, four_datasets, run_config, task_config, write_dataset, write_run

DATASETS = ("data", "init_args", "data_modules")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four datasets and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("trained")
    run = write_run(folder / "run", run_config(four_datasets(folder / "data"), epochs=4))
    assert fit(run) == 0
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(trained, tmp_path / "copy")
    run = run_at(tmp_path / "copy")
    run.config.write_text(run.config.read_text().replace(str(trained), str(tmp_path / "copy")))
    return tmp_path / "copy"


def run_at(folder: Path) -> RunDir:
    return RunDir(folder / "run" / "projects" / "tests" / "tiny")


def change(run: RunDir, dataset: str | None = None, **settings: Any) -> None:
    """Change a dataset's data module in the run's config, or the joint one."""
    config = yaml.safe_load(run.config.read_text())
    data = config["data"]["init_args"]
    (data["data_modules"][dataset]["init_args"] if dataset else data).update(settings)
    run.config.write_text(yaml.safe_dump(config))


def summary(run: RunDir) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(run.prediction_marker.read_text())
    return content


def files(run: RunDir) -> list[str]:
    return sorted(path.relative_to(run.predictions).as_posix() for path in run.predictions.rglob("*") if path.is_file())


def label(folder: Path, kind: str, window: str, layer: str = "label") -> Path:
    layers = folder / "data" / kind / "windows" / "default" / window / "layers"
    (found,) = [path for path in (layers / layer).rglob("*.*") if path.suffix in (".tif", ".geojson")]
    return found


def read(tif: Path) -> tuple[np.ndarray, Any, Any]:
    with rasterio.open(tif) as raster:
        return raster.read(), raster.crs, raster.transform


TEST_WINDOWS = ["w009", "w010", "w011"]


def test_each_window_of_the_test_split_becomes_a_file_that_agrees_with_the_metrics(place: Path) -> None:
    run = run_at(place)
    (evaluation,) = evaluate(run, splits=["test"])
    assert predict(run)
    kinds = {"classify": "geojson", "detect": "geojson", "regress": "geojson", "segment": "tif"}
    assert files(run) == [f"{kind}/default/{w}/{kind}.{end}" for kind, end in kinds.items() for w in TEST_WINDOWS]
    told = summary(run)
    assert told["checkpoint"] == "checkpoints/best.ckpt" and told["checkpoint_sha256"] == evaluation.checkpoint_sha256
    assert {d: (t["split"], t["windows"], t["left_out"]) for d, t in told["datasets"].items()} == dict.fromkeys(
        kinds, ("test", 3, 0)
    )
    assert told["datasets"]["classify"]["tasks"]["classify"]["classes"] == ["low", "high"]

    pairs = []
    for window in TEST_WINDOWS:
        (ours, crs, transform), (truth, *there) = (
            read(run.predictions / "segment" / "default" / window / "segment.tif"),
            read(label(place, "segment", window)),
        )
        assert [crs, transform] == there and ours.dtype == np.uint8
        pairs.append((ours, truth))
    ours, truth = (np.concatenate(part) for part in zip(*pairs, strict=True))
    assert (ours == truth).mean() == pytest.approx(value_of(evaluation, "segment", "segment", "accuracy"), abs=1e-6)

    found = {
        kind: [features(run.predictions / kind / "default" / w / f"{kind}.geojson") for w in TEST_WINDOWS]
        for kind in ("classify", "regress")
    }
    assert all(len(one) == 1 for each in found.values() for one in each)
    pairs_of = {
        kind: [
            (f[0]["value"], features(label(place, kind, w))[0]["value"])
            for f, w in zip(each, TEST_WINDOWS, strict=True)
        ]
        for kind, each in found.items()
    }
    error = np.mean([(ours - truth) ** 2 for ours, truth in pairs_of["regress"]])
    assert error == pytest.approx(value_of(evaluation, "regress", "regress", "mse"), rel=1e-5)
    share = recall(pairs_of["classify"])
    assert share == pytest.approx(value_of(evaluation, "classify", "classify", "balanced_accuracy"))


def recall(pairs: list[tuple[Any, Any]]) -> float:
    """The share that is found, the mean over the classes."""
    classes = {truth for _, truth in pairs}
    return float(np.mean([np.mean([ours == truth for ours, truth in pairs if truth == one]) for one in classes]))


def value_of(evaluation: Evaluation, dataset: str, task: str, metric: str) -> float:
    (row,) = [row for row in evaluation.rows if (row.dataset, row.task, row.metric) == (dataset, task, metric)]
    return row.value


def features(path: Path) -> list[dict[str, Any]]:
    return [feature["properties"] for feature in json.loads(path.read_text())["features"]]


def test_features_lie_where_their_window_does(place: Path) -> None:
    run = run_at(place)
    predict(run)
    # Window w009 is 8 px of 10 m wide, 18 * 8 px east of the zone's origin.
    with fiona.open(run.predictions / "classify" / "default" / "w009" / "classify.geojson") as collection:
        assert collection.crs == fiona.crs.CRS.from_epsg(4326)
        (feature,) = collection
        shape = fiona.transform.transform_geom("EPSG:4326", "EPSG:32631", feature.geometry)
    corners = np.array(shape["coordinates"][0])
    np.testing.assert_allclose([*corners.min(axis=0), *corners.max(axis=0)], [1440, -80, 1520, 0], atol=0.01)


class BrightSpots(Predictor):
    """Detects each pixel that is brighter than anything that training has seen, where the crop shows it."""

    def forward(self, intermediates: Any, context: ModelContext, targets: Any = None) -> ModelOutput:
        outputs = []
        for inputs in context.inputs:
            rows, columns = torch.nonzero(inputs["image"].image[0, 0] > 50, as_tuple=True)
            boxes = torch.stack([columns, rows, columns + 1, rows + 1], dim=1).float()
            outputs.append({"boxes": boxes, "labels": torch.ones(len(boxes)).long(), "scores": torch.ones(len(boxes))})
        return ModelOutput(outputs, {"cls": intermediates.feature_maps[0].mean()})


@pytest.mark.parametrize(("overlap", "size"), [(0, 16), (4, 16), (2, 21), (6, 13), (0, 5)])
def test_each_object_is_detected_once_and_where_it_is(tmp_path: Path, overlap: int, size: int) -> None:
    path = write_dataset(tmp_path / "data" / "detect", "detect", size=size)
    config = run_config({"detect": (str(path), "detect")}, epochs=1)
    decoders = config["model"]["init_args"]["model"]["init_args"]["decoders"]
    decoders["detect"] = [{"class_path": f"{__name__}.BrightSpots"}]
    run = write_run(tmp_path / "run", config)
    settings = {"crop_size": 8, "overlap_pixels": overlap, "load_all_crops": True, "tags": {"split": "val"}}
    change(run, "detect", predict_config=settings, batch_size=3)
    assert fit(run) == 0
    rng, planted = np.random.default_rng(size), {}
    for number, window in enumerate(("w006", "w007", "w008"), start=6):
        spots = rng.random((size, size)) < 0.2
        rewrite_image(label(tmp_path, "detect", window, layer="image"), spots)
        # Pixels of 10 m; windows stand in a row with a gap of their own width.
        planted[window] = {((number * 2 * size + x + 0.5) * 10, -(y + 0.5) * 10) for y, x in np.argwhere(spots)}
    predict(run)
    for window, wanted in planted.items():
        with fiona.open(run.predictions / "detect" / "default" / window / "detect.geojson") as collection:
            assert all(feature.properties["value"] == "thing" for feature in collection)
            shapes = [fiona.transform.transform_geom("EPSG:4326", "EPSG:32631", f.geometry) for f in collection]
        centres = [np.array(shape["coordinates"][0][:4]).mean(axis=0) for shape in shapes]
        assert sorted((round(x, 1), round(y, 1)) for x, y in centres) == sorted(wanted)


def rewrite_image(tif: Path, spots: np.ndarray, value: float = 100) -> None:
    with rasterio.open(tif) as raster:
        profile, values = raster.profile, raster.read()
    values[:, spots] = value
    with rasterio.open(tif, "w", **profile) as raster:
        raster.write(values)


@pytest.mark.parametrize(("overlap", "size"), [(0, 16), (4, 16), (2, 21)])
def test_crops_are_merged_as_rslearn_merges_them(tmp_path: Path, overlap: int, size: int) -> None:
    """Against rslearn's own way: its data module, its Lightning module's output, its writer with its merger."""
    path = write_dataset(tmp_path / "data", "segment", size=size)
    run = write_run(tmp_path / "run", run_config({"segment": (str(path), "segment")}, epochs=1))
    change(run, "segment", default_config={"crop_size": 8}, batch_size=3)
    assert fit(run) == 0
    config = yaml.safe_load(run.config.read_text())
    task = config["data"]["init_args"]["data_modules"]["segment"]["init_args"]["task"]["init_args"]["tasks"]["segment"]
    task["init_args"] = {**task["init_args"], "output_probs": True}
    run.config.write_text(yaml.safe_dump(config))
    settings = {"crop_size": 8, "overlap_pixels": overlap, "load_all_crops": True, "tags": {"split": "val"}}
    change(run, "segment", predict_config=settings)
    assert predict(run)
    assert summary(run)["datasets"]["segment"] == {
        "split": "predict",
        "windows": 3,
        "left_out": 0,
        "tasks": {"segment": {"kind": "SegmentationTask", "files": "predictions/segment/*/*/segment.tif"}},
    }

    made = build(run, training=False)
    load_weights(made.model, read_checkpoint(run.best()), path=run.best())
    made.model.eval()
    module: RslearnDataModule = made.datamodule.data_modules["segment"]
    # The joint model asks the metadata which dataset a sample is of.
    module.name = "segment"
    module.setup("predict")
    writer = RslearnWriter(
        output_layer="theirs",
        output_path=str(tmp_path / "theirs"),
        merger=RasterMerger(overlap_pixels=overlap),
        selector=["segment"],
        layer_config=LayerConfig.model_validate(
            {"type": "raster", "band_sets": [{"bands": ["no", "yes"], "dtype": "float32"}]}
        ),
        storage_config=StorageConfig(),
    )
    writer._initialize(module.path)
    for batch in module.predict_dataloader():
        with torch.no_grad():
            output = RslearnLightningModule.predict_step(made.model, batch, 0)
        writer.process_output_batch(module.task, output.outputs, batch[2])
    for window in ("w006", "w007", "w008"):
        theirs = read(next((tmp_path / "theirs" / "windows" / "default" / window).rglob("*.tif")))
        ours = read(run.predictions / "segment" / "default" / window / "segment.tif")
        assert ours[0].shape == (2, size, size) and ours[0].dtype == np.float32 and len(np.unique(ours[0])) > size
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]


def test_a_window_of_which_training_draws_a_crop_is_predicted_as_a_whole(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data", "classify", size=16)
    run = write_run(tmp_path / "run", run_config({"classify": (str(path), "classify")}, epochs=1))
    change(run, "classify", default_config={"crop_size": 12})
    fit(run)
    predict(run)
    with fiona.open(run.predictions / "classify" / "default" / "w009" / "classify.geojson") as collection:
        assert len(collection) == 4


def test_no_label_is_read(place: Path) -> None:
    run = run_at(place)
    predict(run)
    before = {name: (run.predictions / name).read_bytes() for name in files(run)}
    for layer in (place / "data").glob("*/windows/default/*/layers/label"):
        shutil.rmtree(layer)
    select = {"class_path": "rslearn.train.transforms.normalize.Normalize", "init_args": {"mean": 0, "std": 1}}
    select["init_args"]["selectors"] = ["image", "target/segment/classes"]
    change(run, "segment", test_config={"tags": {"split": "test"}, "transforms": [select]})
    predict(run)
    assert {name: (run.predictions / name).read_bytes() for name in files(run)} == before


def test_what_predict_config_chooses_is_predicted_and_nothing_else(place: Path) -> None:
    run = run_at(place)
    change(run, disabled_datasets=["classify", "detect", "regress"])
    change(run, "segment", predict_config={"names": ["w001", "w007"]})
    predict(run)
    assert files(run) == ["segment/default/w001/segment.tif", "segment/default/w007/segment.tif"]
    change(run, "segment", predict_config={})
    predict(run)
    assert len(files(run)) == 12


def spoil(place: Path, kind: str, window: str) -> bytes:
    path = label(place, kind, window, layer="image")
    content = path.read_bytes()
    path.write_bytes(b"no image")
    return content


def test_it_stops_at_a_sample_that_cannot_be_read_and_goes_on_when_it_is_mended(place: Path) -> None:
    run = run_at(place)
    change(run, batch_sizes=1)
    good = spoil(place, "regress", "w010")
    with pytest.raises(DataError, match="regress/default/w010"):
        predict(run)
    assert not run.prediction_marker.exists()
    written = {name: (run.predictions / name).stat().st_mtime_ns for name in files(run) if name != "progress.jsonl"}
    assert {name.partition("/")[0] for name in written} >= {"classify", "detect"}
    # A window that was being written when the process was killed, one that was not noted yet, and a torn note.
    (run.predictions / ".begun").mkdir()
    (run.predictions / ".begun" / "half.tif").write_text("half")
    unnoted = sorted(set(TEST_WINDOWS) - {name.split("/")[2] for name in written if name.startswith("regress")})[-1]
    (run.predictions / "regress" / "default" / unnoted).mkdir(parents=True)
    (run.predictions / "regress" / "default" / unnoted / "classify.geojson").write_text("{}")
    with run.prediction_progress.open("a") as progress:
        progress.write('["regress", "defa')
    label(place, "regress", "w010", layer="image").write_bytes(good)
    assert predict(run)
    assert {name: (run.predictions / name).stat().st_mtime_ns for name in written} == written
    assert len(files(run)) == 12 and not (run.predictions / ".begun").exists()
    assert {name.rpartition("/")[2] for name in files(run) if name.startswith("regress")} == {"regress.geojson"}
    first = files(run)[0]
    assert predict(run)
    assert (run.predictions / first).stat().st_mtime_ns != written[first]  # what was through is made anew


def test_another_checkpoint_does_not_go_on_from_what_the_first_has_written(place: Path) -> None:
    run = run_at(place)
    good = spoil(place, "segment", "w010")
    with pytest.raises(DataError):
        predict(run)
    label(place, "segment", "w010", layer="image").write_bytes(good)
    stale = run.predictions / "classify" / "default" / "gone"
    stale.mkdir()
    content = read_checkpoint(run.best())
    torch.save({**content, "note": "another"}, place / "other.ckpt")
    assert predict(run, checkpoint=str(place / "other.ckpt"))
    assert not stale.exists() and summary(run)["checkpoint"] == str(place / "other.ckpt")


def test_predictions_of_a_former_checkpoint_that_cannot_be_removed_are_not_added_to(place: Path) -> None:
    run = run_at(place)
    assert predict(run)
    run.predictions.rename(place / "elsewhere")
    run.predictions.symlink_to(place / "elsewhere")
    with pytest.raises(RunError, match=r"/predictions can't be removed \(a link, or"):
        predict(run)
    run.predictions.unlink()
    assert predict(run)
    assert (place / "elsewhere" / "classify").is_dir()


def test_a_window_with_a_faulty_crop_is_left_out_as_a_whole(place: Path) -> None:
    run = run_at(place)
    change(run, on_fault="skip")
    change(run, "segment", test_config={"tags": {"split": "test"}, "crop_size": 4, "load_all_crops": True})
    spot = np.zeros((8, 8), dtype=bool)
    spot[7, 7] = True
    rewrite_image(label(place, "segment", "w010", layer="image"), spot, np.nan)
    assert predict(run)
    assert [name for name in files(run) if name.startswith("segment")] == [
        f"segment/default/{window}/segment.tif" for window in ("w009", "w011")
    ]
    told = summary(run)
    assert told["datasets"]["segment"]["windows"] == 2 and told["datasets"]["segment"]["left_out"] == 1
    (fault,) = told["faults"]
    assert fault.startswith("segment/default/w010/164_4_168_8: ")


def add_layer(place: Path, kind: str, name: str, layer: dict[str, Any]) -> None:
    path = place / "data" / kind / "config.json"
    content = json.loads(path.read_text())
    content["layers"][name] = layer
    path.write_text(json.dumps(content))


def test_a_dataset_that_has_a_layer_for_it_takes_the_predictions(place: Path) -> None:
    run = run_at(place)
    predict(run)
    ours = {w: read(run.predictions / "segment" / "default" / w / "segment.tif")[0] for w in TEST_WINDOWS}
    add_layer(place, "segment", "output", {"type": "raster", "band_sets": [{"bands": ["class"], "dtype": "uint8"}]})
    add_layer(place, "classify", "output", {"type": "vector"})
    predict(run)
    assert {name.partition("/")[0] for name in files(run)} == {"detect", "regress"}
    assert summary(run)["datasets"]["segment"]["tasks"]["segment"] == {
        "kind": "SegmentationTask",
        "dataset": str(place / "data" / "segment"),
        "layer": "output",
    }
    for kind in ("segment", "classify"):
        windows = Dataset(UPath(place / "data" / kind)).load_windows()
        assert sorted(w.name for w in windows if w.is_layer_completed("output")) == TEST_WINDOWS
    for window in TEST_WINDOWS:
        np.testing.assert_array_equal(
            read(label(place, "segment", window, "output").parent / "geotiff.tif")[0], ours[window]
        )
    # rslearn's key for going on: what has the layer is not predicted again.
    change(run, "segment", predict_config={"output_layer_name_skip_inference_if_exists": "output"})
    shutil.rmtree(place / "data" / "segment" / "windows" / "default" / "w010" / "layers" / "output")
    predict(run)
    assert summary(run)["datasets"]["segment"]["windows"] == 10
    assert summary(run)["datasets"]["segment"]["left_out"] == 2


def with_writers(run: RunDir, *writers: dict[str, Any]) -> None:
    config = yaml.safe_load(run.config.read_text())
    path = "rslearn.train.prediction_writer.RslearnWriter"
    config["trainer"]["callbacks"] = [{"class_path": path, "init_args": writer} for writer in writers]
    run.config.write_text(yaml.safe_dump(config))


def test_a_writer_among_the_callbacks_says_where_to(place: Path) -> None:
    run = run_at(place)
    add_layer(place, "detect", "ships", {"type": "vector"})
    with_writers(run, {"output_layer": "ships", "path": str(place / "data" / "detect"), "selector": ["detect"]})
    predict(run)
    assert "detect" not in {name.partition("/")[0] for name in files(run)}
    assert len(list((place / "data" / "detect").rglob("ships/data.geojson"))) == 3
    # It is no hindrance to training and evaluation, which it has nothing to do with.
    config = yaml.safe_load(run.config.read_text())
    config["trainer"]["max_epochs"] += 1
    run.config.write_text(yaml.safe_dump(config))
    assert fit(run) == 0
    evaluate(run, splits=["val"])


@pytest.mark.parametrize(
    ("writers", "layer", "error", "message"),
    [
        ([{"output_layer": "label", "selector": ["segment"]}], None, RunError, "'segment' reads from it"),
        ([{"output_layer": "image", "selector": ["segment"]}], None, RunError, "'segment' reads from it"),
        ([{"output_layer": "none", "selector": ["segment"]}], None, RunError, "no such layer.* image, label"),
        ([{"output_layer": "x"}], None, ConfigError, "4 tasks fit"),
        ([{"output_layer": "x", "selector": ["other"]}], None, ConfigError, "no task fits"),
        ([], {"type": "vector"}, RunError, "is of type vector, and the task segment gives raster data"),
        ([], {"type": "raster", "band_sets": [{"bands": ["a", "b"], "dtype": "uint8"}]}, RunError, "has 2 bands"),
        (
            [],
            {
                "type": "raster",
                "band_sets": [{"bands": ["a"], "dtype": "uint8"}],
                "data_source": {"class_path": "rslearn.data_sources.local_files.LocalFiles"},
            },
            RunError,
            "holds images of a data source",
        ),
    ],
)
def test_what_cannot_take_predictions_is_refused_and_nothing_is_overwritten(
    place: Path, writers: list[dict[str, Any]], layer: dict[str, Any] | None, error: type[Exception], message: str
) -> None:
    run = run_at(place)
    with_writers(run, *writers)
    if layer:
        add_layer(place, "segment", "output", layer)
    data = {path: path.read_bytes() for path in (place / "data").rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        predict(run)
    assert {path: path.read_bytes() for path in (place / "data").rglob("*") if path.is_file()} == data
    assert not run.prediction_marker.exists()


def test_several_tasks_and_a_shared_head_each_say_their_own(tmp_path: Path) -> None:
    """Two tasks of a dataset, one of which shares its head with a task of another dataset, behind its labels."""
    first, second = (write_dataset(tmp_path / name, "classify") for name in ("first", "second"))
    config = run_config({"a": (str(first), "classify"), "c": (str(second), "classify")}, epochs=3)
    module = config["data"]["init_args"]["data_modules"].pop("a")["init_args"]
    init_args = config["model"]["init_args"]["model"]["init_args"]
    pool, classify = init_args["decoders"].pop("c")
    head = [{**pool, "init_args": {**pool["init_args"], "out_channels": 4}}, classify]
    init_args["decoders"] = {"a": init_args["decoders"]["a"], "head": head}
    init_args["decoder_to_target"] = {"a": ["a"], "head": ["b", "c"]}
    init_args["task_label_offsets"] = {
        "b": {"outputs_key": "class", "offset": 2, "num_outputs": 2},
        "c": {"outputs_key": "class", "offset": 0, "num_outputs": 2},
    }
    module["task"]["init_args"]["tasks"]["b"] = task_config("classify")
    module["task"]["init_args"]["input_mapping"]["b"] = {"label_a": "targets"}
    config["model"]["init_args"]["task"]["init_args"]["tasks"]["b"] = task_config("classify")
    config["model"]["init_args"]["task"]["init_args"]["input_mapping"]["b"] = {"label_a": "targets"}
    config["data"]["init_args"]["data_modules"]["both"] = {
        "class_path": "rslearn.train.data_module.RslearnDataModule",
        "init_args": module,
    }
    run = write_run(tmp_path / "run", config)
    assert fit(run) == 0
    (evaluation,) = evaluate(run, splits=["test"])
    predict(run)
    assert files(run) == [
        *(f"both/default/{w}/{task}.geojson" for w in TEST_WINDOWS for task in "ab"),
        *(f"c/default/{w}/c.geojson" for w in TEST_WINDOWS),
    ]
    for dataset, task, path in (("both", "a", first), ("both", "b", first), ("c", "c", second)):
        pairs = []
        for w in TEST_WINDOWS:
            (found,) = features(run.predictions / dataset / "default" / w / f"{task}.geojson")
            (truth,) = features(path / "windows" / "default" / w / "layers" / "label" / "data.geojson")
            pairs.append((found["value"], truth["value"]))
        assert recall(pairs) == pytest.approx(value_of(evaluation, dataset, task, "balanced_accuracy"))


class WaitingEncoder(TinyEncoder):
    """Waits at its third batch until it is killed."""

    batches = 0

    def forward(self, context: Any) -> Any:
        type(self).batches += 1
        if self.batches == 3:
            Path(os.environ["WAITING"]).touch()
            time.sleep(300)
        return super().forward(context)


@contextmanager
def waiting(place: Path, monkeypatch: pytest.MonkeyPatch, *, mode: str) -> Iterator[Python]:
    """A job that has been through two batches of one sample, and waits."""
    run = run_at(place)
    change(run, batch_sizes=1, num_workers=0)
    text = run.config.read_text().replace("tests.tiny.TinyEncoder", f"{__name__}.WaitingEncoder")
    run.config_of(mode).write_text(text)
    monkeypatch.setenv("WAITING", str(place / "waits"))
    command = [sys.executable, "-m", "rslp.main", "helios", "run", "--run_dir", str(run.path), "--mode", mode]
    process = Python(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        until((place / "waits").exists, lives=lambda: process.poll() is None, what="it ended before")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_asked_to_leave_it_leaves_and_is_no_success(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    run = run_at(place)
    with waiting(place, monkeypatch, mode="predict") as process:
        with pytest.raises(RunError, match=f"process {process.pid} on .* is already predicting"):
            predict(run)
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in said
    assert not run.prediction_marker.exists()
    written = [name for name in files(run) if name != "progress.jsonl"]
    assert written == [f"classify/default/{window}/classify.geojson" for window in written_windows(run)]
    assert len(written) == 2


def test_an_evaluation_that_is_asked_to_leave_does_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting(place, monkeypatch, mode="test") as process:
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == -signal.SIGTERM
    assert not run_at(place).evaluation("val").exists()


def written_windows(run: RunDir) -> list[str]:
    lines = [json.loads(line) for line in run.prediction_progress.read_text().splitlines()]
    return sorted(name for _, _, name in lines[1:])


def test_settings_that_rslearn_refuses_are_one_line(place: Path) -> None:
    run = run_at(place)
    change(run, "segment", predict_config={"crop_size": 4, "overlap_pixels": 2})
    with pytest.raises(ConfigError, match=r"config\.yaml:\d+: .*overlap_pixels requires load_all_crops") as caught:
        predict(run)
    assert "\n" not in str(caught.value)
