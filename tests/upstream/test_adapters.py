"""peft: an adapter is selected by a private attribute, which does not freeze the others."""

from __future__ import annotations

import torch
from torch import nn

from rslp.upstream.adapters import adapted_layers, add_adapter, merge_adapter, select_adapter


def test_select_adapter_changes_the_active_one_alone() -> None:
    torch.manual_seed(0)
    model, values = nn.Sequential(nn.Linear(3, 3)), torch.ones(1, 3)
    for name in ("one", "two"):
        add_adapter(model, name, layers=["0"], dora=False, r=1, lora_alpha=1)
        nn.init.normal_(model.get_parameter(f"0.lora_B.{name}.weight"))
    layers = [layer for _, layer in adapted_layers(model)]
    outputs = []
    for name in ("one", "two", "one"):
        select_adapter(layers, name)
        assert layers[0].active_adapters == [name]
        assert all(parameter.requires_grad == (".lora_" in path) for path, parameter in model.named_parameters())
        outputs.append(model(values))
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    with torch.no_grad():
        merge_adapter(model, "one")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(values), outputs[0])
