"""Chips of AgriFieldNet India (CC-BY-4.0), in an optional folder of test data, train jointly with fuel moisture."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rslp.datasets.points import write_points_dataset
from tests import children
from tests.datasets.files import features, made, windows_of
from tests.functional.test_real_points import EXAMPLE, SHARED, WEIGHTS, every, load

FOLDER = SHARED / "agrifieldnet"
ROOT = Path(__file__).parents[2]
CLASSES = {
    1: "wheat", 2: "mustard", 3: "lentil", 4: "fallow", 5: "green_pea", 6: "sugarcane", 8: "garlic", 9: "maize",
    13: "gram", 14: "coriander", 15: "potato", 16: "bersem", 36: "rice",
}  # fmt: skip


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the optional folder of test data")
def test_two_datasets_of_the_same_fields_train_with_fuel_moisture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (FOLDER / "chips.csv").open() as stream:
        table = list(csv.DictReader(stream))
    # Neighbours, which share fields, of each split.
    chips = {
        row["chip"]
        for split in ("train", "val", "test")
        for row in [row for row in table if row["split"] == split][: 16 if split == "train" else 6]
    }
    (tmp_path / "chips").mkdir()
    for chip in sorted(chips):
        for kind in ("image", "label", "field"):
            shutil.copy(FOLDER / "chips" / f"{chip}_{kind}.tif", tmp_path / "chips")
    shutil.copy(FOLDER / "chips.csv", tmp_path)
    images = {"s2": {"files": "chips/{chip}_image.tif", "date": ["2022-01-01", "2022-05-31"]}}
    labels = {"files": "chips/{chip}_label.tif", "classes": CLASSES, "ignore": [0]}
    split = {"by": "column", "table": "chips.csv", "column": "split"}
    common = {"images": images, "split": split, "encoder": "galileo"}
    pixels = made(tmp_path, path="crops", labels=labels, **common)
    fields = made(
        tmp_path, path="fields", task="classification", window={"size": 8},
        labels={**labels, "objects": "chips/{chip}_field.tif"}, **common,
    )  # fmt: skip
    assert pixels.shift < 7.1
    assert any("s2: the values look like reflectance 8bit" in note for note in pixels.notes)
    assert sum(fields.windows.values()) > len(chips)
    ids: dict[str, set[str]] = {}
    for window in windows_of(tmp_path / "fields").values():
        ids.setdefault(features(window)[0]["id"], set()).add(window.options["split"])
    assert all(len(splits) == 1 for splits in ids.values())

    fuel = every(40, SHARED / "fuel-moisture", tmp_path / "fuel")
    write_points_dataset(tmp_path / "datasets" / "fuel_moisture", load("convert", monkeypatch).fuel_moisture(fuel))
    for name in ("base.yaml", "fuel_moisture.yaml"):
        shutil.copy(EXAMPLE / name, tmp_path)
    multi = {
        "base_cfg": "base.yaml",
        "dataset_cfgs": ["crops.yaml", "fields.yaml", "fuel_moisture.yaml"],
        "helios_checkpoint_path": str(WEIGHTS.resolve()),
        "encoder_embedding_size": 128,
        "patch_size": 8,
        "output_path": "OUT.yaml",
        "global_overrides": {"trainer": {"max_epochs": 1}, "data": {"init_args": {"num_workers": 0}}},
    }
    (tmp_path / "joint.yaml").write_text(yaml.safe_dump(multi, sort_keys=False))
    command = [sys.executable, str(ROOT / "make_multidataset_config.py"), "--cfg", "joint.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launch = ("launch_finetune", "--config_paths+=OUT.yaml", "--rslp_project", "p", "--experiment_id", "e")
    done = children.rslp("helios", *launch, "--local", "true", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    [state] = tmp_path.rglob("DONE.json")
    assert json.loads(state.read_text())["epoch"] == 1
