"""The architecture of a Helios model, built from its config.json."""

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

# The present and former names of the package that defines Helios models.
_PACKAGES = ("olmoearth_pretrain_minimal.", "olmoearth_pretrain.", "helios.")
# The encoder, nearly always the selected part, is built alone: a whole model is three times its size.
_ENCODER = "encoder"
_ENCODER_CONFIG = "encoder_config"


@dataclass(frozen=True)
class Architecture:
    """The configuration of a model, as Helios pre-training writes it to ``config.json``.

    Attributes:
        model: the ``model`` section: class names and numbers.
        input_modalities: the modalities that the encoder was trained to take; None if unknown: all that it supports.
        source: file or checkpoint that it was read from, for messages.
    """

    model: Mapping[str, Any]
    input_modalities: tuple[str, ...] | None
    source: str

    @classmethod
    def from_dict(cls, config: object, *, source: str) -> Architecture:
        """Read the content of a ``config.json``.

        Raises:
            CheckpointError: there is no ``model`` section.
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
            CheckpointError: the file can't be read, or has no ``model`` section.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return cls.from_dict(content, source=str(path))

    def pack(self, selector: Sequence[str | int]) -> torch.Tensor:
        """Encode what building the selected part needs as JSON in uint8 ``N``, to be stored beside its weights."""
        model = dict(self.model)
        if list(selector) == [_ENCODER] and _ENCODER_CONFIG in model:
            model = {_ENCODER_CONFIG: model[_ENCODER_CONFIG]}
        content = {"model": model, "input_modalities": self.input_modalities, "selector": list(selector)}
        return torch.tensor(list(json.dumps(content, sort_keys=True).encode()), dtype=torch.uint8)

    @classmethod
    def unpack(cls, packed: torch.Tensor, *, source: str) -> Architecture:
        """Decode the output of ``pack``.

        Raises:
            CheckpointError: the tensor has another content.
        """
        try:
            content = json.loads(bytes(packed.tolist()))
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: the architecture stored with the weights is unreadable") from error
        return cls.from_dict(content, source=source)

    def build(self, selector: Sequence[str | int]) -> nn.Module:
        """Build the selected part with random weights.

        Args:
            selector: attribute names and list indices from the model to the part.

        Returns:
            The part; an encoder is restricted to the modalities that it was trained to take.

        Raises:
            CheckpointError: the model can't be built from the configuration, or has no such part.
        """
        steps = list(selector)
        config: Mapping[str, Any] = self.model
        if steps[:1] == [_ENCODER] and isinstance(self.model.get(_ENCODER_CONFIG), Mapping):
            config = self.model[_ENCODER_CONFIG]
            steps = steps[1:]
        module = self._select(self._build(_for_this_package(config)), steps, selector)
        restrict: Any = getattr(module, "restrict_input_modalities", None)
        if self.input_modalities is not None and restrict is not None:
            restrict(list(self.input_modalities))
        return module

    def _build(self, config: Mapping[str, Any]) -> nn.Module:
        _refuse_foreign_classes(config, self.source)
        try:
            parsed = Config.from_dict(config)
            _warn_of_unknown_options(config, parsed, self.source)
            module = parsed.build()
        except (AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.source}: does not build a Helios model: {error}") from error
        assert isinstance(module, nn.Module)
        return module

    def _select(self, module: nn.Module, steps: Sequence[str | int], selector: Sequence[str | int]) -> nn.Module:
        part: Any = module
        for step in steps:
            try:
                part = part[step] if isinstance(step, int) else getattr(part, step)
            except (AttributeError, IndexError, TypeError) as error:
                raise CheckpointError(
                    f"{self.source}: selector {list(selector)} leads nowhere, {type(part).__name__} has no {step!r}"
                ) from error
        if not isinstance(part, nn.Module):
            raise CheckpointError(f"{self.source}: selector {list(selector)} leads to no module")
        return part


def _refuse_foreign_classes(config: Any, source: str) -> None:
    """Refuse classes of other packages: ``Config`` would import and instantiate any class that is named.

    Raises:
        CheckpointError: a class of another package is named.
    """
    inside = config.values() if isinstance(config, Mapping) else config if isinstance(config, list) else ()
    for part in inside:
        _refuse_foreign_classes(part, source)
    name = config.get(Config.CLASS_NAME_FIELD) if isinstance(config, Mapping) else None
    if name is not None and not str(name).startswith(_PACKAGES):
        raise CheckpointError(f"{source}: does not build a Helios model: it names the class {name}")


def _for_this_package(config: Mapping[str, Any]) -> dict[str, Any]:
    """Set options whose default has changed or whose package is not installed.

    Configurations older than ``use_linear_patch_embed`` mean a convolution. Flash attention has the same weights as
    torch's own attention.
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


def _warn_of_unknown_options(config: Mapping[str, Any], parsed: object, source: str) -> None:
    if is_dataclass(parsed):
        known = {field.name for field in fields(parsed)}
        ignored = sorted(set(config) - known - {Config.CLASS_NAME_FIELD})
        if ignored:
            logger.warning("%s: options unknown to this version are ignored: %s", source, ", ".join(ignored))


def _input_modalities(config: Mapping[str, Any]) -> list[str] | None:
    """The supported modalities less those that pre-training only decoded; None where these are not recorded."""
    for section in ("train_module", "data_loader"):
        decoded: Any = config
        for key in (section, "masking_config", "strategy_config", "only_decode_modalities"):
            decoded = decoded.get(key) if isinstance(decoded, Mapping) else None
        if decoded is not None:
            encoder = config["model"].get(_ENCODER_CONFIG)
            supported = encoder.get("supported_modality_names", []) if isinstance(encoder, Mapping) else []
            return [modality for modality in supported if modality not in decoded] or None
    return None
