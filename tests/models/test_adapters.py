"""Adapters: what they compute, which layers have them, what is refused, merging, and which weights train."""

from __future__ import annotations

import copy
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rslearn.models.galileo.galileo import GalileoSize
from torch import nn

from rslp.errors import ConfigError
from rslp.helios.galileo import Galileo
from rslp.helios.model import Helios
from rslp.helios.presto import Presto
from rslp.models.adapters import Adapter, EncoderAdapters, target_layers
from rslp.runtime import extras
from tests.helios import test_series, tiny_helios

PAGE = (Path(__file__).parents[2] / "docs/adapters.md").read_text()


class Tower(nn.Module):
    """Linear layers in blocks, and one before them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6), "fc": nn.Linear(6, 6)}) for _ in range(2))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.patches(values)
        for block in self.blocks:
            values = values + block["fc"](torch.tanh(block["q"](values)))  # type: ignore[index]
        return values


def tower(**settings: Any) -> tuple[Tower, Tower, EncoderAdapters]:
    """A tower, the same one without adapters, and the adapters with random weights."""
    torch.manual_seed(0)
    encoder = Tower()
    plain = copy.deepcopy(encoder)
    made = EncoderAdapters(encoder, Adapter(rank=2, alpha=6, **settings))
    made.set_datasets(["sea.ice", "keys"])
    assert torch.equal(encoder(torch.ones(3, 4)), plain(torch.ones(3, 4))) or settings.get("kind") == "dora"
    for name, parameter in encoder.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    return encoder, plain, made


def weight(encoder: Tower, path: str, name: str, *, dora: bool) -> torch.Tensor:
    """The weights of an adapted layer, by the formula of the papers."""
    of = dict(encoder.named_parameters())
    base = of[f"{path}.base_layer.weight"]
    whole = base + 6 / 2 * of[f"{path}.lora_B.{name}.weight"] @ of[f"{path}.lora_A.{name}.weight"]
    if not dora:
        return whole
    lengths = of[f"{path}.lora_magnitude_vector.{name}.weight"]
    return lengths[:, None] * whole / whole.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_formula_and_merging(kind: str) -> None:
    encoder, plain, made = tower(kind=kind, per_dataset=True)
    values = torch.randn(5, 4)
    outputs = {}
    for dataset, name in (("keys", "of_keys"), ("sea.ice", "of_sea%2Eice")):
        expected = copy.deepcopy(plain)
        for path in target_layers(plain, None):
            assert path.startswith("blocks.")
            expected.get_submodule(path).weight.data = weight(encoder, path, name, dora=kind == "dora").detach()
        made.select(dataset)
        outputs[dataset] = encoder(values)
        torch.testing.assert_close(outputs[dataset], expected(values), rtol=1e-5, atol=1e-6)
        alone = made.merged(nn.ModuleList([encoder]), dataset)
        assert list(alone.state_dict()) == [f"0.{key}" for key in plain.state_dict()]
        torch.testing.assert_close(alone[0](values), outputs[dataset], rtol=1e-5, atol=1e-5)  # type: ignore[index]
    assert not torch.allclose(outputs["keys"], outputs["sea.ice"])
    # The encoder still has its adapters, and its own weights.
    assert torch.equal(encoder(values), outputs["sea.ice"])
    assert torch.equal(encoder.get_parameter("blocks.0.q.base_layer.weight"), plain.get_parameter("blocks.0.q.weight"))


def test_at_first_an_adapter_changes_nothing() -> None:
    torch.manual_seed(0)
    values, encoder = torch.randn(3, 4), Tower()
    before = encoder(values)
    EncoderAdapters(encoder, Adapter(kind="dora"))
    torch.testing.assert_close(encoder(values), before)


def test_adapters_alone_train_whichever_is_selected() -> None:
    encoder, _, made = tower(per_dataset=True)
    trains = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in encoder.named_parameters() if ".lora_" in name} and len(trains) == 16
    made.select("keys")
    encoder(torch.randn(3, 4)).sum().backward()
    assert {n for n, p in encoder.named_parameters() if p.grad is not None} == {n for n in trains if "of_keys" in n}
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} == trains


def test_adapters_of_layers_that_nothing_uses_are_named() -> None:
    torch.manual_seed(0)
    encoder = nn.ModuleDict({"used": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    made = EncoderAdapters(encoder, Adapter(rank=1))
    optimizer = torch.optim.AdamW(encoder.parameters())
    encoder["used"](torch.randn(2, 3)).square().sum().backward()
    assert made.idle() == ["used", "head"]
    optimizer.step()
    assert made.idle() == ["head"]


def test_dropout_is_on_the_adapters_input_in_training() -> None:
    encoder, _, _ = tower(dropout=0.5)
    values = torch.randn(3, 4)
    assert not torch.equal(encoder(values), encoder(values))
    encoder.eval()
    assert torch.equal(encoder(values), encoder(values))


def test_plain_weights_load_into_an_encoder_with_adapters() -> None:
    encoder, plain, _ = tower()
    own = {name: value.clone() for name, value in encoder.state_dict().items()}
    nn.init.ones_(plain.blocks[0]["q"].weight)  # type: ignore[index]
    missing, unexpected = encoder.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and all(".lora_" in name for name in missing)
    assert bool((encoder.get_parameter("blocks.0.q.base_layer.weight") == 1).all())
    assert encoder.load_state_dict(own) == ([], [])


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (None, {"q", "fc"}),
        ("q", {"q"}),
        (["blocks.1.fc"], {"blocks.1.fc"}),
        ([r"blocks\.\d\.f.", "patches"], {"fc", "patches"}),
    ],
)
def test_targets_are_names_or_expressions(targets: Any, chosen: set[str]) -> None:
    layers = target_layers(Tower(), targets)
    assert layers and all(any(path == name or path.endswith(f".{name}") for name in chosen) for path in layers)
    counts = {"q": 2, "fc": 2, "patches": 1, "blocks.1.fc": 1}
    assert len(layers) == sum(counts[name] for name in chosen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["qq"]}, "adapter.targets: 'qq' matches no linear layer to adapt; did you mean q?"),
        ({"targets": ["zzz"]}, "'zzz' matches no linear layer to adapt; their names: patches, q, fc"),
        ({"targets": ["("]}, "'(' is no regular expression"),
        ({"targets": []}, "names no layer; leave it out for all of the blocks"),
        ({"rank": 0}, "adapter.rank: got 0; 1 or more"),
        ({"alpha": 0}, "adapter.alpha: got 0; 1 or more"),
        ({"dropout": 1.0}, "adapter.dropout: got 1.0; 0 or more, less than 1"),
        ({"kind": "vera"}, "adapter.kind: got vera; lora or dora"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EncoderAdapters(Tower(), Adapter(**settings))


def test_layers_whose_weights_are_read_by_other_code_are_refused() -> None:
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 1), "norm": nn.LayerNorm(4)})
    with pytest.raises(ConfigError, match="no linear layer to adapt: it has 1, whose weights other code reads"):
        EncoderAdapters(attention, Adapter())
    attention["head"] = nn.Linear(4, 4)
    assert target_layers(attention, None) == ["head"]
    with pytest.raises(ConfigError, match=r"'mha\.out_proj' matches .* other code reads the weights"):
        target_layers(attention, ["mha.out_proj"])
    with pytest.raises(ConfigError, match=r"the encoder Conv2d has no linear layer to adapt$"):
        EncoderAdapters(nn.Conv2d(1, 1, 1), Adapter())


def test_without_peft_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras._EXTRAS, "adapters", "peft_that_is_absent")
    with pytest.raises(ConfigError, match=re.escape("adapters need peft; install it: pip install 'rslp[adapters]'")):
        Adapter()


@pytest.mark.parametrize("name", ["helios", "galileo", "presto"])
def test_each_encoder_of_ours_has_them_in_its_blocks_and_calls_them(name: str, tmp_path: Path) -> None:
    sample = test_series.sample(test_series.FULL, size=4)
    if name == "helios":
        encoder: Any = Helios(str(tiny_helios.write_bundle(tmp_path)), patch_size=tiny_helios.PATCH)
        sample = {"sentinel2_l2a": tiny_helios.image("sentinel2_l2a", [1, 4])}
    elif name == "galileo":
        encoder = Galileo(GalileoSize.NANO, pretrained_path=str(test_series.write_galileo(tmp_path)))
    else:
        encoder = Presto(str(test_series.write_presto(tmp_path / "weights")))
    context = tiny_helios.context(sample)
    (before,) = encoder.eval()(context).feature_maps
    text = EncoderAdapters(encoder, Adapter()).describe()
    assert text.startswith("lora of rank 8 on ") and "mlp.fc1" in text and "attn." in text and "embed" not in text
    (after,) = encoder(context).feature_maps
    torch.testing.assert_close(after, before)
    after.square().sum().backward()
    added = [parameter for path, parameter in encoder.named_parameters() if ".lora_B." in path]
    assert added and all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in added)


def test_the_page_lists_every_option() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    given = yaml.safe_load(block)["global_overrides"]["model"]["init_args"]["model"]["init_args"]["adapter"]
    defaults = {field.name: field.default for field in fields(Adapter)}
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(defaults) == list(given)
    assert Adapter(**given).per_dataset
    assert f"default {defaults['rank']} |" in PAGE and f"default {defaults['alpha']} |" in PAGE
