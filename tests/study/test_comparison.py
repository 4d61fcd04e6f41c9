"""Comparisons: what differs is found, what does not is not, and what can't be compared is one line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rslp.errors import RunError
from rslp.study.comparison import ArmResult, Cost, compare, comparison_table
from rslp.study.table import NO_EVIDENCE
from tests.study.made import arm, write_evaluation

SINGLE = {"crops": 0.6, "trees": 0.7, "water": 0.5}
JOINT = {"crops": 0.8, "trees": 0.7, "water": 0.35}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[ArmResult]:
    folder = tmp_path_factory.mktemp("arms")
    return [*arm(folder, "single", SINGLE), *arm(folder, "joint", JOINT)]


@pytest.fixture(scope="module")
def comparison(results: list[ArmResult]) -> dict[str, Any]:
    return compare(results, reference="single", missing=[("joint", 3)])


def of(comparison: dict[str, Any], dataset: str) -> dict[str, Any]:
    [task] = [task for task in comparison["tasks"] if task["dataset"] == dataset]
    return dict(task)


def test_a_difference_is_found_where_there_is_one(comparison: dict[str, Any]) -> None:
    found = {dataset: of(comparison, dataset)["differences"]["joint"] for dataset in SINGLE}
    assert {dataset: one["verdict"] for dataset, one in found.items()} == {
        "crops": "better", "trees": NO_EVIDENCE, "water": "worse",
    }  # fmt: skip
    for dataset, one in found.items():
        assert one["low"] <= JOINT[dataset] - SINGLE[dataset] <= one["high"]
        assert one["over"] == "seeds and windows" and one["seeds"] == 3
        assert one["p"] <= one["p_holm"]
    assert comparison["comparisons"] == 3 and comparison["correction"] == "holm"


def test_the_value_of_an_arm_is_the_mean_over_seeds(comparison: dict[str, Any], results: list[ArmResult]) -> None:
    value = of(comparison, "crops")["arms"]["joint"]
    seeds = [json.loads(r.evaluations[0].read_text())["rows"] for r in results if r.arm == "joint"]
    expected = [next(row["value"] for row in rows if row["dataset"] == "crops" and row["primary"]) for rows in seeds]
    assert list(value["by_seed"].values()) == expected
    assert value["value"] == pytest.approx(sum(expected) / 3)
    assert value["low"] < value["value"] < value["high"] <= 1


def test_pairing_makes_intervals_narrower_than_those_of_the_values(comparison: dict[str, Any]) -> None:
    task = of(comparison, "trees")
    width = lambda one: one["high"] - one["low"]  # noqa: E731
    unpaired = math.hypot(*map(width, task["arms"].values()))
    assert width(task["differences"]["joint"]) < 0.7 * unpaired


def test_the_mean_relative_gain_is_that_of_the_values(comparison: dict[str, Any]) -> None:
    values = [of(comparison, dataset)["arms"] for dataset in SINGLE]
    expected = sum(v["joint"]["value"] / v["single"]["value"] - 1 for v in values) / 3 * 100
    gain = comparison["gains"]["joint"]
    assert gain["value"] == pytest.approx(expected)
    assert gain["low"] < expected < gain["high"] and (gain["tasks"], gain["left_out"]) == (3, [])


def test_costs_are_means_of_seeds(comparison: dict[str, Any]) -> None:
    assert comparison["cost"]["joint"] == pytest.approx(
        {"parameters": 1e6, "samples": 4800, "steps": 600, "seconds": 123.4}
    )


def test_the_table_fits_a_terminal_and_says_it_in_words(comparison: dict[str, Any]) -> None:
    text = comparison_table(comparison)
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "missing: joint seed 3",
        "better in 1 (crops) and worse in 1 (water)",
        "Holm's correction for 3 comparisons",
        f"{NO_EVIDENCE}; ",
        "mean relative gain",
        "1M parameters, 4800 samples, 600 steps, 123.4 seconds",
    ):
        assert words in " ".join(text.split()), text
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison
    assert comparison_table(json.loads(json.dumps(comparison))) == text


def test_an_arm_of_one_run_per_dataset_is_as_one_of_one_run(tmp_path: Path, results: list[ArmResult]) -> None:
    split = []
    for result in results[:3]:
        rows = json.loads(result.evaluations[0].read_text())
        files = []
        for dataset in SINGLE:
            folder = tmp_path / f"{dataset}{result.seed}"
            folder.mkdir()
            part = {**rows, "rows": [row for row in rows["rows"] if row["dataset"] == dataset]}
            (folder / "test.json").write_text(json.dumps(part))
            shutil.copy(result.evaluations[0].with_suffix(".parquet"), folder)
            files.append(folder / "test.json")
        split.append(replace(result, evaluations=tuple(files)))
    parts, whole = (compare([*single, *results[3:]], reference="single") for single in (split, results[:3]))
    assert parts == whole


def test_rows_alone_give_intervals_over_seeds(results: list[ArmResult], tmp_path: Path) -> None:
    bare = []
    for result in results:
        folder = tmp_path / result.arm / str(result.seed)
        folder.mkdir(parents=True)
        shutil.copy(result.evaluations[0], folder)
        bare.append(replace(result, evaluations=(folder / "test.json",)))
    found = compare(bare, reference="single")
    difference = of(found, "crops")["differences"]["joint"]
    assert difference["over"] == "seeds" and difference["low"] < 0.2 < difference["high"]
    text = comparison_table(found)
    assert "no predictions to resample" in text and "intervals over seeds" in text
    # One seed, and no predictions: nothing says how sure a difference is.
    file = write_evaluation(tmp_path / "one", {"crops": 0.8}, predictions=False, intervals=True)
    single = compare([bare[0], replace(bare[3], evaluations=(file,))], reference="single")
    task = of(single, "crops")
    assert task["differences"]["joint"]["low"] is None
    assert task["arms"]["joint"]["over"] == "windows", "the interval of the run's own evaluation"
    assert "a difference without an interval is not shown" in " ".join(comparison_table(single).split())
    assert single["comparisons"] == 1 and single["gains"]["joint"]["low"] is None
    assert "Delta-m" not in comparison_table(single), "a gain without an interval is not shown either"


def test_a_baseline_of_one_seed_stands_beside_each_seed(results: list[ArmResult], tmp_path: Path) -> None:
    constant = arm(tmp_path, "constant", dict.fromkeys(SINGLE, 0.5), seeds=1)
    found = of(compare([*results, *constant], reference="single"), "crops")["differences"]["constant"]
    assert found["seeds"] == 3 and found["verdict"] == "worse"
    unfinished = compare([*results, *constant], reference="single", missing=[("constant", 1)])
    assert of(unfinished, "crops")["differences"]["constant"]["seeds"] == 1


def test_pairs_and_leave_one_out_are_shown_as_what_they_are(results: list[ArmResult], tmp_path: Path) -> None:
    arms = [*arm(tmp_path, "pair:crops+water", {"crops": 0.75, "water": 0.4})]
    arms += arm(tmp_path, "without:water", {"crops": 0.7, "trees": 0.7})
    found = compare([*results, *arms], reference="single")
    transfer = {(cell["dataset"], cell["with"]): cell["value"] for cell in found["transfer"]}
    about = lambda value: pytest.approx(value, abs=0.05)  # noqa: E731
    assert transfer == {("crops", "water"): about(0.15), ("water", "crops"): about(-0.1)}
    influence = {(cell["dataset"], cell["of"]): cell["value"] for cell in found["influence"]}
    assert influence == {("crops", "water"): about(0.1), ("trees", "water"): about(0)}
    text = comparison_table(found)
    assert "crops with water: +0.1" in text and "crops of water: +0.1" in text
    assert max(map(len, text.splitlines())) <= 80


def test_results_that_cannot_be_compared_are_one_line(results: list[ArmResult], tmp_path: Path) -> None:
    fewer = write_evaluation(tmp_path / "fewer", JOINT, windows=100)
    bare = write_evaluation(tmp_path / "bare", JOINT, windows=100, predictions=False)
    gone = ArmResult("joint", 0, (tmp_path / "eval/best/test.json",))
    single = results[:3]
    torn = tmp_path / "torn"
    for name in ("json", "parquet", "other", "stale", "metric", "split"):
        shutil.copytree(results[3].evaluations[0].parent, torn / name)
    (torn / "json/test.json").write_text("{")
    (torn / "parquet/test.parquet").write_bytes(b"PAR1")
    shutil.copy(results[0].evaluations[0].with_suffix(".parquet"), torn / "other")
    for name, old, new in (
        ("stale", '"checkpoint_sha256": "sha"', '"checkpoint_sha256": "new"'),
        ("metric", '"balanced_accuracy"', '"accuracy"'),
        ("split", '"split": "test"', '"split": "val"'),
    ):
        file = torn / name / "test.json"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    for path, words in (
        (fewer, "was evaluated on other samples than arm 'single', seed 0: 100 and 150 windows"),
        (bare, "was evaluated on other samples"),
        (torn / "json/test.json", "damaged"),
        (torn / "parquet/test.json", "test.parquet is no file of predictions, or a damaged one"),
        (torn / "other/test.json", "the rows beside it"),
        (torn / "stale/test.json", "is of another checkpoint than the rows beside it"),
        (torn / "metric/test.json", "is measured by accuracy, arm 'single' by balanced_accuracy"),
        (torn / "split/test.json", "different splits"),
        (gone.evaluations[0], "does not exist"),
    ):
        if path == torn / "metric/test.json":
            path.with_suffix(".parquet").unlink()
        with pytest.raises(RunError) as caught:
            compare([*single, ArmResult("joint", 0, (path,))], reference="single")
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RunError, match="the reference arm 'best' has no finished run; there are: single"):
        compare(single, reference="best")
    with pytest.raises(RunError, match="has two evaluations of crops"):
        compare([*single, replace(single[0], cost=Cost())], reference="single")


def test_nothing_finished_is_an_empty_comparison() -> None:
    found = compare([], reference="single", missing=[("single", 0)])
    assert found["tasks"] == [] and "missing: single seed 0" in comparison_table(found)
