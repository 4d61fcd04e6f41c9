"""A split without one valid label: its task has no value, the run goes on, and it is said once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from lightning.pytorch import Callback, LightningModule, Trainer

from rslp.evaluate.evaluation import evaluate
from rslp.evaluate.table import print_table
from rslp.rundir import RunDir
from rslp.train.fit import fit
from tests.evaluate.test_prediction import label
from tests.tiny import KINDS, run_config, write_dataset, write_run
from tests.train.test_fit import logged

WINDOWS = ("w006", "w007", "w008")
TOLERANT = {
    "segment": {"nodata_value": 255},
    "classify": {"allow_invalid": True},
    "regress": {"allow_invalid": True},
    "detect": {"enable_f1_metric": True},
}


def without_labels(folder: Path, kind: str) -> tuple[str, str]:
    """A dataset whose validation windows have no label that the task takes."""
    path = write_dataset(folder / "data" / kind, kind)
    for window in WINDOWS:
        if kind == "segment":
            with rasterio.open(label(folder, kind, window), "r+") as raster:
                raster.write(np.full_like(raster.read(), 255))
        else:
            renamed = label(folder, kind, window)
            renamed.write_text(renamed.read_text().replace('"value"', '"another"'))
    return str(path), kind


def started(folder: Path, data: dict[str, tuple[str, str]], **trainer: Any) -> RunDir:
    config = run_config(data, epochs=2)
    for kind, options in TOLERANT.items():
        if kind in data:
            for place in (config["model"], config["data"]["init_args"]["data_modules"][kind]):
                place["init_args"]["task"]["init_args"]["tasks"][kind]["init_args"] |= options
    config["model"]["init_args"]["scheduler"] = {"class_path": "rslearn.train.scheduler.PlateauScheduler"}
    config["trainer"] |= trainer
    run = write_run(folder / "run", config)
    assert fit(run) == 0
    return run


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_without_a_valid_label_has_no_value(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = started(tmp_path, {kind: without_labels(tmp_path, kind)})
    told = capsys.readouterr().err
    assert told.count(f"warning: {kind}/{kind}: no ") == 1
    assert " in the val split: " in told
    names = {row["name"] for row in logged(run)}
    assert not names & {"val/score", "val/score_loss"}
    assert f"val/{kind}/loss" in names
    (evaluation,) = evaluate(run, splits=["val"])
    (row,) = [row for row in evaluation.rows if row.primary]
    assert (row.value, row.floor, row.n_windows, evaluation.score) == (None, None, 3, None)
    assert row.n == (3 if kind == "detect" else 0)
    assert row.valid_share == (1.0 if kind == "detect" else 0.0)
    content = run.evaluation("val").read_text()
    assert "NaN" not in content
    assert json.loads(content)["rows"][0]["value"] is None
    print_table([evaluation])
    assert "none" in capsys.readouterr().out


def test_the_other_tasks_are_the_score(tmp_path: Path) -> None:
    data = {
        "classify": (str(write_dataset(tmp_path / "data" / "classify", "classify")), "classify"),
        "segment": without_labels(tmp_path, "segment"),
    }
    run = started(tmp_path, data)
    values = {(row["step"], row["name"]): float(row["value"]) for row in logged(run)}
    for (step, name), value in values.items():
        if name == "val/score":
            floor = 0.5
            own = values[step, "val/classify/classify/balanced_accuracy"]
            assert value == pytest.approx(max(0.0, (own - floor) / (1 - floor)))
    assert run.best().is_file()
    assert run.best("segment").is_file()


class OneBatch(Callback):
    """Validates on one batch, as ``limit_val_batches: 1`` does.

    In a config it is read as 1.0, all batches, if Python has seen ``Union[float, int]`` before ``Union[int, float]``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.limit_val_batches = 1


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
def test_of_a_limited_validation_some_datasets_see_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {kind: (str(write_dataset(tmp_path / "data" / kind, kind)), kind) for kind in KINDS}
    run = started(tmp_path, data, callbacks=[{"class_path": f"{__name__}.OneBatch"}])
    told = capsys.readouterr().err
    assert told.count("warning: ") >= 3, told
    assert told.count("warning: segment/segment: no valid label") == 1
    assert run.done() is not None
    (evaluation,) = evaluate(run, splits=["test"])
    assert all(row.value is not None for row in evaluation.rows if row.primary)
