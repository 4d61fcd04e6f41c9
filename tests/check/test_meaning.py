"""The check says what is trained on, where it may not be what the person means: tags, parts, coverage, nodata."""

# ruff: noqa: E501 (a table)
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rslp.check.check import CheckResult
from rslp.check.config import parse
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import DataError
from tests.check.small import (
    Case,
    as_sentinel2,
    assert_as_expected,
    checked,
    edit_json,
    features,
    label,
    modules_of,
    nothing,
    options,
    run_config_of,
    sentinel2,
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


def empty(x: float, y: float) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": []}


def wide(x: float, y: float) -> dict[str, Any]:
    return {"type": "LineString", "coordinates": [[x - 900, y + 3], [x + 900, y + 3]]}


def tagged(**tags: Any) -> dict[str, Any]:
    return {"train_config": {"tags": {"split": "train", **tags}}}


AREAS = options(area=["north", "North", "South"])
SEVERAL = ("label-parts", "warning", r"features of \d windows have several parts, e.g. default/w\d+ \(3 parts\): each")
ELSEWHERE = r"\d features in \d of \d windows lie outside of their window, e.g. of default/w\d+: another CRS"
CONSTANT = ("label-constant", "warning", "all . labels are")
UNSEEN = ("label-unseen", "warning", "has .*, which no training label that was looked at has")


def declared(files: str, task: str) -> list[tuple[str, str, str]]:
    what = rf"the files declare nodata {files}, the task has {task}: 50% of the pixels are left out; set nodata_value: "
    return [("label-declared", "warning", f"{what}{files} @ .*nodata_value$")]


def images(low: float, high: float, *, of: int = 1) -> Callable[[int], Any]:
    """Digital numbers between two values, in one window of so many; in the others between 100 and 400."""

    def values(number: int) -> Any:
        span = (low, high) if number % of == 0 else (100, 400)
        return np.random.default_rng(number).integers(*span, size=(2, SIZE, SIZE), endpoint=True).astype(np.uint16)

    return values


def with_band(values: Any, of: Callable[[int], Any]) -> Callable[[int], Any]:
    """Images whose second band is another."""
    return lambda number: np.stack([of(number)[0], np.resize(values, (SIZE, SIZE))]).astype(np.float32)


def with_gaps(share: float) -> Callable[[int], Any]:
    """Images with so many pixels of 0."""
    gap = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) < share * SIZE * SIZE
    return lambda number: np.where(gap, 0, images(100, 3000)(number)).astype(np.uint16)


def s2(name: str, values: Callable[[int], Any], *expected: tuple[str, str, str], **data: Any) -> Case:
    return Case(name, "classify", sentinel2(values), expected, data=as_sentinel2(name, **data))


def incomplete(window: Path, number: int) -> None:
    if number == 0:
        (window / "layers/image/completed").unlink()


def torn(window: Path, number: int) -> None:
    if number == 0:
        (window / "layers/image/a_b/geotiff.tif").write_bytes(b"no GeoTIFF")


def other_property(window: Path, number: int) -> None:
    if number == 0:
        edit_json(window / "layers/label/data.geojson", lambda c: c["features"][0].update(properties={"klass": "low"}))


def by_split(window: Path, number: int) -> None:
    features(point, value=["low" if number < 6 else "high"])(window, number)


DN = images(100, 3000)
CASES = [
    Case("tag_spelt_otherwise", "classify", AREAS, data=tagged(area="north"), expected=[
        ("tag-spelling", "warning", r"tag area: 'north' does not choose 3 windows with area: 'North' @ .*config.tags.area$")]),
    Case("tag_that_nothing_has", "classify", AREAS, data=tagged(area="east"), expected=[
        ("split-empty", "error", "select 0 of 9; windows have area: 'North', 'South', 'north'")]),
    Case("tag_that_some_have", "classify", AREAS, data=tagged(area="South")),
    Case("class_that_only_val_has", "classify", by_split, [UNSEEN]),
    *(Case(f"{kind.lower()}_of_3", "detect", features(parts(kind, 3)), expected=[SEVERAL])
      for kind in ("MultiPolygon", "MultiPoint", "GeometryCollection")),
    *(Case(f"{kind.lower()}_of_1", "detect", features(parts(kind, 1)))
      for kind in ("MultiPolygon", "MultiPoint", "GeometryCollection")),
    Case("two_classes", "classify", features(point, point, value=["low", "high"]), expected=[
        ("label-several", "warning", r"\d of \d windows have labels of several values, e.g. default/w\d+: low, high; the")]),
    Case("one_class_twice", "classify", features(point, point, value=["low", "low"])),
    Case("two_values", "regress", features(point, point, value=[0.5, 1.5]), expected=[
        ("label-several", "warning", r"e.g. default/w\d+: 0.5, 1.5; the first is taken"), CONSTANT]),
    Case("part_is_covered", "segment", label(np.ones((SIZE, 4), np.uint8)), expected=[
        ("label-part", "warning", r"the label files cover 50% of the windows, mean over \d windows \(50% of default/w")]),
    Case("elsewhere", "segment", label(half(), shift=5000), expected=[
        ("label-nowhere", "error", r"the label files cover nothing of \d windows, e.g. default/w\d+: they lie elsewhere")]),
    Case("larger_than_the_window", "segment", label(np.tile(half(), 2))),
    Case("file_declares_255", "segment", label(half(left=255), nodata=255), declared("255", "none")),
    Case("file_and_task_differ", "segment", label(half(left=255), nodata=255), declared("255", "7"), {"nodata_value": 7}),
    Case("file_declares_nan", "segment", label(half(np.float32, left=math.nan), nodata=math.nan),
         declared(r"\.nan", "none")),
    Case("undeclared_nan", "segment", label(half(np.float32, left=math.nan)), expected=[
        ("label-declared", "warning", "50% of the label pixels are NaN or infinite, and are left out")]),
    Case("file_declares_minus_9999", "segment", label(half(np.int16, left=-9999), nodata=-9999), declared("-9999", "none")),
    Case("both_declare", "segment", label(half(np.int16, left=-9999), nodata=-9999), task={"nodata_value": -9999}),
    Case("task_declares", "segment", label(half(np.int16, left=-9999)), task={"nodata_value": -9999}),
    Case("declared_and_absent", "segment", label(half(), nodata=255)),
    Case("class_called_nodata", "segment", label(half(), nodata=0), expected=[
        ("label-declared", "error", "9 of 9 windows can't be read, e.g. .*: the files declare nodata 0, which is a class of the task; nodata_value: 0")]),
    Case("class_called_nodata_is_none", "segment", label(half(), nodata=0), task={"nodata_value": 255}),
    Case("class_called_nodata_is_nodata", "segment", label(half(), nodata=0), task={"nodata_value": 0}),
    Case("plain", "segment", nothing),
    Case("all_elsewhere", "classify", features(elsewhere, value=["low"]), [("label-elsewhere", "error", ELSEWHERE)]),
    Case("objects_elsewhere", "detect", features(elsewhere, value=["thing"]), [("label-elsewhere", "error", ELSEWHERE)]),
    Case("some_elsewhere", "detect", features(elsewhere, point, value=["thing"] * 2), [
        ("label-elsewhere", "warning", ELSEWHERE)]),
    Case("without_a_geometry", "detect", features(nowhere, point, value=["thing", "thing"])),
    Case("with_an_empty_geometry", "detect", features(empty, point, value=["thing", "thing"])),
    Case("reaches_out_of_the_window", "regress", features(wide, value=[1.0]), [CONSTANT]),
    Case("unknown_class", "classify", features(point, value=["middling"]), [
        ("label-unknown", "error", r"\d labels are not among the classes: middling; configured: low, high")]),
    Case("unknown_class_is_skipped", "detect", features(point, point, value=["other", "thing"]),
         task={"skip_unknown_categories": True}),
    Case("no_label", "classify", other_property, [
        ("label-lacking", "error", "1 of . windows have no label with the property 'value', e.g. default/w000; properties")]),
    Case("no_label_is_allowed", "classify", other_property, task={"allow_invalid": True}),
    Case("class_beyond", "segment", label(half(right=9)), [
        ("label-range", "error", "pixels hold the class 9, but num_classes is 2; is that a nodata_value")]),
    Case("class_is_renamed", "segment", label(half(right=9)), task={"class_id_mapping": {9: 1}}),
    Case("only_nodata", "segment", label(half(left=255, right=255)), [("label-nodata", "error", "all pixels .* are nodata")],
         {"nodata_value": 255}),
    Case("no_number", "regress", features(point, value=["warm"]), [
        ("label-number", "error", r"\d labels are no finite number: warm")]),
    Case("number_is_null", "regress", features(point, value=[None]), [
        ("label-number", "error", r"\d labels are no finite number: null")]),
    Case("number_as_text", "regress", features(point, value=["1.5"]), [CONSTANT]),
    Case("layer_of_another_name", "classify", nothing, [("layer", "error", "has no layer 'imag'; did you mean image")],
         data=as_sentinel2("layer_of_another_name", layer="imag")),
    s2("band_of_another_name", DN, ("band", "error", "has no band B99"),
       ("band-order", "error", "but the input gives B02, B99"), bands=["B02", "B99"]),
    s2("bands_in_another_order", DN, ("band-order", "error", "B02, B03, but the input gives B03, B02"), bands=["B03", "B02"]),
    Case("incomplete", "classify", incomplete, [("layer-lacking", "warning", r"1 of . windows lack a layer of input 'image' \(image\); 1 are there without the file `completed`, e.g. .*w000/layers/image")]),
    Case("torn", "classify", torn, [("unreadable", "error", "1 of 9 windows can't be read, e.g. default/w000: Rasterio")]),
    s2("crops_of_6", DN, ("image-size", "error", "crops of 6x6 px are no multiple of the encoder's patch size 4 px"),
       crop_size=6),
    s2("crops_of_4", DN, crop_size=4),
    s2("reflectance", with_band(np.arange(50) / 100, lambda n: DN(n) / 10000), ("units", "error", "looks like reflectance 0-1")),
    s2("digital_numbers", DN),
    s2("dark_band", with_band(np.arange(90, 140), DN), ("band-units", "warning", "band B03 like 8-bit")),
    s2("band_as_reflectance", with_band(np.arange(50) / 100, DN), ("band-units", "error", "band B03 like reflectance")),
    s2("offset_in_some", images(1100, 1400, of=2), ("offset-some", "error", r"5 of 9 windows carry the offset of \+1000")),
    s2("sand_in_some", lambda n: images(1100 + 300 * n, 6000, of=2)(n)),
    s2("offset_in_all", images(1050, 3000), ("offset-all", "warning", r"9 windows is below 1\d\d\d: they seem to carry the")),
    s2("half_nodata", with_gaps(0.5), ("image-nodata", "warning", "50% of the pixels in 9 windows are nodata")),
    s2("nearly_all_nodata", with_gaps(0.97), ("image-nodata", "error", "98% of the pixels in 9 windows are nodata")),
    s2("some_nodata", with_gaps(0.2)),
    s2("one_value", with_band(500, DN), ("band-constant", "warning", "band B03 holds a single value")),
    Case("no_folder", "classify", nothing, [("folder", "error", "nowhere does not exist")], data={"path": "/nowhere"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> CheckResult:
    config = run_config_of(CASES, tmp_path_factory.mktemp("cases"))
    encoder = config["model"]["init_args"]["model"]["init_args"]["encoder"]
    encoder[0]["init_args"]["patch_size"] = 4
    return checked(config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_said_where_it_is_and_nowhere_else(case: Case, outcome: CheckResult) -> None:
    assert_as_expected(case, outcome.findings)


def test_what_is_left_out_is_in_no_share_of_a_class(outcome: CheckResult) -> None:
    wanted = ("part_is_covered", "file_declares_255", "class_called_nodata_is_none", "class_called_nodata_is_nodata")
    seen = {
        report.name: report.labels[report.name]["train"].classes for report in outcome.reports if report.name in wanted
    }
    assert seen["part_is_covered"] == {"0": 0, "1": 6 * 32}
    assert seen["file_declares_255"] == {"0": 0, "1": 6 * 32}
    assert seen["class_called_nodata_is_none"] == {"0": 6 * 32, "1": 6 * 32}
    assert seen["class_called_nodata_is_nodata"] == {"0": 0, "1": 6 * 32}


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
