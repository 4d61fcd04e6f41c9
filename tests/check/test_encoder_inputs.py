"""Units and bands of encoders that normalise by themselves: Galileo and Presto, on pixels and on images."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rslp.check.findings import Finding
from rslp.datasets.points import PixelSeries, SensorSeries, write_points_dataset
from rslp.helios import encoders
from tests.check.small import checked

CLASSES = {"galileo": "rslp.helios.galileo.Galileo", "presto": "rslp.helios.presto.Presto"}
S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
BANDS = {"s2": S2, "s1": ("vv", "vh"), "era5": ("temperature", "precipitation"), "srtm": ("elevation", "slope")}
SPANS = tuple((datetime(2021, n, 1, tzinfo=UTC), datetime(2021, n, 28, tzinfo=UTC)) for n in (3, 4, 5))
Change = Callable[[dict[str, np.ndarray]], None]


def values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "s2": rng.integers(100, 4000, (3, 10)).astype(float),
        "s1": rng.normal(-13, 2, (3, 2)),
        "era5": np.stack([rng.normal(288, 6, 3), rng.uniform(0, 0.3, 3)], axis=1),
        "srtm": np.array([[rng.uniform(0, 3000), rng.uniform(0, 30)]]),
    }


def write(folder: Path, change: Change = lambda _: None, *, apart: float = 0.1) -> dict[str, Any]:
    """Write a dataset of pixels, some degrees apart; returns the inputs of its data module."""

    def point(index: int) -> PixelSeries:
        arrays = values(index)
        change(arrays)
        sensors = {
            name: SensorSeries(bands=BANDS[name], spans=SPANS[: len(rows)], values=rows)
            for name, rows in arrays.items()
        }
        split = ("train", "train", "val")[index % 3]
        return PixelSeries(
            name=f"p{index}",
            lon=3 + index * apart,
            lat=45.0,
            split=split,
            label={"value": float(index)},
            sensors=sensors,
        )

    write_points_dataset(folder, [point(index) for index in range(9)])
    inputs: dict[str, Any] = {
        name: {"data_type": "raster", "layers": [name], "bands": list(bands), "dtype": "FLOAT32", "passthrough": True}
        for name, bands in BANDS.items()
    }
    return {**inputs, "targets": {"data_type": "vector", "layers": ["label"], "is_target": True}}


def run_config(folder: Path, inputs: dict[str, Any], encoder: str, **options: Any) -> dict[str, Any]:
    """A run config of one dataset; its weights are not looked at."""
    task = {
        "class_path": "rslearn.train.tasks.regression.RegressionTask",
        "init_args": {"property_name": "value", "filters": []},
    }
    multi = {"tasks": {"d": task}, "input_mapping": {"d": {"targets": "targets"}}}
    data = {
        "path": str(folder),
        "inputs": inputs,
        "task": {"class_path": "rslearn.train.tasks.multi_task.MultiTask", "init_args": multi},
        "train_config": {"tags": {"split": "train"}, "transforms": options.pop("transforms", [])},
        "val_config": {"tags": {"split": "val"}},
    }
    module = {"class_path": "rslearn.train.data_module.RslearnDataModule", "init_args": data}
    model = {"encoder": [{"class_path": CLASSES[encoder], "init_args": {"patch_size": 4, **options}}]}
    return {
        "model": {"init_args": {"model": {"init_args": model}}},
        "data": {"init_args": {"data_modules": {"d": module}}},
    }


def findings(config: dict[str, Any]) -> list[Finding]:
    return [finding for finding in checked(config).findings if finding.id not in ("no-locations", "overlap")]


@pytest.fixture(scope="module", params=list(CLASSES))
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sound") / "d"
    return run_config(folder, write(folder), request.param)


def test_sound_pixels_pass(sound: dict[str, Any]) -> None:
    result = checked(sound)
    assert findings(sound) == []
    (report,) = result.reports
    assert {one.name: one.units for one in report.inputs} == {
        "s2": "digital numbers", "s1": "dB", "era5": "", "srtm": "",
    }  # fmt: skip


def factor(name: str, by: float, plus: float = 0, band: int | slice = slice(None)) -> Change:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][:, band] = arrays[name][:, band] * by + plus

    return change


def to_power(arrays: dict[str, np.ndarray]) -> None:
    arrays["s1"] = 10 ** (arrays["s1"] / 10)


@pytest.mark.parametrize(
    ("change", "finding", "message"),
    [
        (factor("s2", 1e-4), "units", "input 's2' looks like reflectance 0-1 .*; the encoder takes digital numbers"),
        (to_power, "units", "input 's1' looks like linear power .*; the encoder takes dB"),
        (factor("era5", 1, -273.15, 0), "units", r"'era5' has values .*temperature \(.*; the encoder takes K\)"),
        (factor("era5", 1000, 0, 1), "units", r"precipitation \(.*; the encoder takes m per month\)"),
        (factor("srtm", 10, 0, 1), "units", r"band slope \(.*; the encoder takes degrees\)"),
        (factor("s2", 1, 1000), "offset-all", "carry the offset of"),
    ],
)
@pytest.mark.parametrize("encoder", list(CLASSES))
def test_other_units_are_found(tmp_path: Path, encoder: str, change: Change, finding: str, message: str) -> None:
    found = findings(run_config(tmp_path / "d", write(tmp_path / "d", change), encoder))
    assert [one.id for one in found] == [finding]
    assert re.search(message, found[0].what), found[0].what


@pytest.mark.parametrize(
    ("bands", "options", "fits"),
    [
        (S2, {}, True),
        (S2[::-1], {}, False),
        (S2[:6], {}, False),
        (S2[:6], {"bands": {"s2": list(S2[:6])}}, True),
        (S2[:6][::-1], {"bands": {"s2": ["B7", "B6", "B5", "B4", "B3", "B2"]}}, True),
        (S2[:6][::-1], {"bands": {"s2": list(S2[:6])}}, False),
    ],
)
def test_the_order_of_bands(sound: dict[str, Any], bands: tuple[str, ...], options: Any, fits: bool) -> None:
    config = copy.deepcopy(sound)
    config["model"]["init_args"]["model"]["init_args"]["encoder"][0]["init_args"].update(options)
    config["data"]["init_args"]["data_modules"]["d"]["init_args"]["inputs"]["s2"]["bands"] = list(bands)
    found = findings(config)
    assert [one.id for one in found] == ([] if fits else ["band-order"])
    if not fits:
        assert found[0].at[-3:] == ("inputs", "s2", "bands")
        assert "but the input gives" in found[0].what


def test_values_that_a_transform_converts_are_not_judged(tmp_path: Path) -> None:
    inputs = write(tmp_path / "d", factor("s2", 1e-4))
    normalize = {
        "class_path": "rslearn.train.transforms.normalize.Normalize",
        "init_args": {"mean": 0, "std": 1e-4, "selectors": ["s2"]},
    }
    assert findings(run_config(tmp_path / "d", inputs, "presto", transforms=[normalize])) == []


@pytest.mark.parametrize(("options", "read"), [({}, True), ({"use_location": False}, False)])
def test_places_that_are_none_are_warned_of(tmp_path: Path, options: dict[str, Any], read: bool) -> None:
    config = run_config(tmp_path / "d", write(tmp_path / "d", apart=0), "presto", **options)
    (found,) = [one for one in checked(config).findings if one.id == "no-locations"]
    assert not found.error
    assert ("set its use_location to false" in found.what) is read


def test_another_encoder_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = encoders.EncoderInput("era5", "weather", ("temperature",), (encoders.Quantity("degrees Celsius", -90, 60),))
    added = encoders.EncoderSpec("Other", ("other.Encoder",), (taken,), shrinks_patches=True)
    monkeypatch.setattr(encoders, "ENCODERS", (*encoders.ENCODERS, added))
    monkeypatch.setitem(CLASSES, "other", "other.Encoder")
    inputs = write(tmp_path / "d")
    inputs["era5"]["bands"] = ["temperature"]
    (found,) = findings(run_config(tmp_path / "d", inputs, "other"))
    assert "the encoder takes degrees Celsius" in found.what
