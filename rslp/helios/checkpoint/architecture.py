"""How a Helios model is built: the part of its configuration that its weights fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.config import Config
from torch import nn

from rslp.errors import CheckpointError

logger = logging.getLogger(__name__)

# As the model's package is called, and was called.
_PACKAGES = ("olmoearth_pretrain_minimal.", "olmoearth_pretrain.", "helios.")
# The encoder, which is nearly always what is selected, is built alone: a whole model is three times its size.
_ENCODER = "encoder"
_ENCODER_CONFIG = "encoder_config"


@dataclass(frozen=True)
class Architecture:
    """The configuration of a model, as Helios pre-training writes it to ``config.json``.

    Attributes:
        model: the ``model`` section: class names and numbers.
        input_modalities: the modalities that the encoder was trained to take; None where the configuration does not
            say, then all that it supports.
        source: where it was read, for messages.
    """

    model: Mapping[str, Any]
    input_modalities: tuple[str, ...] | None
    source: str

    @classmethod
    def from_dict(cls, config: object, *, source: str) -> Architecture:
        """Take what is needed from the content of a ``config.json``.

        Raises:
            CheckpointError: it has no ``model`` section.
        """
        model = config.get("model") if isinstance(config, Mapping) else None
        if not isinstance(config, Mapping) or not isinstance(model, Mapping):
            raise CheckpointError(f"{source}: no `model` section, so it describes no Helios model")
        modalities = config.get("input_modalities") or _input_modalities(config)
        return cls(model, None if modalities is None else tuple(modalities), source)

    @classmethod
    def from_file(cls, path: Path) -> Architecture:
        """Read a ``config.json``.

        Raises:
            CheckpointError: not readable, or no such file's content.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return cls.from_dict(content, source=str(path))

    def pack(self, selector: Sequence[str | int]) -> torch.Tensor:
        """Pack what it takes to build the selected part again: JSON as uint8 ``N``, to be kept beside weights."""
        model = dict(self.model)
        if list(selector) == [_ENCODER] and _ENCODER_CONFIG in model:
            model = {_ENCODER_CONFIG: model[_ENCODER_CONFIG]}
        content = {"model": model, "input_modalities": self.input_modalities, "selector": list(selector)}
        return torch.tensor(list(json.dumps(content, sort_keys=True).encode()), dtype=torch.uint8)

    @classmethod
    def unpack(cls, packed: torch.Tensor, *, source: str) -> Architecture:
        """Read what ``pack`` wrote.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            content = json.loads(bytes(packed.tolist()))
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: the architecture stored with the weights is unreadable") from error
        return cls.from_dict(content, source=source)

    def build(self, selector: Sequence[str | int]) -> nn.Module:
        """Build the selected part with random weights.

        Args:
            selector: attribute names and list indices that lead from the model to the part.

        Returns:
            The part; an encoder is restricted to the modalities that it was trained to take.

        Raises:
            CheckpointError: the configuration does not build, or has no such part.
        """
        rest = list(selector)
        config: Mapping[str, Any] = self.model
        if rest[:1] == [_ENCODER] and isinstance(self.model.get(_ENCODER_CONFIG), Mapping):
            config = self.model[_ENCODER_CONFIG]
            rest = rest[1:]
        module = self._select(self._build(_for_this_package(config)), rest, selector)
        restrict: Any = getattr(module, "restrict_input_modalities", None)
        if self.input_modalities is not None and restrict is not None:
            restrict(list(self.input_modalities))
        return module

    def _build(self, config: Mapping[str, Any]) -> nn.Module:
        _refuse_strange_classes(config, self.source)
        try:
            parsed = Config.from_dict(config)
            _tell_ignored(config, parsed, self.source)
            module = parsed.build()
        except (AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.source}: does not build a Helios model: {error}") from error
        assert isinstance(module, nn.Module)
        return module

    def _select(self, module: nn.Module, rest: Sequence[str | int], selector: Sequence[str | int]) -> nn.Module:
        part: Any = module
        for step in rest:
            try:
                part = part[step] if isinstance(step, int) else getattr(part, step)
            except (AttributeError, IndexError, TypeError) as error:
                raise CheckpointError(
                    f"{self.source}: selector {list(selector)} leads nowhere, {type(part).__name__} has no {step!r}"
                ) from error
        if not isinstance(part, nn.Module):
            raise CheckpointError(f"{self.source}: selector {list(selector)} leads to no module")
        return part


def _refuse_strange_classes(config: Any, source: str) -> None:
    """Refuse classes that are no part of a Helios model: the package would import and make any that is named.

    Raises:
        CheckpointError: naming the class.
    """
    inside = config.values() if isinstance(config, Mapping) else config if isinstance(config, list) else ()
    for part in inside:
        _refuse_strange_classes(part, source)
    name = config.get(Config.CLASS_NAME_FIELD) if isinstance(config, Mapping) else None
    if name is not None and not str(name).startswith(_PACKAGES):
        raise CheckpointError(f"{source}: does not build a Helios model: it names the class {name}")


def _for_this_package(config: Mapping[str, Any]) -> dict[str, Any]:
    """Set the options whose meaning changed since, or that need a package which is not there.

    Configurations from before ``use_linear_patch_embed`` mean a convolution. Flash attention has the same weights as
    the built-in attention.
    """
    changed = dict(config)
    for key in (_ENCODER_CONFIG, "decoder_config"):
        if isinstance(changed.get(key), Mapping):
            changed[key] = _for_this_package(changed[key])
    if "supported_modality_names" in changed:
        if "encoder_embedding_size" not in changed:
            changed.setdefault("use_linear_patch_embed", False)
        if changed.get("use_flash_attn"):
            changed["use_flash_attn"] = False
    return changed


def _tell_ignored(config: Mapping[str, Any], parsed: object, source: str) -> None:
    if is_dataclass(parsed):
        known = {field.name for field in fields(parsed)}
        ignored = sorted(set(config) - known - {Config.CLASS_NAME_FIELD})
        if ignored:
            logger.warning("%s: options that this version does not know are ignored: %s", source, ", ".join(ignored))


def _input_modalities(config: Mapping[str, Any]) -> list[str] | None:
    """The supported modalities less those that pre-training only decoded; None where it is not recorded."""
    for section in ("train_module", "data_loader"):
        found: Any = config
        for key in (section, "masking_config", "strategy_config", "only_decode_modalities"):
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            encoder = config["model"].get(_ENCODER_CONFIG)
            supported = encoder.get("supported_modality_names", []) if isinstance(encoder, Mapping) else []
            return [modality for modality in supported if modality not in found] or None
    return None
