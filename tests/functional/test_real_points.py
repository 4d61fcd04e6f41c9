"""The example of real pixels: made-up arrays become a dataset; some of the real ones are trained on and evaluated."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rslearn.dataset import Dataset
from rslearn.models.component import FeatureVector
from rslearn.models.galileo import GalileoModel
from rslearn.models.galileo.galileo import GalileoSize
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, read_data_input
from rslearn.train.model_context import ModelContext, RasterImage
from rslearn.train.tasks.classification import ClassificationHead
from rslearn.train.tasks.regression import RegressionTask
from rslearn.utils.vector_format import GeojsonVectorFormat
from upath import UPath

from rslp.data.samples import open_dataset
from rslp.datasets import points
from rslp.datasets.splits import split_units
from rslp.errors import CheckpointError, ConfigError, DataError
from rslp.helios.galileo import Galileo
from rslp.models.heads import WeightedClassificationHead
from tests import children

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "real_points"
SHARED = ROOT / "../shared/data"
WEIGHTS = SHARED / "galileo-nano"
needs_shared = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="needs the optional folder of test data")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script of the example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def month(number: int) -> tuple[datetime, datetime]:
    return datetime(2020, number, 1, tzinfo=UTC), datetime(2020, number + 1, 1, tzinfo=UTC)


def series(points: ModuleType, values: np.ndarray, months: tuple[int, ...] = (3, 4, 5)) -> Any:
    return points.SensorSeries(bands=("red", "nir"), spans=tuple(map(month, months)), values=values)


def pixel(points: ModuleType, name: str, **changes: Any) -> Any:
    values = np.arange(6, dtype=float).reshape(3, 2)
    facts = {"lon": -120.5, "lat": 38.25, "split": "train", "label": {"moisture": 80.5}}
    sensors = {"s2": series(points, values)}
    return points.PixelSeries(**{"name": name, **facts, "sensors": sensors, **changes})


def test_a_written_point_reads_back_with_its_place_its_dates_and_its_gaps(tmp_path, monkeypatch):
    gap = np.array([[1, 2], [np.nan, 4], [5, 6]], dtype=float)
    never = np.full((3, 2), np.nan)
    sensors = {"s2": series(points, gap), "s1": series(points, never)}
    count = points.write_points_dataset(tmp_path / "d", [pixel(points, "a", sensors=sensors, tags={"site": "x"})])
    dataset = Dataset(UPath(tmp_path / "d"))
    [window] = dataset.load_windows()
    assert count == 1
    assert window.options == {"split": "train", "site": "x"}
    assert window.projection.crs.to_epsg() == 32610
    lon, lat = window.get_geometry().to_wgs84().shp.centroid.coords[0]
    assert (lon, lat) == pytest.approx((-120.5, 38.25), abs=1e-4)
    assert not window.is_layer_completed("s1")
    wanted = DataInput("raster", ["s2"], bands=["nir", "red"], passthrough=True)
    image = read_data_input(dataset, window, window.bounds, wanted, random.Random(0))
    assert isinstance(image, RasterImage)
    assert image.image[:, :, 0, 0].tolist() == [[2, 6], [1, 5]]
    assert [start.month for start, _ in image.timestamps or []] == [3, 5]
    label = read_data_input(dataset, window, window.bounds, DataInput("vector", ["label"]), random.Random(0))
    assert label[0].properties == {"moisture": 80.5}


def test_what_the_readme_shows_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = (EXAMPLE / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    facts = {"id": "a", "lon": 34.0, "lat": 3.0, "split": "val", "crop": "maize", "dates": (month(1),)}
    exec(shown, {"your_rows": [SimpleNamespace(**facts, values=np.ones((1, 2)))]})
    [window] = Dataset(UPath(tmp_path / "datasets" / "mine")).load_windows()
    assert window.options["split"] == "val"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a"}, "two points have this name"),
        ({"lat": 95.0}, "lie in no UTM zone"),
        ({"sensors": {}}, "not those of the first point"),
        ({"sensors": "short"}, "values of shape"),
    ],
)
def test_a_point_that_does_not_fit_is_refused(tmp_path, monkeypatch, changes, message):
    if changes.get("sensors") == "short":
        changes = {"sensors": {"s2": series(points, np.zeros((2, 2)))}}
    second = pixel(points, **{"name": "b", **changes})
    with pytest.raises(DataError, match=message):
        points.write_points_dataset(tmp_path / "d", [pixel(points, "a"), second])


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="no dataset of pixels"):
        points.write_points_dataset(tmp_path, [pixel(points, "a")])
    assert (tmp_path / "thesis.txt").exists()


def test_no_block_is_in_two_splits_and_each_split_gets_every_class():
    rng = np.random.default_rng(0)
    blocks = [f"b{n}" for n in rng.integers(0, 40, 400)]
    labels = rng.choice(["common", "rare"], size=400, p=[0.9, 0.1]).tolist()
    splits = split_units(
        [(b, c, 1) for b, c in zip(blocks, labels, strict=True)], shares={"train": 0.5, "val": 0.2, "test": 0.3}
    )
    assert set(splits) == set(blocks)
    for label in ("common", "rare"):
        chosen = [splits[block] for block, found in zip(blocks, labels, strict=True) if found == label]
        for split, share in (("train", 0.5), ("val", 0.2), ("test", 0.3)):
            assert chosen.count(split) / len(chosen) == pytest.approx(share, abs=0.1)


def test_a_missing_folder_is_one_line(tmp_path):
    command = [sys.executable, str(EXAMPLE / "convert.py"), "--fuel_moisture", str(tmp_path / "none")]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "none: no such folder" in done.stderr
    assert not (tmp_path / "out").exists()


def sample(months: dict[str, tuple[int, ...]], *, seed: int, size: int = 1) -> dict[str, RasterImage]:
    """Random values of each sensor in the given months; the same seed gives the same values for a month."""
    channels = {"s1": 2, "s2": 10, "era5": 2}
    scale = {"s1": (-12, 3), "s2": (1500, 500), "era5": (285, 5)}
    made = {}
    for key, numbers in months.items():
        mean, spread = scale[key]
        rng = [np.random.default_rng((seed, number, len(key))) for number in numbers]
        values = [r.normal(mean, spread, (channels[key], size, size)) for r in rng]
        made[key] = RasterImage(torch.tensor(np.stack(values, 1), dtype=torch.float32), [month(n) for n in numbers])
    return made


def features(model: torch.nn.Module, *inputs: dict[str, RasterImage]) -> torch.Tensor:
    with torch.no_grad():
        maps = model.eval()(ModelContext(inputs=list(inputs), metadatas=[])).feature_maps
    return maps[0]


@needs_shared
def test_without_gaps_galileo_is_rslearns():
    ours = Galileo(GalileoSize.NANO, patch_size=2, pretrained_path=str(WEIGHTS))
    theirs = GalileoModel(GalileoSize.NANO, patch_size=2, pretrained_path=str(WEIGHTS), autocast_dtype=None)
    # One patch with weather, as in the example, and four patches, of which rslearn pools the images alone.
    for size, keys in ((2, ("s1", "s2", "era5")), (4, ("s1", "s2"))):
        batch = [sample(dict.fromkeys(keys, (3, 4, 5)), seed=n, size=size) for n in range(2)]
        assert torch.allclose(features(ours, *batch), features(theirs, *batch), atol=1e-5)
    assert ours.get_backbone_channels() == [(2, 128)]


@needs_shared
def test_a_gap_in_one_sample_does_not_reach_another_and_months_matter():
    model = Galileo(GalileoSize.NANO, patch_size=1, pretrained_path=str(WEIGHTS))
    full = sample({"s1": (1, 2, 3, 4, 5), "s2": (1, 2, 3, 4, 5), "era5": (1, 2, 3, 4, 5)}, seed=1)
    gappy = sample({"s1": (2, 5), "s2": (2, 3)}, seed=2)
    alone = features(model, gappy)
    assert torch.allclose(features(model, full, gappy)[1:], alone, atol=1e-5)
    assert torch.allclose(features(model, full, gappy)[:1], features(model, full), atol=1e-5)
    later = {
        key: RasterImage(image.image, [month(n + 5) for n in (2, 5)]) for key, image in gappy.items() if key == "s1"
    }
    assert not torch.allclose(features(model, {**gappy, **later}), alone, atol=1e-3)


@needs_shared
def test_galileos_mistakes_are_told():
    with pytest.raises(CheckpointError, match=r"models/nano/config\.json"):
        Galileo(GalileoSize.NANO, pretrained_path="nowhere")
    model = Galileo(GalileoSize.NANO, pretrained_path=str(WEIGHTS))
    with pytest.raises(DataError, match="none of Galileo's inputs"):
        features(model, {"sentinel2_l2a": RasterImage(torch.zeros(10, 1, 1, 1))})
    with pytest.raises(DataError, match="no timestamps"):
        features(model, {"s2": RasterImage(torch.zeros(10, 1, 1, 1))})


def test_class_weights_make_rare_classes_count():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    targets = [{"class": torch.tensor(c), "valid": torch.tensor(v)} for c, v in ((0, 1.0), (1, 1.0), (1, 0.0))]
    context = ModelContext(inputs=[], metadatas=[])
    plain = ClassificationHead()(FeatureVector(logits[:2]), context, targets[:2]).loss_dict["cls"]
    even = WeightedClassificationHead([1.0, 1.0])(FeatureVector(logits), context, targets)
    rare = WeightedClassificationHead([1.0, 9.0])(FeatureVector(logits), context, targets)
    first, second = torch.nn.functional.cross_entropy(logits[:2], torch.tensor([0, 1]), reduction="none")
    assert even.loss_dict["cls"].item() == pytest.approx(plain.item())
    assert rare.loss_dict["cls"].item() == pytest.approx(((first + 9 * second) / 10).item())
    assert torch.equal(even.outputs, torch.softmax(logits, dim=1))
    for weights, message in (([1.0, 1.0, 1.0], "3 weights for 2 classes"), ([1.0, 0.0], "positive")):
        with pytest.raises(ConfigError, match=message):
            WeightedClassificationHead(weights)(FeatureVector(logits), context, targets)


def test_reading_does_not_parse_the_format_of_the_labels_anew(tmp_path, monkeypatch):
    points.write_points_dataset(tmp_path / "d", [pixel(points, "a")])
    module = RslearnDataModule(inputs={}, task=RegressionTask("moisture"), path=str(tmp_path / "d"))
    dataset = pickle.loads(pickle.dumps(open_dataset("d", module)))
    layer = dataset.layers["label"]
    assert isinstance(layer.instantiate_vector_format(), GeojsonVectorFormat)
    assert layer.instantiate_vector_format() is layer.instantiate_vector_format()


def every(step: int, source: Path, target: Path) -> Path:
    """The published fuel moisture arrays, cut down to every n-th row."""
    target.mkdir()
    for path in source.glob("*.npy"):
        np.save(target / path.name, np.load(path, allow_pickle=False)[::step])
    shutil.copy(source / "single_file_labels.geojson", target)
    return target


def fewer(source: Path, target: Path) -> Path:
    """The published crop type points with a fifth of the commonest crop."""
    target.mkdir()
    name = "test_public_extractions.parquet"
    table = pd.read_parquet(source / name)
    common = table["sampling_label"] == "sorghum"
    pd.concat([table[common][::5], table[~common]]).to_parquet(target / name)
    return target


def python(*words: str, cwd: Path, prefix: Path) -> str:
    environment = {**os.environ, "RSLP_PREFIX": str(prefix), "OMP_NUM_THREADS": "1"}
    done = children.run([sys.executable, *words], cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_shared
@pytest.mark.parametrize(
    ("name", "weights"),
    [("joint", WEIGHTS), pytest.param("joint_presto", SHARED / "presto", marks=pytest.mark.slow)],
)
def test_real_points_from_arrays_to_metrics(tmp_path, name, weights):
    fuel = every(40, SHARED / "fuel-moisture", tmp_path / "fuel")
    crops = fewer(SHARED / "worldcereal-points", tmp_path / "crops")
    folder = tmp_path / "real_points"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("datasets", "runs", "OUT_*", "__pycache__"))
    python(
        *("convert.py", "--output", "datasets", "--fuel_moisture", str(fuel), "--crop_type", str(crops)),
        cwd=folder,
        prefix=tmp_path,
    )
    windows = Dataset(UPath(folder / "datasets" / "fuel_moisture")).load_windows()
    of_split = {name: [w for w in windows if w.options["split"] == name] for name in ("train", "val", "test")}
    train, val, test = ({window.options["site"] for window in found} for found in of_split.values())
    assert train and val and test
    assert not (train | val) & test
    assert not train & val
    config = yaml.safe_load((folder / f"{name}.yaml").read_text())
    config["helios_checkpoint_path"] = str(weights.resolve())
    config["global_overrides"] = {
        **config.get("global_overrides", {}),
        "trainer": {"max_epochs": 1},
        "data": {"init_args": {"num_workers": 0, "steps_per_epoch": 4}},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    python(str(ROOT / "make_multidataset_config.py"), "--cfg", str(folder / f"{name}.yaml"), cwd=ROOT, prefix=tmp_path)
    launch = ["-m", "rslp.main", "helios", "launch_finetune", f"--config_paths+={folder / f'OUT_{name}.yaml'}"]
    launch += ["--rslp_project", "p", "--experiment_id", "e", "--local", "true"]
    python(*launch, cwd=ROOT, prefix=tmp_path)
    python(*launch, "--do_eval", "true", cwd=ROOT, prefix=tmp_path)
    report = json.loads((tmp_path / "projects/p/e/eval/test.json").read_text())
    primary = {row["dataset"]: row for row in report["rows"] if row["primary"]}
    assert {name: row["metric"] for name, row in primary.items()} == {
        "crop_type": "balanced_accuracy",
        "fuel_moisture": "r2",
    }
    assert primary["crop_type"]["n"] > 40
    assert primary["crop_type"]["floor"] == 0.25
    assert primary["fuel_moisture"]["n"] == len(of_split["test"])
