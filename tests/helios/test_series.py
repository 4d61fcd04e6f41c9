"""Galileo and Presto: gaps are masked, bands may be missing, place and terrain reach the encoder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rasterio.crs import CRS
from rslearn.models.galileo.galileo import GalileoModel, GalileoSize
from rslearn.models.galileo.single_file_galileo import Encoder
from rslearn.models.presto import Presto as RslearnPresto
from rslearn.models.presto.single_file_presto import Presto as PrestoWeights
from rslearn.train.model_context import ModelContext, RasterImage, SampleMetadata
from rslearn.utils.geometry import Projection

from rslp.errors import CheckpointError, ConfigError, DataError
from rslp.helios.encoders import GALILEO, PRESTO, encoder_of
from rslp.helios.galileo import Galileo
from rslp.helios.images import inputs as image_inputs
from rslp.helios.images.series import window_place
from rslp.helios.presto import Presto

CHANNELS = {"s1": 2, "s2": 10, "era5": 2, "srtm": 2, "dynamic_world": 1}
SCALE = {"s1": (-12, 3), "s2": (1500, 500), "era5": (285, 5), "srtm": (1500, 400)}
FULL = dict.fromkeys(("s1", "s2", "era5"), (1, 2, 3, 4))


def write_galileo(folder: Path) -> Path:
    """A small Galileo with random weights, in the form of the published ones."""
    (folder / "models/nano").mkdir(parents=True)
    torch.manual_seed(0)
    settings = {"depth": 1, "embedding_size": 32, "num_heads": 2}
    torch.save(Encoder(**settings).state_dict(), folder / "models/nano/encoder.pt")
    (folder / "models/nano/config.json").write_text(json.dumps({"model": {"encoder": settings}}))
    return folder


def write_presto(folder: Path) -> Path:
    """Presto with random weights, in the form of the published ones."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(PrestoWeights.construct().state_dict(), folder / "default_model.pt")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {"galileo": str(write_galileo(folder / "galileo")), "presto": str(write_presto(folder / "presto"))}


def build(name: str, weights: dict[str, str], **options: Any) -> Any:
    if name == "galileo":
        return Galileo(GalileoSize.NANO, patch_size=1, pretrained_path=weights[name], **options).eval()
    return Presto(weights[name], **options).eval()


@pytest.fixture(params=["galileo", "presto"])
def encoder(request: pytest.FixtureRequest, weights: dict[str, str]) -> Iterator[Any]:
    yield build(request.param, weights)


def month(number: int) -> tuple[datetime, datetime]:
    return datetime(2020, number, 3, tzinfo=UTC), datetime(2020, number, 20, tzinfo=UTC)


def sample(months: dict[str, tuple[int, ...]], *, seed: int = 0, size: int = 1, srtm: bool = False) -> dict[str, Any]:
    """Random values of each sensor in the given months; the same seed gives the same values for a month."""
    made = {}
    for key, numbers in [*months.items(), *([("srtm", (0,))] if srtm else [])]:
        mean, spread = SCALE[key]
        rng = [np.random.default_rng((seed, number, len(key), ord(key[-1]))) for number in numbers]
        values = [r.normal(mean, spread, (CHANNELS[key], size, size)) for r in rng]
        dates = [month(n) for n in numbers] if key != "srtm" else None
        made[key] = RasterImage(torch.tensor(np.stack(values, 1), dtype=torch.float32), dates)
    return made


def metadata(zone: int = 31, column: int = 50_000) -> SampleMetadata:
    bounds = (column, -500_000, column + 1, -499_999)
    return SampleMetadata(
        window_group="g", window_name="w", window_bounds=bounds, crop_bounds=bounds, crop_idx=0, num_crops_in_window=1,
        time_range=None, projection=Projection(CRS.from_epsg(32600 + zone), 10, -10), dataset_source="d",
    )  # fmt: skip


@torch.no_grad()
def features(model: torch.nn.Module, *samples: dict[str, Any], places: tuple[SampleMetadata, ...] = ()) -> torch.Tensor:
    (only,) = model(ModelContext(inputs=list(samples), metadatas=list(places))).feature_maps
    return only


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def changed(of: dict[str, Any], key: str, change: Any) -> dict[str, Any]:
    """A copy of a sample with another image of one input."""
    image = of[key].image.clone()
    change(image)
    return {**of, key: RasterImage(image, of[key].timestamps)}


def test_without_gaps_they_are_rslearns(weights: dict[str, str]) -> None:
    batch = [sample(FULL, seed=n, size=3, srtm=True) for n in range(2)]
    repeated = [{**one, "srtm": RasterImage(one["srtm"].image.expand(-1, 4, -1, -1))} for one in batch]
    theirs = RslearnPresto(weights["presto"]).eval()
    assert close(features(build("presto", weights), *batch), features(theirs, *repeated))
    batch = [sample(FULL, seed=n) for n in range(2)]
    settings = {"patch_size": 1, "pretrained_path": weights["galileo"], "autocast_dtype": None}
    assert close(
        features(build("galileo", weights), *batch), features(GalileoModel(GalileoSize.NANO, **settings).eval(), *batch)
    )


def test_shape_and_channels(encoder: Any) -> None:
    found = features(encoder, *(sample(FULL, seed=n, size=4, srtm=True) for n in range(3)))
    ((side, channels),) = encoder.get_backbone_channels()
    assert (side, found.dtype, tuple(found.shape)) == (1, torch.float32, (3, channels, 4, 4))


@pytest.mark.parametrize("training", [False, True])
def test_a_sample_is_encoded_the_same_in_any_company(encoder: Any, training: bool) -> None:
    encoder.train(training)
    samples = [
        sample(FULL, seed=1, srtm=True),
        sample({"s1": (2, 5), "s2": (2, 3)}, seed=2),
        sample({"era5": (7,)}, seed=3),
        sample({"s2": tuple(range(1, 13))}, seed=4, srtm=True),
    ]
    together = features(encoder, *samples)
    for index, one in enumerate(samples):
        assert close(together[index : index + 1], features(encoder, one)), index


def test_months_matter_and_the_order_of_dates_does_not(encoder: Any) -> None:
    one = sample({"s1": (2, 5), "s2": (2, 3)}, seed=2)
    later = {**one, "s1": RasterImage(one["s1"].image, [month(7), month(10)])}
    assert not torch.allclose(features(encoder, one), features(encoder, later), atol=1e-4)
    backwards = {**one, "s2": RasterImage(one["s2"].image.flip(1), one["s2"].timestamps[::-1])}
    assert close(features(encoder, one), features(encoder, backwards))


@pytest.mark.parametrize("nodata", [float("nan"), -9999.0])
def test_a_date_without_measurement_is_as_if_it_were_not_there(encoder: Any, nodata: float) -> None:
    one = sample(FULL, seed=1)
    gap = changed(one, "s2", lambda image: image[:, 2].fill_(nodata))
    left_out = {**one, "s2": RasterImage(one["s2"].image[:, [0, 1, 3]], [month(1), month(2), month(4)])}
    assert close(features(encoder, gap), features(encoder, left_out))
    assert not close(features(encoder, gap), features(encoder, one))


def test_a_missing_band_masks_its_group_and_no_other(weights: dict[str, str]) -> None:
    lacking = ["B02", "B03", "B04", "B08", "B11", "B12"]
    positions = [GALILEO.find("s2").bands.index(band) for band in lacking]  # type: ignore[union-attr]
    for name in ("galileo", "presto"):
        one = sample(FULL, seed=1)
        absent = [index for index in range(10) if index not in positions]
        marked = changed(one, "s2", lambda image, at=absent: image.index_fill_(0, torch.tensor(at), float("nan")))
        fewer = {**one, "s2": RasterImage(one["s2"].image[positions], one["s2"].timestamps)}
        with_bands = build(name, weights, bands={"s2": lacking})
        assert close(features(with_bands, fewer), features(build(name, weights), marked))
        swapped = build(name, weights, bands={"s2": lacking[::-1]})
        turned = {**one, "s2": RasterImage(fewer["s2"].image.flip(0), one["s2"].timestamps)}
        assert close(features(swapped, turned), features(with_bands, fewer))
        # One red-edge band alone is no token: B05, B06 and B07 are one.
        some = changed(one, "s2", lambda image: image[3].fill_(float("nan")))
        all_three = changed(one, "s2", lambda image: image[3:6].fill_(float("nan")))
        assert close(features(build(name, weights), some), features(build(name, weights), all_three))


@pytest.mark.parametrize("key", ["srtm", "era5", "s1"])
def test_each_input_reaches_the_encoder(encoder: Any, key: str) -> None:
    one = sample(FULL, seed=1, srtm=True)
    without = {name: image for name, image in one.items() if name != key}
    other = changed(one, key, lambda image: image.mul_(0.5))
    found = features(encoder, one)
    assert not torch.allclose(found, features(encoder, without), atol=1e-4)
    assert not torch.allclose(found, features(encoder, other), atol=1e-4)


def test_classes_of_the_ground_reach_presto(weights: dict[str, str]) -> None:
    model, one = build("presto", weights), sample(FULL, seed=1)
    classes = RasterImage(torch.full((1, 4, 1, 1), 4.0), [month(n) for n in (1, 2, 3, 4)])
    none = RasterImage(torch.full((1, 4, 1, 1), 9.0), classes.timestamps)
    assert not close(features(model, {**one, "dynamic_world": classes}), features(model, one))
    assert close(features(model, {**one, "dynamic_world": none}), features(model, one))


def test_the_place_of_the_window_reaches_the_encoder(encoder: Any) -> None:
    one, here, there = sample(FULL, seed=1), metadata(), metadata(zone=36)
    lat, lon = window_place(here)
    assert (lat, lon) == pytest.approx((45.15, 3.0), abs=0.1)
    found = features(encoder, one, places=(here,))
    assert not torch.allclose(found, features(encoder, one), atol=1e-5)
    assert not torch.allclose(found, features(encoder, one, places=(there,)), atol=1e-5)
    given = RasterImage(torch.tensor([lat, lon]).view(2, 1, 1, 1))
    assert close(features(encoder, {**one, "latlon": given}), found)
    assert close(features(encoder, {**one, "latlon": given}, places=(there,)), found)
    # In a batch, samples with and without a place.
    both = features(encoder, {**one, "latlon": given}, one)
    assert close(both[:1], found)
    assert close(both[1:], features(encoder, one))
    encoder.use_location = False
    assert close(features(encoder, one, places=(here,)), features(encoder, one))


@pytest.mark.parametrize("stored", [True, False, None])
def test_weights_say_whether_they_were_trained_with_places(
    encoder: Any, stored: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    state = encoder.state_dict()
    state["uses_location"] = torch.tensor(stored is True)
    if stored is None:  # a checkpoint from before there were places
        del state["uses_location"]
    with caplog.at_level(logging.WARNING):
        encoder.load_state_dict(state)
    assert encoder.use_location is (stored is True)
    assert bool(encoder.state_dict()["uses_location"]) is (stored is True)
    assert ("trained without the location of windows" in caplog.text) is (stored is not True)


def test_an_input_of_one_pixel_holds_for_the_whole_image(encoder: Any) -> None:
    large, point = sample({"s2": (1, 2, 3)}, size=4), sample({"era5": (1, 2, 3)}, srtm=True)
    whole = {key: RasterImage(image.image.expand(-1, -1, 4, 4), image.timestamps) for key, image in point.items()}
    assert close(features(encoder, {**large, **point}), features(encoder, {**large, **whole}))


def test_a_sample_without_any_measurement_is_finite_and_alters_nothing(
    encoder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    image_inputs.say_once.cache_clear()
    empty = changed(sample({"s2": (1, 2)}), "s2", lambda image: image.fill_(float("nan")))
    full = sample(FULL, seed=1)
    encoder.train()
    found = encoder(ModelContext(inputs=[empty, full], metadatas=[])).feature_maps[0]
    found.square().sum().backward()
    assert found.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
    assert close(found[1:].detach(), features(encoder, full))
    assert "no measurement in any of" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "a sample has none of (Galileo|Presto)'s inputs s1, s2"),
        ({"s2": RasterImage(torch.zeros(10, 2, 1, 1))}, "'s2' has no timestamps, but (Galileo|Presto) needs the month"),
        ({"s2": RasterImage(torch.zeros(10, 2, 1, 1), [month(1)])}, "2 dates but 1 timestamps"),
        ({"s2": RasterImage(torch.zeros(9, 1, 1, 1), [month(1)])}, "'s2' has 9 bands, the encoder takes B02, B03"),
        (sample({"s2": (1,)}, size=4) | sample({"s1": (1,)}, size=3), r"different sizes \(H x W px\): 3x3, 4x4"),
        ({"s1": RasterImage(torch.zeros(2, 25, 1, 1), [month(1)] * 25)}, "a sample has 25 dates; .* takes 24 at most"),
    ],
)
def test_inputs_that_do_not_fit(encoder: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        features(encoder, change)


def test_images_that_patches_do_not_divide(weights: dict[str, str]) -> None:
    model = Galileo(GalileoSize.NANO, patch_size=2, pretrained_path=weights["galileo"])
    assert features(model, sample({"s2": (1,)}, size=1)).shape[2:] == (1, 1)
    assert features(model, sample({"s2": (1,)}, size=4)).shape[2:] == (2, 2)
    with pytest.raises(DataError, match="images of 3x3 px are no multiple of the patch size 2"):
        features(model, sample({"s2": (1,)}, size=3))


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ({"sentinel2": ["B02"]}, "has no such input"),
        ({"s2": ["B02", "B10"]}, "has no band 'B10'; its bands: B02, B03"),
        ({"s2": ["B02", "B2"]}, "a band is listed twice"),
        ({"s2": []}, "no bands; the encoder's are B02"),
    ],
)
@pytest.mark.parametrize("name", ["galileo", "presto"])
def test_bands_that_do_not_exist(weights: dict[str, str], name: str, bands: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, weights, bands=bands)


def test_weights_that_are_absent_or_of_something_else(weights: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/default_model\.pt: no such file"):
        Presto("nowhere")
    torch.save({"a": torch.ones(2)}, tmp_path / "default_model.pt")
    with pytest.raises(CheckpointError, match="no weights of Presto"):
        Presto(str(tmp_path))
    (tmp_path / "default_model.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="no weights of Presto"):
        Presto(str(tmp_path))


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    for make in (Presto, lambda: Galileo(GalileoSize.TINY)):
        with pytest.raises(CheckpointError, match=r"can't be downloaded .*set pretrained_path to a folder") as raised:
            make()
        assert "\n" not in str(raised.value)


def test_the_table_agrees_with_rslearn() -> None:
    from rslearn.models.galileo import single_file_galileo as galileo
    from rslearn.models.presto import presto

    assert {one.name for one in GALILEO.inputs} == set(GalileoModel.input_keys)
    assert {one.name for one in PRESTO.inputs} == set(RslearnPresto.input_keys)
    shown = {"s2": galileo.S2_BANDS, "s1": galileo.S1_BANDS, "srtm": galileo.SRTM_BANDS, "tc": galileo.TC_BANDS}
    for key, bands in (*shown.items(), ("viirs", galileo.VIIRS_BANDS), ("landscan", galileo.LANDSCAN_BANDS)):
        known = GALILEO.find(key)
        assert known is not None
        assert [band.lower().replace("b0", "b") for band in known.bands] == [band.lower() for band in bands]
    for key, long_bands in (("dw", galileo.DW_BANDS), ("wc", galileo.WC_BANDS), ("era5", galileo.ERA5_BANDS)):
        known = GALILEO.find(key)
        assert known is not None
        assert all(own in theirs for own, theirs in zip(known.bands, long_bands, strict=True))
    taken = [band for key in ("s1", "s2", "era5", "srtm") for band in PRESTO.find(key).bands]  # type: ignore[union-attr]
    assert [*taken, "NDVI"] == presto.INPUT_PRESTO_BANDS
    assert encoder_of("rslp.helios.presto.Presto") is PRESTO
    assert encoder_of("some.Encoder") is None
