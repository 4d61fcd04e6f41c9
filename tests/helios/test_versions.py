"""Every published architecture: as rslearn's wrapper computes it, from every form of checkpoint, with gaps masked."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from olmoearth_pretrain_minimal import ModelID
from olmoearth_pretrain_minimal.model_loader import ENCODER_INPUT_MODALITY_NAMES
from rslearn.models.component import FeatureMaps, TokenFeatureMaps
from rslearn.models.olmoearth_pretrain.model import EMBEDDING_SIZES, OlmoEarth

from rslp.errors import CheckpointError, ConfigError
from rslp.helios.checkpoint import published
from rslp.helios.checkpoint.architecture import Architecture
from rslp.helios.model import Helios
from tests.helios import tiny_helios as tiny
from tests.helios.published import IDS, architecture, small
from tests.helios.tiny_helios import context, image

VERSIONS = ("v1", "v1_1", "v1_2", "v1_3")
PAGE = (Path(__file__).parents[2] / "docs/encoder.md").read_text()
LOCATED: dict[str, Any] = {"use_location_token_output": True}
PROJECTED: dict[str, Any] = {**LOCATED, "projected_location_token_dim": 8}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("versions")
    return {version: tiny.write_bundle(folder / version, small(version)) for version in VERSIONS}


def sample(s2: Any = (1, 4, 9), s1: Any = (1, 4, 9), landsat: Any = (), seed: int = 0) -> dict[str, Any]:
    dates = {"sentinel2_l2a": s2, "sentinel1": s1, "landsat": landsat}
    return {name: image(name, months, seed) for name, months in dates.items() if months}


@torch.no_grad()
def features(encoder: Any, *samples: dict[str, Any]) -> torch.Tensor:
    found = encoder(context(*samples))
    assert isinstance(found, FeatureMaps | TokenFeatureMaps)
    return found.feature_maps[0]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)


# One batch with all sensors, one sample with gaps and other dates in each sensor, one sensor alone.
BATCHES = (
    [sample(landsat=(1, 4, 9)), sample(landsat=(1, 4, 9), seed=1)],
    [sample((1, 2, 7), (3, 7, 11, 12), (2,))],
    [sample((), (5, 6))],
)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("options", [{}, {"token_pooling": False}, {"use_legacy_timestamps": True}])
def test_as_rslearn_computes_it(bundles: dict[str, Path], version: str, options: dict[str, Any]) -> None:
    compare(bundles[version], options)


@pytest.mark.parametrize(
    "options",
    [
        LOCATED,
        PROJECTED,
        {**LOCATED, "projected_location_token_dim": 16},
        {**LOCATED, "forward_kwargs": {"location_query_patch_size": 1}},
        {**LOCATED, "sdpa_backends": ["math"]},
    ],
)
def test_location_tokens_as_rslearn_computes_them(bundles: dict[str, Path], options: dict[str, Any]) -> None:
    channels = options.get("projected_location_token_dim", 24)
    side = options.get("forward_kwargs", {}).get("location_query_patch_size", 4)
    encoder = compare(bundles["v1_3"], options)
    assert encoder.get_backbone_channels() == [[side, channels]]
    assert features(encoder, sample()).shape == (1, channels, 8 // side, 8 // side)


def compare(bundle: Path, options: dict[str, Any]) -> Helios:
    ours = Helios(str(bundle), patch_size=4, **options).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        settings = {"use_legacy_timestamps": False, **options}
        theirs = OlmoEarth(4, model_path=str(bundle), autocast_dtype=None, **settings).eval()
    for batch in BATCHES:
        assert close(features(ours, *batch), features(theirs, *batch))
    return ours


@pytest.mark.parametrize("version", VERSIONS)
def test_from_every_form_of_checkpoint(
    bundles: dict[str, Path], version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles[version]
    first = Helios(str(bundle), patch_size=4).eval()
    tiny.write_distributed(tmp_path / "distributed", small(version))
    weights = {f"model.encoder.0.{name}": tensor for name, tensor in first.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "last.ckpt")
    monkeypatch.setattr(published, "hf_hub_download", lambda filename, **_: str(bundle / filename))
    model_id = next(one for one in IDS if f"-{version}-" in one)
    forms = (str(tmp_path / "distributed"), str(tmp_path / "last.ckpt"), model_id)
    for form in forms:
        again = Helios(form, patch_size=4).eval()
        assert torch.equal(features(again, sample()), features(first, sample())), form
        assert [one.name for one in again.modalities] == ["sentinel2_l2a", "sentinel1", "landsat"]


def test_an_architecture_alone_needs_no_download_of_weights(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo_id: str, filename: str) -> str:
        if filename != "config.json":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        return str(bundles["v1_2"] / filename)

    monkeypatch.setattr(published, "hf_hub_download", download)
    Helios("OlmoEarth-v1_2-Nano", patch_size=4, random_initialization=True)
    with pytest.raises(CheckpointError, match=r"allenai/OlmoEarth-v1_2-Nano: can't be downloaded"):
        Helios("OlmoEarth-v1_2-Nano", patch_size=4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("version", "options"), [(version, {}) for version in VERSIONS] + [("v1_3", LOCATED), ("v1_3", PROJECTED)]
)
def test_a_sample_is_encoded_the_same_in_any_company(
    bundles: dict[str, Path], version: str, options: dict[str, Any], training: bool
) -> None:
    encoder = Helios(str(bundles[version]), patch_size=4, **options).train(training)
    gappy = (sample((1, 7), (2, 3, 9)), sample((), (4,)), sample((12,), (), (1, 12)))
    alone = [features(encoder, one)[0] for one in gappy]
    together = features(encoder, sample(landsat=(1, 4, 9), seed=1), *gappy)[1:]
    assert all(close(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("options", [LOCATED, PROJECTED])
def test_training_on_location_tokens_reaches_the_encoder(bundles: dict[str, Path], options: dict[str, Any]) -> None:
    encoder = Helios(str(bundles["v1_3"]), patch_size=4, **options)
    encoder(context(sample(), sample((1,), ()))).feature_maps[0].square().sum().backward()
    for part in (encoder.model.blocks[0].attn.q, encoder.model.attention_pooler.read_blocks[0].attn.q):
        assert part.weight.grad.isfinite().all()
        assert part.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("version", VERSIONS)
def test_compiled_blocks_are_those_of_rslearn(
    bundles: dict[str, Path], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    Helios(str(bundles[version]), patch_size=4, compile_model=True)
    ours, compiled = compiled, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    OlmoEarth(4, model_path=str(bundles[version]), compile_model=True, use_legacy_timestamps=False)
    assert ours == compiled == ["Block", "Block"]


@pytest.mark.parametrize(
    ("version", "options", "error", "message"),
    [
        ("v1_2", LOCATED, CheckpointError, "the model has no location tokens .*use_location_token_output must be"),
        ("v1_3", {"projected_location_token_dim": 8}, ConfigError, "needs use_location_token_output: true"),
        ("v1_3", {**LOCATED, "token_pooling": False}, ConfigError, "Helios.token_pooling: contradicts"),
        ("v1_3", {**LOCATED, "projected_location_token_dim": 17}, CheckpointError, "is 17; .*was trained for 16, 8"),
        ("v1_3", {**LOCATED, "embedding_size": 32}, CheckpointError, "embedding size is 24, the config says 32"),
        ("v1_3", {"sdpa_backends": ["fast"]}, ConfigError, "got 'fast', allowed: cudnn, flash, efficient, math"),
    ],
)
def test_options_that_do_not_fit(
    bundles: dict[str, Path], version: str, options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        Helios(str(bundles[version]), patch_size=4, **options)
    assert "\n" not in str(raised.value)


def documented() -> dict[str, list[str]]:
    """The table of published models on the page: the cells of each row by id."""
    rows = re.findall(r"^\| `(OlmoEarth-[\w-]+)` \|(.*)\|$", PAGE, re.MULTILINE)
    return {model_id: [cell.strip() for cell in cells.split("|")] for model_id, cells in rows}


def test_the_page_lists_every_published_model() -> None:
    assert list(documented()) == IDS


@pytest.mark.parametrize("model_id", IDS)
def test_the_page_says_what_the_package_builds(model_id: str) -> None:
    with torch.device("meta"):
        encoder: Any = Architecture.from_dict(architecture(model_id), source=model_id).build(["encoder"])
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    millions, channels, patches, inputs, settings = documented()[model_id]
    assert millions == f"{parameters / 1e6:.1f}"
    assert int(channels) == encoder.embedding_size == EMBEDDING_SIZES.get(ModelID(model_id), encoder.embedding_size)
    assert patches == f"{encoder.min_patch_size} to {encoder.max_patch_size}"
    assert inputs.split(", ") == ENCODER_INPUT_MODALITY_NAMES[ModelID(model_id)]
    absolute = encoder.position_encoding == "absolute"
    assert ("square images" in settings) == absolute
    assert ("use_location_token_output" in settings) == (encoder.attention_pooler is not None)
    if encoder.attention_pooler is not None:
        assert ", ".join(map(str, encoder.attention_pooler.student_dims)) in settings
