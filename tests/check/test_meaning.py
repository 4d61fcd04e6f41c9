"""The check says what is trained on, where it may not be what the person means: tags, parts, coverage, nodata."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rslp.check.check import Checked
from rslp.check.parsing import parse
from rslp.errors import DataError
from rslp.train.data import MultiDatasetDataModule
from tests.check.small import (
    Case,
    assert_as_expected,
    checked,
    features,
    label,
    modules_of,
    nothing,
    options,
    run_config_of,
)
from tests.tiny import SIZE, run_config, write_dataset


def half(dtype: Any = np.uint8, *, left: float = 0, right: float = 1) -> np.ndarray[Any, Any]:
    array = np.full((SIZE, SIZE), right, dtype)
    array[:, : SIZE // 2] = left
    return array


def parts(kind: str, count: int) -> Callable[[float, float], dict[str, Any]]:
    """A geometry of so many parts, beside each other."""

    def square(x: float, y: float) -> list[Any]:
        return [[[x, y], [x + 1, y], [x + 1, y + 1], [x, y + 1], [x, y]]]

    def made(x: float, y: float) -> dict[str, Any]:
        at = [(x + 1 + 2 * i, y + 3) for i in range(count)]
        if kind == "GeometryCollection":
            return {"type": kind, "geometries": [{"type": "Point", "coordinates": list(one)} for one in at]}
        return {"type": kind, "coordinates": [square(*one) if kind == "MultiPolygon" else list(one) for one in at]}

    return made


def point(x: float, y: float) -> dict[str, Any]:
    return {"type": "Point", "coordinates": [x + 3, y + 3]}


def elsewhere(x: float, y: float) -> dict[str, Any]:
    return {"type": "Point", "coordinates": [x + 3000, y + 3]}


def nowhere(x: float, y: float) -> None:
    """No geometry."""


def wide(x: float, y: float) -> dict[str, Any]:
    return {"type": "LineString", "coordinates": [[x - 900, y + 3], [x + 900, y + 3]]}


def tagged(**tags: Any) -> dict[str, Any]:
    return {"train_config": {"tags": {"split": "train", **tags}}}


SEVERAL = r"warning: .* features of \d windows have several parts, e.g. default/w\d+ \(3 parts\): each becomes one box"
UNDECLARED = r"warning: .* the files declare nodata {}, the task has {}: 50% of the pixels are left out; set nodata_value: {} .*nodata_value\]"  # noqa: E501
AREAS = options(area=["north", "North", "South"])

CASES = [
    Case("tag_spelt_otherwise", "classify", AREAS, data=tagged(area="north"), expected=[
        r"warning: .* tag area: 'north' does not choose 2 windows with area: 'North' .*train_config.tags.area\]"]),
    Case("tag_that_nothing_has", "classify", AREAS, data=tagged(area="east"), expected=[
        r"error: .* select 0 of 6; windows have area: 'North', 'South', 'north'"]),
    Case("tag_that_some_have", "classify", AREAS, data=tagged(area="South"), expected=[
        "warning: .* has high, which no training label"]),
    *(Case(f"{kind.lower()}_of_3", "detect", features(parts(kind, 3)), expected=[SEVERAL])
      for kind in ("MultiPolygon", "MultiPoint", "GeometryCollection")),
    *(Case(f"{kind.lower()}_of_1", "detect", features(parts(kind, 1)))
      for kind in ("MultiPolygon", "MultiPoint", "GeometryCollection")),
    Case("two_classes", "classify", features(point, point, value=["low", "high"]), expected=[
        r"warning: .* \d of \d windows have labels of several values, e.g. default/w\d+: low, high; the first is"]),
    Case("one_class_twice", "classify", features(point, point, value=["low", "low"])),
    Case("two_values", "regress", features(point, point, value=[0.5, 1.5]), expected=[
        r"labels of several values, e.g. default/w\d+: 0.5, 1.5; the first is taken", "all . labels are 0.5"]),
    Case("part_is_covered", "segment", label(np.ones((SIZE, 4), np.uint8)), expected=[
        r"warning: .* the label files cover 50% of the windows, mean over \d windows \(50% of default/w"]),
    Case("elsewhere", "segment", label(half(), shift=5000), expected=[
        r"error: .* the label files cover nothing of \d windows, e.g. default/w\d+: they lie elsewhere"]),
    Case("larger_than_the_window", "segment", label(np.tile(half(), 2))),
    Case("file_declares_255", "segment", label(half(left=255), nodata=255), expected=[
        UNDECLARED.format(255, "none", 255)]),
    Case("file_and_task_differ", "segment", label(half(left=255), nodata=255), task={"nodata_value": 7}, expected=[
        UNDECLARED.format(255, 7, 255)]),
    Case("file_declares_nan", "segment", label(half(np.float32, left=math.nan), nodata=math.nan), expected=[
        UNDECLARED.format(r"\.nan", "none", r"\.nan")]),
    Case("undeclared_nan", "segment", label(half(np.float32, left=math.nan)), expected=[
        "warning: .* 50% of the label pixels are NaN or infinite, and are left out"]),
    Case("file_declares_minus_9999", "segment", label(half(np.int16, left=-9999), nodata=-9999), expected=[
        UNDECLARED.format(-9999, "none", -9999)]),
    Case("both_declare", "segment", label(half(np.int16, left=-9999), nodata=-9999), task={"nodata_value": -9999}),
    Case("task_declares", "segment", label(half(np.int16, left=-9999)), task={"nodata_value": -9999}),
    Case("declared_and_absent", "segment", label(half(), nodata=255)),
    Case("class_called_nodata", "segment", label(half(), nodata=0), expected=[
        r"error: .* can't be read.* the files declare nodata 0, which is a class of the task; nodata_value: 0"]),
    Case("class_called_nodata_is_none", "segment", label(half(), nodata=0), task={"nodata_value": 255}),
    Case("class_called_nodata_is_nodata", "segment", label(half(), nodata=0), task={"nodata_value": 0}),
    Case("plain", "segment", nothing),
    Case("all_elsewhere", "classify", features(elsewhere, value=["low"]), expected=[
        r"error: .* \d features in \d of \d windows lie outside of their window, e.g. of default/w\d+: another CRS"]),
    Case("objects_elsewhere", "detect", features(elsewhere, value=["thing"]), expected=[
        r"error: .* \d features in \d of \d windows lie outside of their window, e.g. of default/w\d+: another CRS"]),
    Case("some_elsewhere", "detect", features(elsewhere, point, value=["thing", "thing"]), expected=[
        r"warning: .* \d features in \d of \d windows lie outside of their window"]),
    Case("without_a_geometry", "detect", features(nowhere, point, value=["thing", "thing"])),
    Case("reaches_out_of_the_window", "regress", features(wide, value=[1.0]), expected=["labels are 1"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return checked(run_config_of(CASES, tmp_path_factory.mktemp("cases")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_said_where_it_is_and_nowhere_else(case: Case, outcome: Checked) -> None:
    assert_as_expected(case, outcome.findings)


def test_what_is_left_out_is_in_no_share_of_a_class(outcome: Checked) -> None:
    wanted = ("part_is_covered", "file_declares_255", "class_called_nodata_is_none", "class_called_nodata_is_nodata")
    seen = {
        report.name: report.labels[report.name]["train"].classes for report in outcome.reports if report.name in wanted
    }
    assert seen["part_is_covered"] == {"0": 0, "1": 4 * 32}
    assert seen["file_declares_255"] == {"0": 0, "1": 4 * 32}
    assert seen["class_called_nodata_is_none"] == {"0": 4 * 32, "1": 4 * 32}
    assert seen["class_called_nodata_is_nodata"] == {"0": 0, "1": 4 * 32}


TAGS: list[tuple[dict[str, Any], int]] = [
    ({"fold": 0}, 2), ({"fold": 0.0}, 2), ({"fold": 1}, 2), ({"fold": None}, 6), ({"fold": 3}, 0),
    ({"cloudy": False}, 3), ({"cloudy": True}, 3), ({"fold": 0, "cloudy": False}, 1), ({"text": 0}, 2),
    ({"text": 1}, 2), ({"text": True}, 2),
]  # fmt: skip
# The run's parser takes the quotes away.
TEXTS = {"train": ({"fold": "1"}, 2), "val": ({"text": "01"}, 2), "test": ({"text": "true"}, 2)}


@pytest.mark.parametrize("cached", ["auto", "off"])
def test_a_tag_of_zero_or_false_chooses_what_has_it(cached: str, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "tagged", "classify", train=6, val=0, test=0)
    for number, window in enumerate(sorted(path.glob("windows/*/*"))):
        options(fold=[0, 1, 2], text=["0", "01", "true"], cloudy=[False, True])(window, number)
    config = run_config({"tagged": (str(path), "classify")})
    module = config["data"]["init_args"]["data_modules"]["tagged"]["init_args"]
    for tags, count in TAGS:
        module["train_config"] = {"tags": tags}
        data = MultiDatasetDataModule(modules_of(config), num_workers=0, store=cached)
        if count:
            assert data.sizes("train") == {"tagged": count}, tags
        else:
            with pytest.raises(DataError, match="no windows for split 'train'"):
                data.sizes("train")
    module.update({f"{split}_config": {"tags": tags} for split, (tags, _) in TEXTS.items()})
    parsed = MultiDatasetDataModule(dict(parse(config).modules), num_workers=0, store=cached)
    for split, (_, count) in TEXTS.items():
        assert parsed.sizes(split) == {"tagged": count}
