"""A detector whose objects have the class that Faster R-CNN takes for background is refused, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rslp.cli.check import check
from rslp.errors import ConfigError, DataError
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run

SAID = (
    r"objects have the class 'thing', the first, which FasterRCNN takes for background .* \[background, thing, boat\]"
)


def made(folder: Path, classes: list[str], **arguments: Any) -> dict[str, Any]:
    path = write_dataset(folder / "ships", "detect")
    config = run_config({"ships": (str(path), "detect")}, epochs=1)
    data = config["data"]["init_args"]["data_modules"]["ships"]["init_args"]
    for task in (config["model"]["init_args"]["task"], data["task"]):
        task["init_args"]["tasks"]["ships"]["init_args"] |= {"classes": classes, **arguments}
    return config


def test_the_first_class_of_a_detector_is_background(tmp_path: Path) -> None:
    config = made(tmp_path, ["thing", "boat"])
    run = write_run(tmp_path, config)
    with pytest.raises(DataError, match=SAID):
        fit(run)
    with pytest.raises(ConfigError) as raised:
        check([str(run.config)], forward=False)
    (problem,) = raised.value.problems
    assert "FasterRCNN takes for background" in problem.what
    assert problem.key.endswith("tasks.ships.init_args.classes")


def test_class_numbers_are_looked_at_too(tmp_path: Path) -> None:
    config = made(tmp_path, ["thing", "boat"], read_class_id=True)
    for file in (tmp_path / "ships").glob("windows/*/*/layers/label/data.geojson"):
        content = json.loads(file.read_text())
        for feature in content["features"]:
            feature["properties"]["value"] = 0
        file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=SAID):
        fit(write_run(tmp_path, config))


def test_a_background_class_in_front_is_right(tmp_path: Path) -> None:
    run = write_run(tmp_path, made(tmp_path, ["bg", "thing"]))
    assert check([str(run.config)], forward=False) == 0
    fit(run)
    assert run.last.exists()
