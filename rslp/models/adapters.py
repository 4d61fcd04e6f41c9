"""Adapters (LoRA, DoRA): small matrices that train beside the frozen linear layers of an encoder."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rslp.errors import ConfigError, Problem
from rslp.runtime.extras import is_absent, remedy
from rslp.suggest import nearest
from rslp.upstream.adapters import BASE, adapted_layers, add_adapter, merge_adapter, select_adapter

_KEY = "model.init_args.model.init_args.adapter"
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?)\.\d+\.")
# These read the weights of layers inside them without calling the layers, so that an adapter would have no effect.
_READ_WEIGHTS = {"MultiheadAttention", "TransformerEncoderLayer", "ShiftedWindowAttention", "ShiftedWindowAttentionV2"}


@dataclass(frozen=True)
class Adapter:
    """The adapters of a joint model's encoder, whose own weights they freeze.

    A linear layer W x becomes W x + (alpha / rank) B A dropout(x), in which A (rank x inputs, random) and B (outputs x
    rank, 0 at first) train (LoRA, Hu et al. 2021). DoRA (Liu et al. 2024) also trains the length of each row of
    W + (alpha / rank) B A, which begins as that of W. Both can be merged into W.

    Attributes:
        kind: ``lora`` or ``dora``.
        rank: rank of B A.
        alpha: factor on B A, times the rank.
        targets: names of layers (``attn.q`` means all whose path ends so) or regular expressions that match whole
            paths; None means all linear layers of the encoder's blocks, or of the encoder if it has no blocks.
        dropout: probability with which an input of A is 0 in training.
        per_dataset: whether each dataset has adapters of its own, over the same frozen weights.

    Raises:
        ConfigError: a value is out of its range, or peft is not installed.
    """

    kind: Literal["lora", "dora"] = "lora"
    rank: int = 8
    alpha: int = 16
    targets: list[str] | str | None = None
    dropout: float = 0.0
    per_dataset: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        for name, expected, valid in (
            ("kind", "lora or dora", self.kind in ("lora", "dora")),
            ("rank", "1 or more", self.rank >= 1),
            ("alpha", "1 or more", self.alpha >= 1),
            ("dropout", "0 or more, less than 1", 0 <= self.dropout < 1),
        ):
            if not valid:
                raise ConfigError(Problem(f"got {getattr(self, name)}; {expected}", key=f"{_KEY}.{name}"))
        if is_absent("adapters"):
            raise ConfigError(Problem(f"adapters need peft; {remedy('adapters')}", key=_KEY))


class EncoderAdapters:
    """The adapters in one encoder: made for all datasets or for each, selected for each batch.

    Args:
        encoder: the encoder; its linear layers are replaced in place.
        settings: the user's choices.

    Raises:
        ConfigError: the encoder has no linear layer that can be adapted, or a target names none.
    """

    def __init__(self, encoder: nn.Module, settings: Adapter) -> None:
        self.settings = settings
        self._encoder = encoder
        self._paths = target_layers(encoder, settings.targets)
        self._layers: list[Any] = []
        self._names: list[str] = []
        encoder.requires_grad_(False)
        encoder.register_load_state_dict_pre_hook(self._rename_plain)  # type: ignore[no-untyped-call]
        if not settings.per_dataset:
            self.set_datasets([""])

    def set_datasets(self, datasets: Iterable[str]) -> None:
        """Make the adapters that these datasets lack."""
        chosen = self.settings
        for name in [name for name in sorted(set(map(self._name, datasets))) if name not in self._names]:
            sizes = {"r": chosen.rank, "lora_alpha": chosen.alpha, "lora_dropout": chosen.dropout}
            add_adapter(self._encoder, name, layers=self._paths, dora=chosen.kind == "dora", **sizes)
            self._names.append(name)
            self._layers = [layer for _, layer in adapted_layers(self._encoder)]

    def select(self, dataset: str) -> None:
        """Let the encoder compute with the adapters of a dataset."""
        select_adapter(self._layers, self._name(dataset))

    def describe(self) -> str:
        """One line: which layers have adapters, of which kind."""
        kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in self._paths)
        each = f", for each of {len(self._names)} datasets" if self.settings.per_dataset else ""
        number = f"{len(self._paths)} linear layers of the frozen encoder"
        return f"{self.settings.kind} of rank {self.settings.rank} on {number}{each}: {', '.join(kinds)}"

    def idle(self) -> list[str]:
        """The layers whose adapters are as at first (B is 0): no training step has used them."""
        layers = adapted_layers(self._encoder)
        return [path for path, layer in layers if not any(bool(b.weight.any()) for b in layer.lora_B.values())]

    def merged(self, model: nn.Module, dataset: str) -> nn.Module:
        """A copy of a model around the encoder, with the adapters of a dataset as a part of its plain weights."""
        plain, encoder = copy.deepcopy((model, self._encoder))
        with torch.no_grad():
            merge_adapter(encoder, self._name(dataset))
        return plain

    def _name(self, dataset: str) -> str:
        """The name of a dataset's adapters, as a part of names of weights, in which a dot would separate parts."""
        escaped = dataset.replace("%", "%25").replace(".", "%2E")
        return f"of_{escaped}" if self.settings.per_dataset else "shared"

    def _rename_plain(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before weights are loaded: name those of an encoder without adapters as they are named with adapters."""
        for path in [f"{prefix}{path}." for path, _ in adapted_layers(module)]:
            for kind in ("weight", "bias"):
                if path + kind in state_dict:
                    state_dict[path.removesuffix(".") + BASE + kind] = state_dict.pop(path + kind)


def target_layers(encoder: nn.Module, targets: list[str] | str | None) -> list[str]:
    """The paths of the linear layers to adapt, in the order of the encoder.

    Raises:
        ConfigError: see ``EncoderAdapters``.
    """
    linear = [path for path, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    inside = tuple(
        f"{path}."
        for path, module in encoder.named_modules()
        if _READ_WEIGHTS & {kind.__name__ for kind in type(module).__mro__}
    )
    able = [path for path in linear if not path.startswith(inside)]
    if not able:
        lack = f": it has {len(linear)}, whose weights other code reads directly" if linear else ""
        raise ConfigError(Problem(f"the encoder {type(encoder).__name__} has no linear layer to adapt{lack}", key=_KEY))
    if targets is None:
        return [path for path in able if _BLOCK.search(path)] or able
    wanted = [targets] if isinstance(targets, str) else targets
    for target in wanted:
        if not any(_matches(target, path) for path in able):
            names = list(dict.fromkeys(path.rpartition(".")[2] for path in able))
            near = nearest(target, [*names, *able])
            hint = f"did you mean {near}?" if near else f"their names: {', '.join(names)}"
            if any(_matches(target, path) for path in linear):
                hint = "other code reads the weights of those that it matches directly"
            raise ConfigError(Problem(f"{target!r} matches no linear layer to adapt; {hint}", key=f"{_KEY}.targets"))
    if not wanted:
        raise ConfigError(Problem("names no layer; leave it out for all of the blocks", key=f"{_KEY}.targets"))
    return [path for path in able if any(_matches(target, path) for target in wanted)]


def _matches(target: str, path: str) -> bool:
    if f".{path}".endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, path) is not None
    except re.error as error:
        raise ConfigError(Problem(f"{target!r} is no regular expression: {error}", key=f"{_KEY}.targets")) from None
