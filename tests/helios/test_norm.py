"""Normalisation against a plain computation, value by value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.data.normalize import load_computed_config
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.constants import Modality
from rslearn.models.olmoearth_pretrain.norm import OlmoEarthNormalize
from rslearn.train.model_context import RasterImage
from rslearn.train.transforms.concatenate import Concatenate
from rslearn.train.transforms.flip import Flip
from rslearn.train.transforms.pad import Pad

from rslp.errors import ConfigError, DataError
from rslp.helios.images import statistics
from rslp.helios.norm import HeliosNormalize
from tests.helios.tiny_helios import S2, months

LANDSAT = ["B8", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11"]
STATS = {modality: bands for modality, bands in load_computed_config().items() if isinstance(bands, dict)}


def plain(modality: str, band: str, value: float, k: float = 2) -> float:
    mean, std = STATS[modality][band]["mean"], STATS[modality][band]["std"]
    return (value - (mean - k * std)) / (2 * k * std)


def normalize(
    image: RasterImage | torch.Tensor, bands: list[str] = S2, modality: str = "sentinel2_l2a", **kwargs: Any
) -> Any:
    return HeliosNormalize({modality: bands}, **kwargs)({modality: image}, {})[0][modality]


def dn(dates: int = 3, bands: int = 12, size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 9000, (bands, dates, size, size), generator=torch.Generator().manual_seed(seed)).float()


def test_the_shipped_statistics_are_those_of_the_package() -> None:
    for modality, bands in statistics.shipped_statistics().items():
        assert [band.name for band in bands] == list(Modality.get(modality).band_order)
        for band in bands:
            assert (band.mean, band.std) == tuple(STATS[modality][band.name][key] for key in ("mean", "std"))


@given(st.permutations(S2), st.integers(1, 4), st.sampled_from([1, 2, 3.5]), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_bands_in_any_order_come_out_in_the_models(bands: list[str], dates: int, k: float, seed: int) -> None:
    raw = dn(dates, seed=seed)
    found = normalize(RasterImage(raw), list(bands), std_multiplier=k).image
    assert found.shape == raw.shape
    for position, band in enumerate(S2):
        given_at = list(bands).index(band)
        value = raw[given_at, dates - 1, 2, 1].item()
        assert found[position, dates - 1, 2, 1].item() == pytest.approx(
            plain("sentinel2_l2a", band, value, k), abs=1e-5
        )


def test_as_rslearn_computes_it() -> None:
    bands = {"sentinel2_l2a": S2, "landsat": LANDSAT, "sentinel1": ["vv", "vh"]}
    raw = {"sentinel2_l2a": dn(), "landsat": dn(1, 11), "sentinel1": -25 * torch.rand(2, 3, 4, 4) - 0.1}
    ours, _ = HeliosNormalize(bands, sentinel1_units="db")({name: RasterImage(t) for name, t in raw.items()}, {})
    theirs, _ = OlmoEarthNormalize(bands)({name: RasterImage(t.clone()) for name, t in raw.items()}, {})
    for name in raw:
        assert torch.allclose(ours[name].image, theirs[name].image, atol=1e-6)


def test_stock_can_not_normalise_ten_bands_and_ours_can() -> None:
    raw = dn(bands=10)
    with pytest.raises(ValueError, match="'B01' is not in list"):
        OlmoEarthNormalize({"sentinel2_l2a": S2[:10]})({"sentinel2_l2a": RasterImage(raw.clone())}, {})
    assert normalize(RasterImage(raw), S2[:10]).image.isfinite().all()


@given(st.floats(1e-4, 100))
def test_linear_power_becomes_decibels(power: float) -> None:
    linear = torch.full((2, 1, 1, 1), power)
    linear[1] = 0.02
    db = 10 * torch.log10(linear)
    found = normalize(RasterImage(linear), ["vv", "vh"], "sentinel1").image
    assert torch.allclose(found, normalize(RasterImage(db), ["vv", "vh"], "sentinel1", sentinel1_units="db").image)
    assert found[0].item() == pytest.approx(plain("sentinel1", "vv", 10 * math.log10(power)), abs=1e-4)


def test_zero_power_in_one_band_is_the_floor() -> None:
    linear = torch.full((2, 1, 2, 2), 0.05)
    linear[1, 0, 0, 0] = 0.0
    linear[1, 0, 1, 1] = -1e-3
    found = normalize(RasterImage(linear), ["vv", "vh"], "sentinel1").image
    assert found[1, 0, 0, 0].item() == pytest.approx(plain("sentinel1", "vh", -50), abs=1e-5)
    assert found[1, 0, 1, 1] == found[1, 0, 0, 0]


@pytest.mark.parametrize(
    ("missing", "b01", "b09"),
    [
        (
            "nearest",
            lambda raw: plain("sentinel2_l2a", "B01", raw[0]),
            lambda raw: plain("sentinel2_l2a", "B09", raw[7]),
        ),
        ("mean", lambda _: 0.5, lambda _: 0.5),
        ("zero", lambda _: 0.0, lambda _: 0.0),
    ],
)
def test_ten_bands_of_twelve(missing: Any, b01: Any, b09: Any) -> None:
    raw = dn(bands=10)
    found = normalize(RasterImage(raw), S2[:10], missing_bands=missing).image
    pixel = raw[:, 1, 2, 3].tolist()
    assert found.shape == (12, 3, 4, 4)
    assert torch.equal(found[:10], normalize(RasterImage(torch.cat([raw, raw[:2]])), S2).image[:10])
    assert found[10, 1, 2, 3].item() == pytest.approx(b01(pixel), abs=1e-5)
    assert found[11, 1, 2, 3].item() == pytest.approx(b09(pixel), abs=1e-5)


def test_no_reflective_band_stands_for_a_thermal_one() -> None:
    found = normalize(RasterImage(dn(1, 9)), LANDSAT[:9], "landsat").image
    assert (found[9:] == 0.5).all()
    assert (
        normalize(RasterImage(-5 - torch.rand(1, 1, 2, 2)), ["vv"], "sentinel1", sentinel1_units="db").image[1] == 0.5
    ).all()


def test_plain_tensors_hold_their_dates_stacked() -> None:
    series = dn(dates=3)
    stacked = series.transpose(0, 1).flatten(0, 1)
    found = normalize(stacked)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, normalize(RasterImage(series)).image.transpose(0, 1).flatten(0, 1))
    single = normalize(series[:10, 0], S2[:10])
    assert torch.equal(single, normalize(RasterImage(series[:10, :1]), S2[:10]).image[:, 0])


def test_series_concatenated_by_channel_become_series() -> None:
    series = dn(dates=3)
    parts = {f"part_{t}": RasterImage(series[:, t : t + 1], months([t + 1])) for t in range(3)}
    selections: dict[str, list[int]] = {name: [] for name in parts}
    sample, _ = Concatenate(selections, "sentinel2_l2a", concatenate_dim=0)(dict(parts), {})
    found = normalize(sample["sentinel2_l2a"])
    assert torch.equal(found.image, normalize(RasterImage(series)).image)
    assert found.timestamps is None


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.float64, torch.float32])
def test_the_input_is_never_changed(dtype: torch.dtype) -> None:
    raw = dn(bands=10).to(dtype)
    shared = RasterImage(raw, months([1, 2, 3]))
    before = raw.clone()
    sample = {"image": shared, "sentinel2_l2a": shared, "other": torch.ones(1)}
    found, target = HeliosNormalize({"sentinel2_l2a": S2[:10]})(sample, {"label": 1})
    assert torch.equal(raw, before)
    assert sample == {"image": shared, "sentinel2_l2a": shared, "other": sample["other"]}
    assert found["image"] is shared
    assert found["other"] is sample["other"]
    assert target == {"label": 1}
    assert found["sentinel2_l2a"].image.dtype == torch.float32
    again = HeliosNormalize({"sentinel2_l2a": S2[:10]})(sample, {})[0]
    assert torch.equal(again["sentinel2_l2a"].image, found["sentinel2_l2a"].image)


# Nodata


@pytest.mark.parametrize("hole", [0.0, float("nan"), float("inf"), -math.inf, -9999.0, -32768.0, -99999.0])
def test_nodata_pixels_become_the_middle(hole: float) -> None:
    raw = dn()
    raw[:, 1, 2, 3] = hole
    found = normalize(RasterImage(raw, months([1, 2, 3])))
    assert (found.image[:, 1, 2, 3] == 0.5).all()
    raw[:, 1, 2, 3] = 1234
    expected = normalize(RasterImage(raw)).image
    expected[:, 1, 2, 3] = 0.5
    assert torch.equal(found.image, expected)


def test_nodata_in_one_band_leaves_the_others() -> None:
    raw = dn()
    whole = normalize(RasterImage(raw.clone())).image
    raw[4, 0, 0, 0] = float("nan")
    raw[5, 0, 0, 0] = 0
    found = normalize(RasterImage(raw)).image
    assert found[4, 0, 0, 0] == 0.5
    assert found[5, 0, 0, 0].item() == pytest.approx(plain("sentinel2_l2a", S2[5], 0), abs=1e-5)
    found[4:6, 0, 0, 0] = whole[4:6, 0, 0, 0]
    assert torch.equal(found, whole)


def test_nodata_in_a_band_reaches_those_that_it_stands_for() -> None:
    raw = dn(bands=10)
    raw[0, 0, 0, 0] = float("nan")
    found = normalize(RasterImage(raw), S2[:10], fill_value=0.25).image
    assert found[0, 0, 0, 0] == found[10, 0, 0, 0] == 0.25


@pytest.mark.parametrize("hole", [0.0, float("nan"), -32768.0])
def test_dates_without_a_pixel_are_taken_out(hole: float) -> None:
    raw = dn(dates=4)
    whole = normalize(RasterImage(raw.clone())).image
    raw[:, 1:3] = hole
    dated = normalize(RasterImage(raw, months([1, 2, 3, 4])))
    assert torch.equal(dated.image, whole[:, [0, 3]])
    assert dated.timestamps == months([1, 4])
    undated = normalize(RasterImage(raw)).image
    assert undated.shape == whole.shape
    assert (undated[:, 1:3] == 0.5).all()
    assert (normalize(raw[:, 1]) == 0.5).all()


@pytest.mark.parametrize("units", ["linear", "db"])
def test_an_image_without_any_data_keeps_its_shape_but_no_date(units: Any) -> None:
    found = normalize(
        RasterImage(torch.zeros(2, 3, 4, 4), months([1, 2, 3])), ["vv", "vh"], "sentinel1", sentinel1_units=units
    )
    assert found.image.shape == (2, 0, 4, 4)
    assert found.timestamps == []
    for transform in (Pad(size=6, image_selectors=["sentinel1"]), Flip(image_selectors=["sentinel1"])):
        found = transform({"sentinel1": found}, {})[0]["sentinel1"]
    assert found.image.shape == (2, 0, 6, 6)


def test_zero_is_a_height() -> None:
    heights = torch.zeros(1, 1, 2, 2)
    found = normalize(RasterImage(heights, months([1])), ["srtm"], "srtm").image
    assert found.flatten().tolist() == pytest.approx([plain("srtm", "srtm", 0)] * 4)


# Units


@pytest.mark.parametrize(("units", "factor"), [("reflectance", 1e-4), ("reflectance_8bit", 0.0255)])
def test_reflectance_becomes_digital_numbers(units: Any, factor: float) -> None:
    numbers = torch.randint(1, 250, (len(S2), 2, 4, 4)).float() / 0.0255
    numbers[:, 0, 0, 0] = 0
    plain_image = normalize(RasterImage(numbers, months([1, 2])), S2).image
    given = (numbers * factor).round() if units == "reflectance_8bit" else numbers * factor
    image = normalize(RasterImage(given, months([1, 2])), S2, optical_units=units).image
    assert torch.allclose(image, plain_image, atol=1e-5)
    assert (image[:, 0, 0, 0] == 0.5).all()


@pytest.mark.parametrize(
    ("values", "units", "message"),
    [
        ([1.0, 4000.0], "reflectance_8bit", "8-bit values are at most 255; set optical_units to digital_numbers"),
        ([0.1, 0.7], "reflectance_8bit", "8-bit values are whole numbers; set optical_units to reflectance"),
        ([1.0, 200.0], "reflectance", "reflectance is never above 3"),
        ([0.1, 0.7], "digital_numbers", "set optical_units to reflectance"),
    ],
)
def test_optical_values_in_other_units(values: list[float], units: Any, message: str) -> None:
    raw = torch.tensor(values).repeat(len(S2), 1, 2, 1)
    with pytest.raises(DataError, match=message):
        normalize(RasterImage(raw), S2, optical_units=units)


def test_landsat_is_known_in_digital_numbers_only() -> None:
    with pytest.raises(ConfigError, match=r"optical_units: is about Sentinel-2"):
        HeliosNormalize({"landsat": LANDSAT}, optical_units="reflectance")


@pytest.mark.parametrize(
    ("modality", "values", "units", "message"),
    [
        ("sentinel1", (-22.0, -3.0), "linear", "this looks like dB; set sentinel1_units to db"),
        ("sentinel1", (0.001, 0.3), "db", "this looks like linear power; set sentinel1_units to linear"),
        ("sentinel1", (20.0, 800.0), "linear", "this looks like amplitude or digital numbers"),
        ("sentinel1", (20.0, 800.0), "db", "this looks like amplitude or digital numbers"),
        ("sentinel1", (-2200.0, -300.0), "db", "this looks like scaled integers"),
        ("sentinel2_l2a", (0.02, 0.9), "db", "this looks like reflectance"),
        ("landsat", (0.02, 1.4), "db", "this looks like reflectance"),
    ],
)
@pytest.mark.parametrize("hole", [None, 0.0, float("nan"), -9999.0])
def test_values_that_contradict_the_units(
    modality: str, values: tuple[float, float], units: Any, message: str, hole: float | None
) -> None:
    bands = {"sentinel1": ["vv", "vh"], "sentinel2_l2a": S2, "landsat": LANDSAT}[modality]
    raw = torch.empty(len(bands), 2, 8, 8).uniform_(*values)
    if hole is not None:
        raw[:, 0, :3] = hole
    with pytest.raises(DataError, match=message) as error:
        normalize(RasterImage(raw), bands, modality, sentinel1_units=units)
    assert f"{modality} values lie in" in str(error.value)


@pytest.mark.parametrize(
    ("values", "units"),
    [
        ((-0.01, 0.4), "linear"),
        ((0.0, 900.0), "linear"),
        ((-35.0, 12.0), "db"),
        ((-100.0, -5.0), "db"),
        ((-4.0, 25.0), "db"),
    ],
)
def test_values_of_real_scenes_pass(values: tuple[float, float], units: Any) -> None:
    raw = torch.empty(2, 1, 16, 16).uniform_(*values)
    raw[0, 0, 0, 0], raw[1, 0, 0, 0] = values
    assert normalize(RasterImage(raw), ["vv", "vh"], "sentinel1", sentinel1_units=units).image.isfinite().all()


# Errors and files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"band_names": {"sentinel2": S2}}, "band_names.sentinel2: unknown modality; did you mean sentinel2_l2a?"),
        ({"band_names": {"sentinel2_l2a": ["B02", "B8a"]}}, "unknown band 'B8a'; did you mean B8A?"),
        ({"band_names": {"sentinel1": ["vv", "vv"]}}, "band_names.sentinel1: listed twice: vv"),
        ({"band_names": {"sentinel1": []}}, "band_names.sentinel1: no bands; the encoder's are vv, vh"),
        ({"band_names": {}, "sentinel1_units": "dB"}, "sentinel1_units: got 'dB', allowed: linear, db"),
        ({"band_names": {}, "missing_bands": "none"}, "missing_bands: got 'none', allowed: nearest, mean, zero"),
        ({"band_names": {}, "std_multiplier": 0}, "std_multiplier: got 0, must be positive"),
        ({"band_names": {}, "config_fname": "no/such.json"}, "config_fname: no such file 'no/such.json'"),
        ({"band_names": {}, "config_fname": "/opt/helios/other.json"}, "no such file '/opt/helios/other.json'"),
        ({"band_names": {}, "config_fname": "/data/computed.json"}, "no such file '/data/computed.json'"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        HeliosNormalize(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        HeliosNormalize({"sentinel1": ["hh", "hv"], "sentinel3": ["Oa1"]}, sentinel1_units="power")  # type: ignore[arg-type]
    assert len(error.value.problems) == 4


def test_samples_that_do_not_fit() -> None:
    two = HeliosNormalize({"sentinel2_l2a": S2[:10]})
    with pytest.raises(DataError, match="no input 'sentinel2_l2a'; its inputs: image"):
        two({"image": 1}, {})
    with pytest.raises(DataError, match=r"shape \(12, 2, 4, 4\) .*band_names lists 10 bands"):
        two({"sentinel2_l2a": RasterImage(dn(2))}, {})
    with pytest.raises(DataError, match="2 dates but 1 timestamps"):
        two({"sentinel2_l2a": RasterImage(dn(2, 10), months([1]))}, {})
    lenient = HeliosNormalize({"sentinel2_l2a": S2[:10]}, skip_missing=True)
    assert lenient({"image": 1}, {}) == ({"image": 1}, {})


def test_the_file_of_a_container_image_means_the_shipped_statistics() -> None:
    old = normalize(RasterImage(dn()), config_fname="/opt/helios/data/norm_configs/computed.json")
    assert torch.equal(old.image, normalize(RasterImage(dn())).image)


def test_statistics_of_ones_own(tmp_path: Path) -> None:
    bands = {band: {"mean": 1000.0, "std": 250.0} for band in reversed(S2)}
    file = tmp_path / "computed.json"
    file.write_text(json.dumps({"sentinel2_l2a": bands, "mine": {"x": {"mean": 1, "std": 2}}, "total_n": 3}))
    raw = dn()
    assert torch.allclose(normalize(RasterImage(raw), config_fname=str(file)).image, (raw - 500) / 1000, atol=1e-6)
    mine = normalize(RasterImage(torch.ones(1, 1, 1, 1)), ["x"], "mine", config_fname=str(file))
    assert mine.image.item() == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[1]", "holds no mapping of modalities"),
        ('{"sentinel1": {"vv": {"mean": 1, "std": 1}}}', "sentinel1 lacks the bands vh"),
        ('{"srtm": {"srtm": {"mean": 1}}}', "srtm.srtm has no numbers `mean` and `std`"),
        ('{"srtm": {"srtm": {"mean": 1, "std": 0}}}', "srtm.srtm.std is 0.0, must be positive"),
    ],
)
def test_files_that_hold_no_statistics(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "computed.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        HeliosNormalize({}, config_fname=str(tmp_path / "computed.json"))
    assert message in str(error.value)
