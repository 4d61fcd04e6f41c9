"""The predictions of an evaluation: the metrics of the rows follow from them, by scikit-learn; rows have intervals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sklearn

from rslp.errors import RunError
from rslp.evaluate.evaluation import evaluate
from rslp.evaluate.predictions import _COLUMNS, read_predictions, write_predictions
from rslp.evaluate.table import print_table
from rslp.main import main
from rslp.rundir import RunDir, is_metadata
from rslp.train.fit import fit
from tests.tiny import four_datasets, run_config, write_run
from tests.train.test_recording import evaluated, some

WINDOWS = 16
SPLIT = "test"


def config_of(data: dict[str, tuple[str, str]], **options: Any) -> dict[str, Any]:
    config = run_config(data, **options)
    tasks = config["model"]["init_args"]["task"]["init_args"]["tasks"]
    more: dict[str, dict[str, Any]] = {
        "classify": {"enable_f1_metric": True, "enable_auroc": True},
        "segment": {"enable_miou_metric": True, "class_names": ["dark", "bright"], "report_metric_per_class": True},
        "regress": {"metrics": ["mse", "l1", "r2"]},
        "detect": {"enable_f1_metric": True},
    }
    for name, entry in config["data"]["init_args"]["data_modules"].items():
        for parts in (tasks, entry["init_args"]["task"]["init_args"]["tasks"]):
            parts[name]["init_args"] |= more[name]
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    return four_datasets(tmp_path_factory.mktemp("data"), train=6, val=4, test=WINDOWS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: dict[str, tuple[str, str]]) -> RunDir:
    run = write_run(tmp_path_factory.mktemp("run"), config_of(data, epochs=3))
    assert fit(run) == 0
    evaluate(run, splits=("val", SPLIT))
    return run


@pytest.fixture(scope="module")
def rows(run: RunDir) -> dict[tuple[str, str], dict[str, Any]]:
    content = json.loads(run.evaluation(SPLIT, "best").read_text())
    return {(row["dataset"], row["metric"]): row for row in content["rows"]}


@pytest.fixture(scope="module")
def table(run: RunDir) -> pd.DataFrame:
    return pq.read_table(run.evaluation(SPLIT, "best").with_suffix(".parquet")).to_pandas()


def test_each_sample_of_each_task_has_a_row_with_its_place(table: pd.DataFrame) -> None:
    assert set(table["kind"]) == {"classification", "segmentation", "regression", "detection"}
    for dataset, part in table.groupby("dataset"):
        assert len(part) == WINDOWS == part["window"].nunique(), dataset
        assert (part["x1"] - part["x0"]).tolist() == [8] * WINDOWS
        assert part["lon"].between(-2, 3).all() and part["lat"].between(-0.1, 0.1).all()


def test_classification_is_what_scikit_learn_finds(table: pd.DataFrame, rows: dict[Any, Any]) -> None:
    part = table[table["dataset"] == "classify"]
    labels, scores = part["label"].astype(int), np.stack(part["probabilities"])
    chosen = scores.argmax(axis=1)
    expected = {
        "balanced_accuracy": sklearn.balanced_accuracy_score(labels, chosen),
        "auroc": sklearn.roc_auc_score(labels, scores[:, 1]),
        "high_recall": sklearn.recall_score(labels, chosen, zero_division=0),
        "low_f1": sklearn.f1_score(labels, chosen, pos_label=0, zero_division=0),
    }
    for name, value in expected.items():
        assert rows["classify", name]["value"] == pytest.approx(value, abs=1e-6), name
    assert rows["classify", "high_recall"]["class"] == "high" and rows["classify", "low_f1"]["class"] == "low"
    assert rows["classify", "balanced_accuracy"]["class"] is None


def test_segmentation_is_what_scikit_learn_finds(table: pd.DataFrame, rows: dict[Any, Any]) -> None:
    part = table[table["dataset"] == "segment"]
    label, predicted, pixels = (
        np.concatenate(part[f"confusion_{name}"].tolist()) for name in ("label", "predicted", "pixels")
    )
    assert pixels.sum() == WINDOWS * 64
    iou = sklearn.jaccard_score(label, predicted, average=None, sample_weight=pixels, labels=[0, 1], zero_division=0)
    assert rows["segment", "miou"]["value"] == pytest.approx(iou.mean())
    for name, value in zip(("dark", "bright"), iou, strict=True):
        row = rows["segment", f"{name}_mean_iou"]
        assert row["value"] == pytest.approx(value) and row["class"] == name
    assert rows["segment", "avg_mean_iou"]["class"] is None


def test_regression_is_what_scikit_learn_finds(table: pd.DataFrame, rows: dict[Any, Any]) -> None:
    part = table[table["dataset"] == "regress"]
    truth, guess = part["target"], part["value"]
    for name, function in (
        ("r2", sklearn.r2_score),
        ("mse", sklearn.mean_squared_error),
        ("l1", sklearn.mean_absolute_error),
    ):
        assert rows["regress", name]["value"] == pytest.approx(function(truth, guess), rel=1e-6), name


def made(kind: str, folder: Path, count: int = 40) -> tuple[pd.DataFrame, dict[str, float | None]]:
    """The predictions of made up outputs, and the values of all metrics."""
    _, result = evaluated(kind, some(kind, count))
    assert result.records is not None
    write_predictions(folder / "test.parquet", {("d", "t"): result.records}, checkpoint_sha256="0")
    return pq.read_table(folder / "test.parquet").to_pandas(), dict(result.values)


def test_detection_is_what_scikit_learn_finds(tmp_path: Path) -> None:
    """Average precision from the scores and matches; the matches once more, by assignment."""
    table, values = made("detection", tmp_path)
    hits, scores = (np.concatenate(table[name].tolist()) for name in ("state_hits", "scores"))
    objects = sum(map(len, table["true_boxes"]))
    precision, recall, _ = sklearn.precision_recall_curve(hits, scores)
    # From the highest recall on; precision at a recall is the highest at that recall or above.
    steps = -np.diff(recall) * hits.sum() / objects
    expected = float((steps * np.maximum.accumulate(precision[:-1])).sum())
    assert 0 < expected < 1
    assert values["average_precision"] == pytest.approx(expected)
    found = 0
    for _, row in table.iterrows():
        boxes, truth = (np.stack(row[name]) if len(row[name]) else np.zeros((0, 4)) for name in ("boxes", "true_boxes"))
        fits = (_iou(boxes, truth) >= 0.5) & (row["labels"][:, None] == row["true_labels"][None, :])
        found += int(fits[linear_sum_assignment(~fits)].sum())
    assert hits.sum() == found > 0


def test_per_pixel_regression_follows_from_its_sums(tmp_path: Path) -> None:
    table, values = made("per-pixel regression", tmp_path)
    pixels, errors = table["pixels"].sum(), table["squared_error"].sum()
    mean = (table["pixels"] * table["target_mean"]).sum() / pixels
    spread = (table["target_squares"] + table["pixels"] * (table["target_mean"] - mean) ** 2).sum()
    assert values["mse"] == pytest.approx(errors / pixels)
    assert values["l1"] == pytest.approx(table["absolute_error"].sum() / pixels)
    assert values["r2"] == pytest.approx(1 - errors / spread)


def _iou(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.asarray(shared / np.maximum(union, 1e-9))


def test_rows_have_intervals_around_their_values(rows: dict[Any, Any]) -> None:
    # Some metric of each kind varies over windows.
    for dataset, metric in (("classify", "auroc"), ("segment", "miou"), ("regress", "mse")):
        row = rows[dataset, metric]
        assert row["interval"] == "window" and row["low"] <= row["value"] <= row["high"]
    assert rows["regress", "mse"]["low"] < rows["regress", "mse"]["high"]
    assert rows["detect", "f1_score"]["interval"] == "window"
    for row in rows.values():
        assert (row["low"] is None) == (row["high"] is None) == (row["interval"] is None)
    assert "f1_threshold" not in {metric for _, metric in rows if rows[_, metric]["interval"]}


def test_intervals_are_those_of_resampled_windows(table: pd.DataFrame, rows: dict[Any, Any]) -> None:
    part = table[table["dataset"] == "regress"]
    errors = ((part["target"] - part["value"]) ** 2).to_numpy()
    means = errors[np.random.default_rng(0).integers(0, WINDOWS, (4000, WINDOWS))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    row = rows["regress", "mse"]
    assert (row["low"], row["high"]) == pytest.approx((low, high), rel=0.15)


@pytest.mark.slow
def test_two_evaluations_are_the_same(run: RunDir) -> None:
    file = run.evaluation(SPLIT, "best")
    before = file.read_text(), file.with_suffix(".parquet").read_bytes()
    evaluate(run, splits=(SPLIT,))
    assert (file.read_text(), file.with_suffix(".parquet").read_bytes()) == before


def test_predictions_of_another_checkpoint_are_refused(run: RunDir) -> None:
    file = run.evaluation(SPLIT, "best").with_suffix(".parquet")
    digest = json.loads(run.evaluation(SPLIT, "best").read_text())["checkpoint_sha256"]
    assert set(read_predictions(file, checkpoint_sha256=digest)) == {(k, k) for k in four}
    with pytest.raises(RunError, match="is of another checkpoint than the rows beside it"):
        read_predictions(file, checkpoint_sha256="0")


four = ("classify", "segment", "regress", "detect")


def test_crops_of_a_window_are_samples_and_of_a_detector_one(tmp_path: Path, data: dict[str, tuple[str, str]]) -> None:
    kinds = {name: data[name] for name in ("segment", "detect")}
    config = run_config(kinds, epochs=1)
    for entry in config["data"]["init_args"]["data_modules"].values():
        entry["init_args"]["test_config"] |= {"crop_size": 4, "load_all_crops": True}
    run = write_run(tmp_path, config)
    assert fit(run) == 0
    (evaluation,) = evaluate(run, splits=("test",))
    table = pq.read_table(run.evaluation("test", "best").with_suffix(".parquet")).to_pandas()
    assert table.groupby("dataset").size().to_dict() == {"segment": 4 * WINDOWS, "detect": WINDOWS}
    assert set((table["x1"] - table["x0"])[table["dataset"] == "segment"]) == {4}
    assert {row.n for row in evaluation.rows} == {WINDOWS}
    assert all(row.interval == "window" for row in evaluation.rows if row.metric == "miou")


def test_each_datasets_own_best_checkpoint_stands_beside(tmp_path: Path, run: RunDir, capfd: Any) -> None:
    """Where it is of another step, the table has a line for it."""
    mine = RunDir(tmp_path / "projects" / "tests" / "own")
    shutil.copytree(run.path, mine.path)
    shutil.copy(mine.last, mine.best("regress"))
    content = torch.load(mine.best("regress"), weights_only=False)
    content["global_step"] += 1
    torch.save(content, mine.best("regress"))
    for name in ("classify", "segment", "detect"):
        shutil.copy(mine.best(), mine.best(name))
    evaluations = evaluate(mine, splits=("val",), own_best=True)
    assert [(e.split, Path(e.checkpoint).stem) for e in evaluations] == [("val", "best"), ("val", "best-regress")]
    own = evaluations[1]
    assert {row.dataset for row in own.rows} == {"regress"} and set(own.data_fingerprints) == {"regress"}
    assert {row.dataset for row in evaluations[0].rows} == set(four)
    file = mine.evaluation("val", "best-regress")
    assert file.exists() and file.with_suffix(".parquet").exists()
    print_table(evaluations[:1], own=evaluations[1:])
    text = capfd.readouterr().out
    assert "own best" in text and "…" not in text
    lines = text.splitlines()
    [number] = [i for i, line in enumerate(lines) if line.split()[:1] == ["regress"]]
    r2 = [next(row.value for row in e.rows if row.primary and row.dataset == "regress") for e in evaluations]
    for value, line in zip(r2, lines[number:], strict=False):
        assert f"{value:.3f}" in line, text
    assert text.count("own best") == 2, "one line, and the caption"


def test_a_wrong_checkpoint_lists_what_there_is(run: RunDir) -> None:
    (evaluation,) = evaluate(run, splits=("val",), checkpoint="last")
    assert evaluation.checkpoint == "checkpoints/last.ckpt"
    with pytest.raises(RunError, match=r"no checkpoint worst\.ckpt in .*: the run has best-.*, best\.ckpt, last\.ckpt"):
        evaluate(run, splits=("val",), checkpoint="worst")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, data: dict[str, tuple[str, str]], run: RunDir) -> tuple[str, str]:
    """Two runs, of all datasets and of two of them."""
    small = {name: data[name] for name in ("classify", "regress")}
    other = write_run(tmp_path_factory.mktemp("other"), config_of(small, epochs=1))
    assert fit(other) == 0
    evaluate(other, splits=(SPLIT,))
    target = other.path.parent / "small"
    other.path.rename(target)
    return str(run.path), str(target)


def test_two_runs_are_compared_in_what_they_share(pair: tuple[str, str], capfd: Any, tmp_path: Path) -> None:
    output = tmp_path / "comparison.json"
    words = ["helios", "compare", "--run", pair[0], "--run", pair[1], "--output", str(output)]
    assert main(words) == 0
    text = capfd.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "differences are to tiny" in text and "Of one seed it is not known how much seeds differ" in " ".join(
        text.split()
    )
    found = json.loads(output.read_text())
    assert {task["dataset"]: sorted(task["differences"]) for task in found["tasks"]} == {
        "classify": ["small"], "detect": [], "regress": ["small"], "segment": [],
    }  # fmt: skip
    assert all(one["over"] == "windows" for task in found["tasks"] for one in task["differences"].values())


def test_runs_that_cannot_be_compared_are_one_line(pair: tuple[str, str], capfd: Any, tmp_path: Path) -> None:
    def changed(name: str, *removed: str) -> str:
        copied = tmp_path / "projects" / "tests" / name
        shutil.copytree(pair[1], copied)
        for file in removed:
            (copied / file).unlink()
        return str(copied)

    for other, words in (
        (str(tmp_path / "no/such/run"), "there is no run at"),
        ("tests/nowhere", "there is no run at"),
        (changed("unfinished", "DONE.json"), "is not finished: launch it again"),
        (
            changed("raw", "eval/best/test.json"),
            "has no evaluation best/test (it has none): launch it with --do_eval true",
        ),
        (
            changed("bare", "eval/best/test.parquet"),
            "was evaluated without predictions: launch it with --do_eval true again",
        ),
        (pair[1], "--run names tests/small twice"),
    ):
        assert main(["helios", "compare", "--run", pair[1], "--run", other]) == 2
        error = capfd.readouterr().err
        assert words in error and error.count("\n") == 1 and error.startswith("error: ")
    for output in (tmp_path, tmp_path / "config.yaml" / "below"):
        (tmp_path / "config.yaml").touch()
        assert main(["helios", "compare", "--run", pair[0], "--run", pair[1], "--output", str(output)]) == 2
        assert f"error: --output {output} can't be written: " in capfd.readouterr().err
    assert main(["helios", "compare", "--run", pair[0]]) == 2
    assert "at least twice" in capfd.readouterr().err


def test_a_run_on_other_data_is_refused(
    pair: tuple[str, str], data: dict[str, tuple[str, str]], tmp_path: Path, capfd: Any
) -> None:
    config = config_of({"classify": data["classify"]}, epochs=1)
    module = config["data"]["init_args"]["data_modules"]["classify"]["init_args"]
    # The same dataset, evaluated on another split of it.
    module["test_config"] = {"tags": {"split": "val"}}
    run = write_run(tmp_path, config)
    assert fit(run) == 0
    evaluate(run, splits=("test",))
    capfd.readouterr()
    assert main(["helios", "compare", "--run", pair[1], "--run", str(run.path)]) == 2
    error = capfd.readouterr().err
    assert (
        "classify: arm 'tiny', seed 0 was evaluated on other samples than arm 'small', seed 0: 4 and 16 windows"
        in error
    )
    assert error.count("\n") == 1


PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_page_names_all_columns(table: pd.DataFrame) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `dataset`") or line.startswith("| `group`")]
    part = PAGE[PAGE.index(rows[0]) : PAGE.index("Columns `state_")]
    named = [name for line in part.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1] if line else "")]
    assert named == list(_COLUMNS)
    assert set(table.columns) - set(named) == {name for name in table.columns if name.startswith("state_")}


def test_the_page_reads_predictions(
    run: RunDir, rows: dict[Any, Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(run.path)
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block.replace('"crops"', '"classify"'), "docs/evaluation.md", "exec"), {})
    assert float(capfd.readouterr().out) == pytest.approx(rows["classify", "balanced_accuracy"]["value"])


def test_a_comparison_of_runs_on_an_object_store_fetches_predictions() -> None:
    assert is_metadata("eval/best/test.parquet") and is_metadata("eval/best-crops/test.json")
    assert not is_metadata("predictions/crops/test.parquet")
