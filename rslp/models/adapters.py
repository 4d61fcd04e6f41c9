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
from rslp.runtime.extras import remedy
from rslp.suggest import nearest
from rslp.upstream.adapters import (
    BASE,
    adapted_layers,
    add_adapter,
    merge_adapter,
    peft_is_installed,
    select_adapter,
)

_KEY = "model.init_args.model.init_args.adapter"
_SHARED = "shared"
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?)\.\d+\.")
# These read the weights of layers inside them without calling the layers, so that an adapter would have no effect.
_READ_WEIGHTS = {
    "torch.nn.modules.activation.MultiheadAttention",
    "torch.nn.modules.transformer.TransformerEncoderLayer",
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
}


@dataclass(frozen=True)
class Adapter:
    """The adapters of a joint model's encoder, whose own weights they freeze.

    A linear layer W x becomes W x + (alpha / rank) B A dropout(x), in which A (rank x inputs, random) and B (outputs x
    rank, 0 at first) train (LoRA, Hu et al. 2021). DoRA (Liu et al. 2024) also trains the length of each row of
    W + (alpha / rank) B A, which begins as that of W. Both add to W, so they can be merged into it after training.

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
        if not peft_is_installed():
            raise ConfigError(Problem(f"adapters need peft; {remedy('adapters')}", key=_KEY))


class EncoderAdapters:
    """The adapters in one encoder: made for each dataset or for all, selected for each batch.

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
        encoder.register_load_state_dict_pre_hook(self._rename_plain)  # type: ignore[no-untyped-call]
        if settings.per_dataset:
            encoder.requires_grad_(False)
        else:
            self._add(_SHARED)

    def set_datasets(self, datasets: Iterable[str]) -> None:
        """Make the adapters of datasets that have none yet, if each dataset has its own."""
        if self.settings.per_dataset:
            for name in sorted(map(self._name, datasets)):
                if name not in self._names:
                    self._add(name)

    def select(self, dataset: str) -> None:
        """Let the encoder compute with the adapters of a dataset."""
        if self.settings.per_dataset:
            select_adapter(self._layers, self._name(dataset))

    def describe(self) -> str:
        """One line: which layers have adapters, of which kind."""
        kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in self._paths)
        each = f", for each of {len(self._names)} datasets" if self.settings.per_dataset else ""
        number = f"{len(self._paths)} linear layers of the frozen encoder"
        return f"{self.settings.kind} of rank {self.settings.rank} on {number}{each}: {', '.join(kinds)}"

    def merge(self, dataset: str) -> None:
        """Merge the adapters of a dataset, or those of all, into the encoder's weights, and remove all adapters."""
        merge_adapter(self._encoder, self._name(dataset))

    def _name(self, dataset: str) -> str:
        """The name of a dataset's adapters, as a part of names of weights, where a dot would separate parts."""
        escaped = dataset.replace("%", "%25").replace(".", "%2E")
        return f"of_{escaped}" if self.settings.per_dataset else _SHARED

    def _add(self, name: str) -> None:
        chosen = self.settings
        add_adapter(
            self._encoder, name, layers=self._paths, kind=chosen.kind, rank=chosen.rank, alpha=chosen.alpha,
            dropout=chosen.dropout,
        )  # fmt: skip
        self._names.append(name)
        self._layers = [layer for _, layer in adapted_layers(self._encoder)]

    def _rename_plain(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before weights are loaded: name those of an encoder without adapters as they are named with adapters."""
        adapted = {path for path, _ in adapted_layers(module)}
        for layer in [prefix + path for path in self._paths if path in adapted]:
            for kind in ("weight", "bias"):
                plain, renamed = f"{layer}.{kind}", f"{layer}{BASE}{kind}"
                if plain in state_dict and renamed not in state_dict:
                    state_dict[renamed] = state_dict.pop(plain)


def merged(model: nn.Module, adapters: EncoderAdapters, dataset: str) -> nn.Module:
    """A copy of a model in which a dataset's adapters are part of the encoder's weights, named as without adapters.

    Args:
        model: a module that contains the encoder.
        adapters: its adapters.
        dataset: the dataset; of no importance if all datasets share the adapters.
    """
    both: tuple[nn.Module, EncoderAdapters] = copy.deepcopy((model, adapters))
    with torch.no_grad():
        both[1].merge(dataset)
    return both[0]


def target_layers(encoder: nn.Module, targets: list[str] | str | None) -> list[str]:
    """The paths of the linear layers to adapt, in the order of the encoder.

    Raises:
        ConfigError: see ``EncoderAdapters``.
    """
    linear = [path for path, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    hidden = [path for path, module in encoder.named_modules() if _reads_weights(module)]
    able = [path for path in linear if not any(path.startswith(f"{other}.") for other in hidden)]
    if not able:
        lack = "whose weights other code reads directly" if linear else "at all"
        message = f"the encoder {type(encoder).__name__} has no linear layer to adapt: it has {len(linear)}, {lack}"
        raise ConfigError(Problem(message if linear else message.partition(": it")[0], key=_KEY))
    if targets is None:
        return [path for path in able if _BLOCK.search(path)] or able
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matching = {path for path in able if _matches(target, path)}
        if not matching:
            raise ConfigError(Problem(_no_match(target, able, linear), key=f"{_KEY}.targets"))
        chosen |= matching
    if not chosen:
        raise ConfigError(Problem("names no layer; leave it out for all of the blocks", key=f"{_KEY}.targets"))
    return [path for path in able if path in chosen]


def _reads_weights(module: nn.Module) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in _READ_WEIGHTS for kind in type(module).__mro__)


def _matches(target: str, path: str) -> bool:
    if path == target or path.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, path) is not None
    except re.error as error:
        raise ConfigError(Problem(f"{target!r} is no regular expression: {error}", key=f"{_KEY}.targets")) from None


def _no_match(target: str, able: list[str], linear: list[str]) -> str:
    if any(_matches(target, path) for path in linear):
        return f"{target!r}: other code reads the weights of these layers directly, an adapter would have no effect"
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in able))
    near = nearest(target, [*names, *able])
    hint = f"did you mean {near}?" if near else f"their names: {', '.join(names)}"
    return f"{target!r} matches no linear layer of the encoder; {hint}"
