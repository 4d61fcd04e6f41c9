"""Arms without encoder: the constant is the floor, the forest is scikit-learn's, on the very same samples."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import balanced_accuracy_score

from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import ConfigError
from rslp.evaluate.predictions import read_predictions
from rslp.io import read_yaml
from rslp.rundir import RunDir
from rslp.study.baselines import run_baseline
from rslp.study.config import read_study
from rslp.study.others import read_others
from rslp.study.plan import StudyPlan
from rslp.train.build import build_data
from tests.study.small import folder_of, write_study
from tests.tiny import four_datasets, run_config, write_dataset, write_run

SIZES = {"train": 20, "val": 10, "test": 10}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("baselines")
    return write_run(folder, {**run_config(four_datasets(folder, **SIZES)), "seed": 3})


def test_the_constant_is_the_floor(run: RunDir) -> None:
    for evaluation in run_baseline(run, "constant"):
        primary = {row.dataset: row for row in evaluation.rows if row.primary}
        assert set(primary) == {"classify", "segment", "regress", "detect"}
        assert all(row.value == row.floor for row in primary.values())
        assert evaluation.score == 0 and run.evaluation(evaluation.split, "constant").exists()
        # Of what a comparison resamples, each window's prediction is there.
        file = run.evaluation(evaluation.split, "constant").with_suffix(".parquet")
        predictions = read_predictions(file, checkpoint_sha256="")
        assert {key[0]: len(one.samples) for key, one in predictions.items()} == dict.fromkeys(primary, 10)
        assert all(row.interval == "window" for row in primary.values())


def test_a_forest_of_objects_alone_leaves_rows_alone(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", "detect", train=2, val=1, test=1)
    run = write_run(tmp_path, run_config({"detect": (str(data), "detect")}))
    assert [evaluation.rows for evaluation in run_baseline(run, "random_forest")] == [(), ()]
    assert not list((run.path / "eval").rglob("*.parquet"))


def test_the_forest_is_scikit_learns(run: RunDir) -> None:
    _, test = run_baseline(run, "random_forest")
    primary = {row.dataset: row for row in test.rows if row.primary}
    assert set(primary) == {"classify", "segment", "regress"}, "detection has no forest"
    assert all(row.value > row.floor + 0.3 for row in primary.values()), primary
    document = read_yaml(run.config)
    data: MultiDatasetDataModule = build_data(document.data, document)
    features, labels = zip(*(_windows(data, split) for split in ("train", "test")), strict=True)
    forest = RandomForestClassifier(200, random_state=3).fit(features[0], labels[0])
    assert primary["classify"].value == pytest.approx(balanced_accuracy_score(labels[1], forest.predict(features[1])))


def _windows(data: MultiDatasetDataModule, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Middle pixel and mean of each image, and its class."""
    source = data.sources(split)["classify"]
    samples = [source.sample(i) for i in range(len(source))]
    images = np.stack([inputs["image"].image[:, 0].numpy() for inputs, _, _ in samples])
    labels = np.array([int(targets["classify"]["class"]) for _, targets, _ in samples])
    return np.concatenate([images[:, :, 4, 4], images.mean(axis=(2, 3))], axis=1), labels


def test_rows_of_others(tmp_path: Path) -> None:
    plan = StudyPlan.of(read_study(write_study(tmp_path, others="published.csv")), str(tmp_path / "runs"))
    rows = folder_of(tmp_path) / "rows" / "study.joint.s0"
    rows.mkdir(parents=True)
    own = write_run(tmp_path / "own", run_config({"classes": (str(tmp_path / "classes"), "classify")}))
    run_baseline(own, "constant")
    (rows / "test.json").write_text(own.evaluation("test", "constant").read_text())
    with (tmp_path / "published.csv").open("w", newline="") as stream:
        write = csv.writer(stream)
        write.writerow(["arm", "dataset", "task", "value", "seed", "low", "high"])
        write.writerow(["theirs", "classes", "classes", "0.75", "", "0.7", "0.8"])
    (result,) = read_others(plan)
    assert (result.arm, result.seed) == ("theirs", 0)
    (row,) = json.loads(result.evaluations[0].read_text())["rows"]
    assert (row["value"], row["low"], row["high"], row["primary"]) == (0.75, 0.7, 0.8, True)
    assert row["metric"] == "balanced_accuracy"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm,dataset,value\n", "published.csv:1: has no column 'task'; needed: arm, dataset, task, value"),
        ("arm,dataset,task,value\nx,classes,classes,much\n", "published.csv:2: value is 'much', no number"),
        ("arm,dataset,task,value\nx,fields,fields,1\n", "published.csv:2: the study has no task fields/fields"),
        ("arm,dataset,task,value\nx,classes,classes,nan\n", "published.csv:2: value is 'nan', no number"),
        ("arm,dataset,task,value\nx,classes,classes,\n", "published.csv:2: has no value"),
        ("arm,dataset,task,value,seed\nx,classes,classes,1,0.5\n", "published.csv:2: seed is '0.5', no whole number"),
        ("arm,dataset,task,value\njoint,classes,classes,1\n", "published.csv:2: the arm 'joint' is the study's own"),
        (2 * "x,classes,classes,1\n", "published.csv:1: has no column 'arm'"),
        ("\ufeffarm,dataset,task,value\n" + 2 * "x,classes,classes,1\n", "published.csv:3: is of the arm, seed, task"),
        (None, "published.csv: can't be read: No such file or directory"),
    ],
)
def test_mistakes_in_a_csv(tmp_path: Path, text: str | None, message: str) -> None:
    path = write_study(tmp_path, others="published.csv", sizes={"train": 1, "val": 1, "test": 1})
    rows = tmp_path / "runs" / "studies" / "studies" / "study" / "rows" / "study.joint.s0"
    rows.mkdir(parents=True)
    row = {"dataset": "classes", "task": "classes", "metric": "m", "value": 1, "n": 1, "floor": 0, "class": None}
    row |= {"higher_is_better": True, "primary": True}
    head = {"schema": 2, "run": "", "split": "test", "checkpoint": "", "checkpoint_sha256": "", "step": 0}
    head |= {"commit": None, "data_fingerprint": "", "score": 0, "bad_samples": [], "rows": [row]}
    (rows / "test.json").write_text(json.dumps(head))
    if text is not None:
        (tmp_path / "published.csv").write_text(text)
    plan = StudyPlan.of(read_study(path), str(tmp_path / "runs"))
    with pytest.raises(ConfigError) as error:
        read_others(plan)
    assert str(error.value).endswith(message) or message in str(error.value)


def test_the_forest_of_a_config_with_gaps_takes_quantiles() -> None:
    from rslp.study.baselines import _features, _layout

    rng = np.random.default_rng(0)
    series = [{"a": rng.random((2, dates, 4, 4), dtype=np.float32)} for dates in (3, 5)]
    layout = _layout(series)
    assert layout == {"a": (2, None)}
    first = _features(series[0], layout, ())
    assert first.shape == (1, 2 * 2 * 5)
    assert first[0, 0] == series[0]["a"][0, :, 2, 2].min()
    dense = _features(series[1], layout, (8, 8))
    assert dense.shape == (64, 10) and dense[0, 0] == series[1]["a"][0, :, 0, 0].min()
    assert np.isnan(_features({}, layout, ())).all()
