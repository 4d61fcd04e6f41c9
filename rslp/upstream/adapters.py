"""peft 0.21's adapters: added to linear layers, selected for a forward pass, merged into the layers' weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

# Part of the name of each of an adapter's parameters, and of the weights of the layer that it adapts.
ADAPTER, BASE = ".lora_", ".base_layer."
# What to do about weights with adapters where a plain encoder is loaded.
MERGE = "`helios merge_adapters` makes a checkpoint of a plain encoder"


def add_adapter(model: nn.Module, name: str, *, layers: Sequence[str], dora: bool, **settings: Any) -> None:
    """Put an adapter beside linear layers (paths) of a model, in place, and let adapters alone train in it.

    ``settings`` are peft's ``r``, ``lora_alpha`` and ``lora_dropout``.
    """
    from peft import LoraConfig, inject_adapter_in_model

    target = rf"0\.(?:{'|'.join(map(re.escape, layers))})"
    # In a list of its own: peft would read the attribute `config` of a model, which is something else here.
    inject_adapter_in_model(LoraConfig(target_modules=target, use_dora=dora, **settings), nn.ModuleList([model]), name)
    for path, parameter in model.named_parameters():
        parameter.requires_grad = ADAPTER in path


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of each layer that has adapters."""
    from peft.tuners.lora import LoraLayer

    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))


def select_adapter(layers: Iterable[Any], name: str) -> None:
    """Let layers compute with one of their adapters; peft's own function would also freeze the others."""
    for layer in layers:
        layer._active_adapter = [name]


def merge_adapter(model: nn.Module, name: str) -> None:
    """Add an adapter to the weights of its layers, and put these in place of peft's layers."""
    for path, layer in list(adapted_layers(model)):
        layer.merge(adapter_names=[name])
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
