"""Small datasets as a person might write them; one check looks at all of a table, and its findings are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import rasterio
from affine import Affine
from rich.console import Console
from rslearn.train.data_module import RslearnDataModule

from rslp.check.check import CheckOptions, CheckResult
from rslp.check.check import check as check_all
from rslp.check.config import ParsedConfig
from rslp.check.findings import Finding
from rslp.train.instantiate import Construction, plan
from tests.tiny import run_config, write_dataset

Change = Callable[[Path, int], None]


@dataclass(frozen=True)
class Case:
    """A dataset with something about it, and what the check must say.

    Attributes:
        name: its key in the run config.
        kind: of the task.
        change: what is done to each window's folder, and its number.
        expected: for each finding its id, ``error`` or ``warning``, and a pattern of what is said; findings of the same
            words in other splits count once.
        task: arguments of the task.
        data: arguments of the data module.
    """

    name: str
    kind: str
    change: Change
    expected: Sequence[tuple[str, str, str]] = ()
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def run_config_of(cases: Sequence[Case], folder: Path) -> dict[str, Any]:
    """Write the datasets of some cases, and a run config over all of them."""
    written = {}
    for case in cases:
        path = write_dataset(folder / case.name, case.kind, train=6, val=3, test=0)
        for number, window in enumerate(sorted(path.glob("windows/*/*"))):
            case.change(window, number)
        written[case.name] = (str(path), case.kind)
    config = run_config(written, epochs=1)
    for case in cases:
        module = config["data"]["init_args"]["data_modules"][case.name]["init_args"]
        for task in (config["model"]["init_args"]["task"], module["task"]):
            task["init_args"]["tasks"][case.name]["init_args"].update(case.task)
        module.pop("test_config")
        module.update(case.data)
    return config


def modules_of(config: dict[str, Any]) -> dict[str, RslearnDataModule]:
    """The data modules."""
    modules = config["data"]["init_args"]["data_modules"]
    return {name: Construction().make(plan(module, RslearnDataModule)) for name, module in modules.items()}


def checked(config: dict[str, Any], **effort: Any) -> CheckResult:
    effort = {"forward": False, "max_overlap": 1, **effort}
    with patch("rslp.check.check.parse", return_value=ParsedConfig(modules_of(config), None, ())):
        return check_all(config, effort=CheckOptions(**effort), console=Console(quiet=True))


def said_of(case: Case, findings: Sequence[Finding]) -> list[Finding]:
    """What was found of a case, but for the ground that all these datasets share; each once for all splits."""
    words = {}
    for finding in findings:
        if case.name in finding.at and finding.id != "overlap":
            words[finding.id, re.sub(r"split '\w+'|\d+", "", finding.what)] = finding
    return list(words.values())


def assert_as_expected(case: Case, findings: Sequence[Finding]) -> None:
    """Each expectation fits one finding, and nothing else was found."""
    said = said_of(case, findings)
    for id_, level, pattern in case.expected:
        fitting = [
            one
            for one in said
            if (one.id, one.error) == (id_, level == "error")
            and re.search(pattern, f"{one.what} @ {'.'.join(map(str, one.at))}")
        ]
        assert len(fitting) == 1, (id_, level, pattern, said)
        said.remove(fitting[0])
    assert said == []


# What is done to a window.
def nothing(window: Path, number: int) -> None:
    """Leave it as it is."""


def options(**values: Sequence[Any]) -> Change:
    """Give options these values in turn."""

    def change(window: Path, number: int) -> None:
        own = {name: given[number % len(given)] for name, given in values.items()}
        edit_json(window / "metadata.json", lambda content: content["options"].update(own))

    return change


def features(*made: Callable[[float, float], dict[str, Any] | None], **properties: Sequence[Any]) -> Change:
    """Replace a window's features; each is made of the coordinates of the window's corner."""

    def change(window: Path, number: int) -> None:
        def edit(content: dict[str, Any]) -> None:
            x, y = json.loads((window / "metadata.json").read_text())["bounds"][:2]
            first = content["features"][0]
            content["features"] = [
                {
                    **first,
                    "geometry": one(x, y),
                    "properties": {**first["properties"], **{name: given[i] for name, given in properties.items()}},
                }
                for i, one in enumerate(made)
            ]

        edit_json(window / "layers/label/data.geojson", edit)

    return change


def label(array: np.ndarray[Any, Any], *, shift: int = 0, nodata: float | None = None) -> Change:
    """Replace the label raster."""
    return lambda window, _: replace_raster(window, "label", array[None], shift=shift, nodata=nodata)


def replace_raster(
    window: Path, layer: str, array: np.ndarray[Any, Any], *, shift: int = 0, nodata: float | None = None
) -> None:
    """Write another raster (``C H W``) at the place of a layer's, moved by so many pixels."""
    (file,) = window.glob(f"layers/{layer}/*/geotiff.tif")
    with rasterio.open(file) as source:
        crs, place = source.crs, source.transform
    place = Affine(place.a, 0, place.c + 10 * shift, 0, place.e, place.f)
    kind: dict[str, Any] = {"driver": "GTiff", "count": array.shape[0]}
    kind |= {"height": array.shape[1], "width": array.shape[2]} | ({} if nodata is None else {"nodata": nodata})
    with rasterio.open(file, "w", crs=crs, transform=place, dtype=array.dtype.name, **kind) as out:
        out.write(array)


def sentinel2(values: Callable[[int], np.ndarray[Any, Any]]) -> Change:
    """Let the image be of Sentinel-2: its values (``2 H W``) by the window's number."""

    def change(window: Path, number: int) -> None:
        (window / "layers/image/a_b").rename(window / "layers/image/B02_B03")
        replace_raster(window, "image", values(number))
        config = window.parents[2] / "config.json"
        edit_json(config, lambda content: content["layers"]["image"]["band_sets"][0].update(bands=["B02", "B03"]))

    return change


def as_sentinel2(
    name: str, *, layer: str = "image", bands: Sequence[str] = ("B02", "B03"), **more: Any
) -> dict[str, Any]:
    """Arguments of a data module whose image is of Sentinel-2, for a dataset with labels of features."""
    image = {"data_type": "raster", "layers": [layer], "bands": list(bands), "passthrough": True}
    label = {"data_type": "vector", "layers": ["label"], "is_target": True}
    normalize = {
        "class_path": "rslp.helios.norm.HeliosNormalize",
        "init_args": {"band_names": {"sentinel2_l2a": ["B02", "B03"]}},
    }
    return {
        "inputs": {"sentinel2_l2a": image, f"label_{name}": label},
        "default_config": {"transforms": [normalize], **more},
    }


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
