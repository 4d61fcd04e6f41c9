"""A run that an earlier commit began, and left inside its third epoch, is gone on with, evaluated and predicted from.

``kept.tar.gz`` holds its directory, its datasets with the caches that were filled then, and its encoder; ``make.py``
has made it. Paths were absolute then: where it is unpacked, they are put back in place of a word.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import tarfile
from pathlib import Path

import pytest

from rslp.evaluate.rows import Evaluation
from rslp.rundir import RunDir
from rslp.train.checkpoints import read_checkpoint
from tests import children
from tests.old_run.make import EPOCHS, FOLDER, KEPT, RUN

LAUNCH = ("launch_finetune", "--config_paths+=OUT_multi.yaml", "--rslp_project", "old", "--experiment_id", "joint")
LAUNCH += ("--local", "true")
Rows = dict[tuple[int, str], float]


def rslp(place: Path, *words: str) -> tuple[str, str]:
    """What a command line that succeeds writes to its two streams."""
    # The test runner's handlers would keep to themselves what is logged.
    handlers, logging.root.handlers = logging.root.handlers, []
    try:
        done = children.rslp("helios", *words, cwd=place, environment={"OLD_RUN": str(place)})
    finally:
        logging.root.handlers = handlers
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def logged(path: Path) -> Rows:
    """What a ``metrics.csv`` holds, by step and name."""
    with path.open(newline="") as handle:
        return {(int(row["step"]), row["name"]): float(row["value"]) for row in csv.DictReader(handle)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder as the earlier commit left it."""
    place = tmp_path / "old"
    with tarfile.open(KEPT) as archive:
        # Python before 3.11.4 knows no filters.
        archive.extractall(place, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    for path in place.rglob("*"):
        if path.suffix in (".json", ".yaml"):
            path.write_text(path.read_text().replace(FOLDER, str(place)))
    return place


@pytest.fixture
def old(place: Path) -> tuple[Rows, dict[str, Evaluation]]:
    """What it had logged and evaluated."""
    run = RunDir(place / RUN)
    assert run.read_state()["state"] == "preempted" and run.read_state()["epoch"] == 2
    return logged(run.metrics), {s: Evaluation.parse(run.evaluation(s).read_text()) for s in ("val", "test")}


def test_evaluations_of_that_time_are_read(old: tuple[Rows, dict[str, Evaluation]]) -> None:
    for split, evaluation in old[1].items():
        assert evaluation.split == split and evaluation.score is not None and evaluation.bad_samples == ()
        assert {row.dataset for row in evaluation.rows} == {"crop", "water"}


def test_its_best_checkpoint_is_evaluated_as_it_was(place: Path, old: tuple[Rows, dict[str, Evaluation]]) -> None:
    said, notes = rslp(place, *LAUNCH, "--do_eval", "true")
    # The caches that it filled are of another format: one line for each dataset, and they are filled anew.
    assert len(re.findall(r"listed again: it is of another format", notes)) == 2, notes
    for split, before in old[1].items():
        now = Evaluation.parse(RunDir(place / RUN).evaluation(split).read_text())
        assert (now.checkpoint_sha256, now.step) == (before.checkpoint_sha256, before.step)
        assert now.score == pytest.approx(before.score, abs=1e-5)
        primary = [{(row.dataset, row.metric): row.value for row in e.rows if row.primary} for e in (before, now)]
        assert primary[1] == pytest.approx(primary[0], abs=1e-5)
    assert "crop" in said and "water" in said


def test_it_predicts_what_it_predicted(place: Path, old: tuple[Rows, dict[str, Evaluation]]) -> None:
    predictions = RunDir(place / RUN).predictions
    before = {path.relative_to(predictions): path.stat().st_mtime_ns for path in predictions.rglob("*.*")}
    labels = {path: json.loads((predictions / path).read_text()) for path in before if path.suffix == ".geojson"}
    assert len(before) == 8 and len(labels) == 4
    rslp(place, *LAUNCH, "--mode", "predict")
    after = {path.relative_to(predictions): path.stat().st_mtime_ns for path in predictions.rglob("*.*")}
    assert after.keys() == before.keys()
    assert all(after[path] != before[path] for path in before)
    for path, content in labels.items():
        features = [json.loads((predictions / path).read_text())["features"], content["features"]]
        assert [[f["properties"]["crop"] for f in found] for found in features] == [
            [features[1][0]["properties"]["crop"]]
        ] * 2


def test_it_goes_on_where_it_stopped_and_ends_as_it_would_have(
    place: Path, old: tuple[Rows, dict[str, Evaluation]]
) -> None:
    run, (before, _) = RunDir(place / RUN), old
    step = run.read_state()["step"]
    # The check would refuse the window that can't be read, as it did then.
    _, notes = rslp(place, *LAUNCH, "--check", "false")
    assert notes.count("going on from") == 1
    assert f"{run.last} (epoch 2, step {step})" in notes
    for dataset in ("crop", "water"):
        assert f"encoding 15 samples of {dataset} train once" in notes
    # The sample that can't be used was counted before.
    assert f"done: {EPOCHS} epochs, {EPOCHS * 8} steps, without 1 train samples that can't be used" in notes
    done = run.done()
    assert done is not None and (done["epoch"], done["step"]) == (EPOCHS, EPOCHS * 8)

    now = logged(run.metrics)
    kept = {key: value for key, value in before.items() if key[0] < step}
    assert kept == {key: value for key, value in now.items() if key in kept}
    # The earlier commit itself, without an interruption; where gradients are nothing but rounding, so are cosines.
    whole = {key: value for key, value in logged(place / "whole.csv").items() if key[1] != "train/gradient_cosine"}
    assert {key for key in now if key[1] != "train/gradient_cosine"} >= whole.keys()
    losses = {key: value for key, value in whole.items() if re.match(r"lr-|(.*[_/](loss|cls)$)", key[1])}
    assert {key: now[key] for key in losses} == pytest.approx(losses, rel=5e-3, abs=5e-4)
    (scheduler,) = read_checkpoint(run.last)["lr_schedulers"]
    assert scheduler["last_epoch"] == EPOCHS
    listed, _ = rslp(place, "jobs", "--rslp_project", "old")
    assert re.search(r"joint +local +\S+ .*succeeded", listed), listed
