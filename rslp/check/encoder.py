"""The encoder of a run config, as far as the checks of data know it: its inputs and its patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rslp.config import pick
from rslp.errors import KeyPath
from rslp.helios.encoders import EncoderSpec, Quantity, bands_taken, encoder_of

ENCODER_PATH: KeyPath = ("model", "init_args", "model", "init_args", "encoder")


@dataclass(frozen=True)
class ConfiguredEncoder:
    """An encoder of the table of encoders with its arguments in a run config.

    Attributes:
        spec: the encoder.
        class_path: the class that builds it.
        arguments: the arguments of its class.
    """

    spec: EncoderSpec
    class_path: str
    arguments: Mapping[str, Any]

    def bands_by_position(self) -> dict[str, tuple[str, ...]]:
        """For each input whose bands the encoder knows by position, the bands that it takes, in its order."""
        inputs = self.spec.inputs if self.spec.normalises else ()
        return {one.name: bands_taken(self.spec, one.name, self.arguments) for one in inputs}

    @property
    def reads_location(self) -> bool:
        """Whether the encoder takes the places of windows."""
        ours = self.class_path == self.spec.class_paths[0]
        return ours and self.spec.find("latlon") is not None and bool(self.arguments.get("use_location", True))

    def kind_of(self, name: str) -> str | None:
        """The kind of images, optical or radar, that an encoder takes raw under a name."""
        known = self.spec.find(name)
        return known.kind if known and self.spec.normalises else None

    def quantity(self, name: str, position: int) -> Quantity | None:
        """What a raw band of an input measures; None if the encoder takes no such band raw."""
        known = self.spec.find(name)
        bands = self.bands_by_position().get(name, ())
        return known.quantity_of(bands[position]) if known and position < len(bands) else None


def configured_encoder(config: Mapping[str, Any]) -> ConfiguredEncoder | None:
    """The first encoder of a run config that the table of encoders has."""
    for module in _modules(config):
        if (spec := encoder_of(pick(module, ("class_path",)))) is not None:
            arguments = pick(module, ("init_args",))
            return ConfiguredEncoder(
                spec, str(module["class_path"]), arguments if isinstance(arguments, Mapping) else {}
            )
    return None


@dataclass(frozen=True)
class Patch:
    """How the encoder cuts an image into patches.

    Attributes:
        size: side of a patch, px.
        shrinks_when_small: whether, in an image with a side below ``size``, a patch is only as large as that side.
    """

    size: int
    shrinks_when_small: bool = False

    def divides(self, width: int, height: int) -> bool:
        """Whether patches cover an image (px) exactly."""
        size = min(self.size, width, height) if self.shrinks_when_small else self.size
        return width % size == 0 and height % size == 0


def patch_of(config: Mapping[str, Any]) -> Patch | None:
    """How the encoder of a run config cuts images; None if the config does not say."""
    for module in _modules(config):
        arguments, spec = pick(module, ("init_args",)), encoder_of(pick(module, ("class_path",)))
        if spec is not None and spec.pixelwise:
            return Patch(1)
        for size in (pick(arguments, ("patch_size",)), pick(arguments, ("forward_kwargs", "patch_size"))):
            if isinstance(size, int) and size > 0:
                return Patch(size, shrinks_when_small=spec is not None and spec.shrinks_patches)
    return None


def _modules(config: Mapping[str, Any]) -> list[Any]:
    encoder = pick(config, ENCODER_PATH)
    return encoder if isinstance(encoder, list) else []
