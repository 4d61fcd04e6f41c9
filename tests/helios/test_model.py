"""The encoder: dates, months and masks mean what they say, and a sample is encoded the same in any company."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.constants import Modality
from rslearn.models.component import FeatureMaps, TokenFeatureMaps
from rslearn.models.multitask import MultiTaskModel
from rslearn.models.olmoearth_pretrain.model import OlmoEarth
from rslearn.models.pooling_decoder import PoolingDecoder
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks.regression import RegressionHead
from rslearn.train.transforms.concatenate import Concatenate

from rslp.errors import CheckpointError, ConfigError, DataError
from rslp.helios.images import inputs
from rslp.helios.model import Helios
from rslp.helios.norm import HeliosNormalize
from tests.helios import tiny_helios as tiny
from tests.helios.tiny_helios import context, image

YEAR = tuple(range(1, 13))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def rope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of today's kind: rotary positions in time and space, one token per sensor."""
    bands = {"sentinel2_l2a": [tiny.S2]}
    groups = {
        name: {"_CLASS_": "olmoearth_pretrain.nn.tokenization.ModalityTokenization", "band_groups": groups}
        for name, groups in bands.items()
    }
    tokens = {"_CLASS_": "olmoearth_pretrain.nn.tokenization.TokenizationConfig", "overrides": groups}
    content = tiny.config(position_encoding="rope_3d", tokenization_config=tokens, use_linear_patch_embed=True)
    content["model"]["encoder_config"] |= {"embedding_size": 32}
    content["model"]["decoder_config"] |= {"encoder_embedding_size": 32, "tokenization_config": tokens}
    return tiny.write_config(tmp_path_factory.mktemp("rope"), content)


@pytest.fixture(params=["bundle", "rope"])
def encoder(request: pytest.FixtureRequest) -> Iterator[Helios]:
    folder = request.getfixturevalue(request.param)
    torch.manual_seed(3)
    yield Helios(str(folder), patch_size=4, random_initialization=True).eval()


@torch.no_grad()
def features(encoder: Helios, *samples: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    found = encoder(context(*samples, **kwargs))
    assert isinstance(found, FeatureMaps)
    (only,) = found.feature_maps
    return only


def both(s2: Any = YEAR, s1: Any = YEAR, seed: int = 0) -> dict[str, Any]:
    return {"sentinel2_l2a": image("sentinel2_l2a", s2, seed), "sentinel1": image("sentinel1", s1, seed)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-6)


# The place in a model


def test_shape_type_and_channels(encoder: Helios) -> None:
    found = features(encoder, both(), both(seed=1), both(seed=2))
    assert found.shape == (3, encoder.embedding_size, 2, 2)
    assert found.dtype == torch.float32
    assert encoder.get_backbone_channels() == [[4, encoder.embedding_size]]
    assert found.std() > 0.01


@pytest.mark.parametrize("where", ["forward_kwargs", "patch_size"])
def test_the_patch_size_by_either_name(bundle: Path, where: str) -> None:
    size: dict[str, Any] = {"patch_size": 2} if where == "patch_size" else {"forward_kwargs": {"patch_size": 2}}
    encoder = Helios(str(bundle), selector=["encoder"], **size).eval()
    assert encoder.get_backbone_channels() == [[2, tiny.EMBEDDING]]
    assert features(encoder, both()).shape == (1, tiny.EMBEDDING, 4, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", None, "float32", "auto"])
def test_features_are_float32_whatever_is_computed_in(bundle: Path, dtype: str | None) -> None:
    exact = features(Helios(str(bundle), patch_size=4, autocast_dtype=None).eval(), both())
    found = features(Helios(str(bundle), patch_size=4, autocast_dtype=dtype).eval(), both())
    assert found.dtype == torch.float32
    assert torch.equal(found, exact) is (dtype != "bfloat16")
    assert torch.allclose(found, exact, atol=0.1)


def test_stock_features_in_half_precision_break_the_decoder_and_ours_do_not(bundle: Path) -> None:
    stock = OlmoEarth(4, model_path=str(bundle), use_legacy_timestamps=False).eval()
    ours = Helios(str(bundle), patch_size=4).eval()
    decoder = PoolingDecoder(in_channels=tiny.EMBEDDING, out_channels=1)
    given = context(both())
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"same dtype|BFloat16"):
            decoder(stock(given), given)
        assert decoder(ours(given), given).feature_vector.dtype == torch.float32


def test_as_rslearn_computes_it(bundle: Path) -> None:
    ours = Helios(str(bundle), patch_size=4).eval()
    theirs = OlmoEarth(4, model_path=str(bundle), autocast_dtype=None, use_legacy_timestamps=False).eval()
    only_s2 = {"sentinel2_l2a": image("sentinel2_l2a", YEAR)}
    batch = [both(seed=1), both(YEAR[3:], YEAR[3:], seed=2), only_s2]
    for part in (batch[:1], batch[1:2], batch[2:]):
        with torch.no_grad():
            assert same(features(ours, *part), theirs(context(*part)).feature_maps[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = OlmoEarth(4, model_path=str(bundle), autocast_dtype=None, use_legacy_timestamps=True).eval()
    ours = Helios(str(bundle), patch_size=4, use_legacy_timestamps=True).eval()
    with torch.no_grad():
        assert same(features(ours, both()), theirs(context(both())).feature_maps[0])


def test_in_rslearns_multi_task_model(bundle: Path) -> None:
    encoder = Helios(str(bundle), patch_size=4, autocast_dtype="bfloat16")
    decoder = [PoolingDecoder(in_channels=tiny.EMBEDDING, out_channels=1), RegressionHead()]
    model = MultiTaskModel(encoder=[encoder], decoders={"fuel": decoder})
    names = [name for name, _ in model.named_parameters() if name.startswith("encoder.")]
    assert names
    assert all(name.startswith("encoder.0.model.") for name in names)
    target = {"fuel": {"value": torch.tensor(0.5), "valid": torch.tensor(1.0)}}
    output = model(context(both(), both(YEAR[:5])), [target, target])
    sum(output.loss_dict.values()).backward()
    gradient = encoder.model.blocks[0].attn.q.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_copies(encoder: Helios, clone: Any) -> None:
    batch = [both(), both(YEAR[:5])]
    assert torch.equal(features(clone(encoder), *batch), features(encoder, *batch))


# Time


def test_months_reach_the_encoder(encoder: Helios) -> None:
    summer, winter = both(s2=(6,), s1=()), both(s2=(6,), s1=())
    winter["sentinel2_l2a"].timestamps = tiny.months((12,))
    assert not same(features(encoder, summer), features(encoder, winter))
    encoder.use_legacy_timestamps = True
    assert torch.equal(features(encoder, summer), features(encoder, winter))


def test_the_order_of_images_does_not_matter(encoder: Helios) -> None:
    forward, backward = both(), both()
    shuffled = forward["sentinel2_l2a"]
    backward["sentinel2_l2a"] = RasterImage(shuffled.image.flip(1), timestamps=shuffled.timestamps[::-1])
    assert same(features(encoder, forward), features(encoder, backward))


def test_exchanging_two_months_matters(encoder: Helios) -> None:
    right, wrong = both(), both()
    wrong["sentinel2_l2a"].timestamps = tiny.months((7, 2, 3, 4, 5, 6, 1, 8, 9, 10, 11, 12))
    assert not same(features(encoder, right), features(encoder, wrong))


def test_months_survive_the_concatenation_of_old_configs(encoder: Helios) -> None:
    parts = {f"sentinel2_{index}": image("sentinel2_l2a", (month,)) for index, month in enumerate(YEAR)}
    concatenate = Concatenate(selections={name: [] for name in parts}, output_selector="sentinel2_l2a")
    sample, _ = concatenate(dict(parts), {})
    assert sample["sentinel2_l2a"].timestamps == tiny.months(YEAR)
    assert torch.equal(features(encoder, sample), features(encoder, {"sentinel2_l2a": image("sentinel2_l2a", YEAR)}))


def test_one_part_without_timestamps_is_an_error_that_names_the_way_out(encoder: Helios) -> None:
    parts = {f"sentinel2_{index}": image("sentinel2_l2a", (month,)) for index, month in enumerate(YEAR)}
    parts["sentinel2_3"].timestamps = None
    sample, _ = Concatenate(selections={name: [] for name in parts}, output_selector="sentinel2_l2a")(dict(parts), {})
    with pytest.raises(DataError, match=r"of window 'w7' has 12 dates without timestamps; .*use_legacy_timestamps"):
        features(encoder, sample)
    encoder.use_legacy_timestamps = True
    assert features(encoder, sample).isfinite().all()


def test_a_single_image_without_timestamp_takes_the_windows_time(
    encoder: Helios, caplog: pytest.LogCaptureFixture
) -> None:
    dated = {"sentinel2_l2a": image("sentinel2_l2a", (7,))}
    bare = {"sentinel2_l2a": RasterImage(dated["sentinel2_l2a"].image)}
    july = (datetime(2023, 7, 1, tzinfo=UTC), datetime(2023, 7, 20, tzinfo=UTC))
    inputs.say_once.cache_clear()
    assert same(features(encoder, bare, time_range=july), features(encoder, dated))
    assert "the middle of the window's time range is used" in caplog.text
    with pytest.raises(DataError, match="without timestamps"):
        features(encoder, bare)


def test_stacked_tensors_of_old_configs(bundle: Path) -> None:
    encoder = Helios(str(bundle), patch_size=4, use_legacy_timestamps=True).eval()
    series = image("sentinel2_l2a", YEAR)
    stacked = series.image.transpose(0, 1).flatten(0, 1)
    assert torch.equal(features(encoder, {"sentinel2_l2a": stacked}), features(encoder, {"sentinel2_l2a": series}))
    with pytest.raises(DataError, match="has 13 bands, the encoder takes 12"):
        features(encoder, {"sentinel2_l2a": stacked[:13]})


def test_legacy_months_end_in_december(bundle: Path) -> None:
    encoder = Helios(str(bundle), patch_size=4, use_legacy_timestamps=True)
    with pytest.raises(DataError, match="12 dates at most, got 13"):
        features(encoder, {"sentinel2_l2a": RasterImage(torch.rand(12, 13, 8, 8))})


# What is missing


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "short",
    [
        both(YEAR[:5], YEAR[:5]),
        both(YEAR[4:], YEAR[:3]),
        both((1, 2, 5, 12), (2, 3)),
        {"sentinel2_l2a": image("sentinel2_l2a", YEAR)},
        {"sentinel1": image("sentinel1", (4,))},
        both((), (1, 2)),
    ],
)
def test_a_sample_is_encoded_the_same_in_any_company(encoder: Helios, short: dict[str, Any], training: bool) -> None:
    encoder.train(training)  # drop path is off in these models
    alone = features(encoder, short)[0]
    together = features(encoder, both(seed=1), short, both((3, 8), (), seed=2))
    assert same(together[1], alone)
    assert same(together[0], features(encoder, both(seed=1))[0])


def test_a_date_without_data_is_as_if_it_were_not_there(encoder: Helios) -> None:
    normalize = HeliosNormalize({"sentinel2_l2a": tiny.S2, "sentinel1": ["vv", "vh"]})
    raw = both()
    raw["sentinel2_l2a"].image *= 5000
    with_gaps = copy.deepcopy(raw)
    with_gaps["sentinel2_l2a"].image[:, 4] = 0
    with_gaps["sentinel1"].image[:, 7:9] = float("nan")
    left_out = {
        name: RasterImage(series.image[:, keep], [series.timestamps[index] for index in keep])
        for name, series, keep in (
            ("sentinel2_l2a", raw["sentinel2_l2a"], [0, 1, 2, 3, *range(5, 12)]),
            ("sentinel1", raw["sentinel1"], [*range(7), 9, 10, 11]),
        )
    }
    found = features(encoder, normalize(with_gaps, {})[0])
    assert torch.equal(found, features(encoder, normalize(left_out, {})[0]))
    assert not same(found, features(encoder, normalize(raw, {})[0]))


def test_values_of_masked_dates_do_not_matter(encoder: Helios, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [both(), both(YEAR[:6], YEAR[:6])]
    clean = features(encoder, *batch)
    stack = inputs._stack

    def dirty(*args: Any) -> torch.Tensor:
        stacked = stack(*args)
        stacked[1, :, 6:] = 1e3
        return stacked

    monkeypatch.setattr(inputs, "_stack", dirty)
    assert same(features(encoder, *batch), clean)


@pytest.mark.parametrize("company", [[], [both()]])
def test_a_sample_without_any_data_is_finite_and_alters_nothing(
    encoder: Helios, company: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    encoder.train()
    inputs.say_once.cache_clear()
    found = encoder(context(both((), ()), *company)).feature_maps[0]
    found.square().sum().backward()
    assert found.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
    assert "no valid date in any modality" in caplog.text
    if company:
        assert same(found[1].detach(), features(encoder, *company)[0])


def test_a_modality_without_time(tmp_path: Path) -> None:
    content = tiny.config()
    del content["train_module"]
    encoder = Helios(str(tiny.write_bundle(tmp_path, content)), patch_size=4).eval()
    cover = {"worldcover": RasterImage(torch.rand(1, 1, 8, 8))}
    alone = features(encoder, both(YEAR[:3]) | cover)
    assert not same(alone, features(encoder, both(YEAR[:3])))
    assert same(features(encoder, both(YEAR[:3]) | cover, both(seed=1))[:1], alone)
    with pytest.raises(DataError, match="'worldcover' has 2 dates, but this modality has no time"):
        features(encoder, {"worldcover": RasterImage(torch.rand(1, 2, 8, 8))})


def test_what_the_encoder_was_not_trained_to_take_is_ignored(encoder: Helios) -> None:
    cover = {"worldcover": RasterImage(torch.rand(1, 1, 8, 8)), "image": torch.rand(3, 8, 8)}
    assert torch.equal(features(encoder, both() | cover), features(encoder, both()))


def test_tokens_instead_of_their_mean(bundle: Path) -> None:
    encoder = Helios(str(bundle), patch_size=4, token_pooling=False).eval()
    with torch.no_grad():
        found = encoder(context(both((1, 2), (2,)), both((1, 2, 3), (1, 2, 3))))
    assert isinstance(found, TokenFeatureMaps)
    (tokens,), (mask,) = found.feature_maps, found.get_masks()
    assert tokens.shape == (2, tiny.EMBEDDING, 2, 2, 3 * 3 + 3 * 1)
    assert mask is not None
    assert mask[0, 0, 0].tolist() == [True] * 6 + [False] * 3 + [False, True, False]
    assert mask[1].all()
    assert tokens.dtype == torch.float32


# Errors


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {"image": torch.rand(3, 8, 8)},
            "no input for the encoder; it takes sentinel2_l2a, sentinel1, .*inputs: image",
        ),
        ({"sentinel1": RasterImage(torch.rand(3, 1, 8, 8))}, "'sentinel1' has 3 bands, the encoder takes 2"),
        ({"sentinel1": image("sentinel1", (1,), size=9)}, "images of 9x9 px are no multiple of patch_size 4"),
        (both((1,), ()) | {"sentinel1": image("sentinel1", (1,), size=4)}, "different sizes .*: 4x4, 8x8"),
        ({"sentinel1": RasterImage(torch.rand(2, 2, 8, 8), tiny.months((1,)))}, "2 dates but 1 timestamps"),
    ],
)
def test_inputs_that_do_not_fit(encoder: Helios, sample: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        features(encoder, sample)


def test_raw_values_are_refused(encoder: Helios) -> None:
    raw = both()
    raw["sentinel2_l2a"].image *= 3000
    with pytest.raises(
        DataError, match=r"'sentinel2_l2a' reaches 29\d\d\.\d+, so it is not normalised; add rslp\.helios"
    ):
        features(encoder, raw)


def test_absolute_positions_want_squares(bundle: Path, rope: Path) -> None:
    oblong = {"sentinel1": RasterImage(torch.rand(2, 1, 8, 12), tiny.months((1,)))}
    with pytest.raises(DataError, match="8x12 px: this model's position encoding needs square images"):
        features(Helios(str(bundle), patch_size=4), oblong)
    assert features(Helios(str(rope), patch_size=4, random_initialization=True), oblong).shape[2:] == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ConfigError, "Helios.patch_size: not given"),
        ({"patch_size": 4, "forward_kwargs": {"patch_size": 2}}, ConfigError, "given twice, as 4 and as .* 2"),
        ({"patch_size": 0}, ConfigError, "at least 1"),
        ({"patch_size": 8}, CheckpointError, "patch_size is 8, the model allows 1 to 4"),
        ({"patch_size": 4, "embedding_size": 768}, CheckpointError, "embedding size is 16, the config says 768"),
        ({"patch_size": 4, "autocast_dtype": "bf16"}, ConfigError, "got 'bf16', allowed: auto, bfloat16"),
        ({"patch_size": 4, "selector": ["encoder", "norm"]}, CheckpointError, "leads to a LayerNorm, .*no encoder"),
    ],
)
def test_arguments_that_do_not_fit(bundle: Path, arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        Helios(str(bundle), **arguments)
    assert "\n" not in str(raised.value)


def test_the_shapes_agree_with_the_package(encoder: Helios) -> None:
    assert {m.name: m.bands for m in encoder.modalities} == {
        name: Modality.get(name).num_bands for name in ("sentinel2_l2a", "sentinel1", "landsat")
    }
