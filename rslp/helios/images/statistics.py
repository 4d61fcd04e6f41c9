"""Mean and standard deviation of the pre-training data by band."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from rslp.errors import ConfigError, Problem


@dataclass(frozen=True)
class Band:
    """One band of the pre-training data.

    Attributes:
        name: the band's name, as in configs.
        mean: mean over the pre-training data (DN for optical sensors, dB for Sentinel-1).
        std: standard deviation, same unit.
        nm: centre wavelength in nanometres; None for radar, classes and elevation.
    """

    name: str
    mean: float
    std: float
    nm: float | None = None


Statistics = Mapping[str, tuple[Band, ...]]


@cache
def shipped_statistics() -> Statistics:
    """The statistics that ship with the package, per modality, bands in the encoder's order.

    Source: the ``computed.json`` that Helios (OlmoEarth) was pre-trained with.
    """
    text = files("rslp.helios").joinpath("data/statistics.json").read_text(encoding="utf-8")
    return {
        modality: tuple(Band(name=name, **values) for name, values in bands.items())
        for modality, bands in json.loads(text).items()
    }


def load(config_fname: str | None) -> Statistics:
    """Read the statistics that a config names.

    Args:
        config_fname: a JSON file, modality -> band -> ``{mean, std}``; None for the shipped ones. A missing file
            ``/opt/helios/…/computed.json`` means the shipped ones, too: old configs name the file of a container image.

    Returns:
        Per modality the bands in the encoder's order (in the file's order for modalities unknown to the encoder).

    Raises:
        ConfigError: the file does not exist or has another content.
    """
    if config_fname is None:
        return shipped_statistics()
    path = Path(config_fname)
    if not path.is_file():
        named = PurePosixPath(config_fname)
        if named.is_relative_to("/opt/helios") and named.name == "computed.json":
            return shipped_statistics()
        raise _problem(f"no such file {config_fname!r}; leave config_fname out to use the shipped statistics")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _problem(f"cannot read {config_fname!r}: {error}") from error
    if not isinstance(content, dict):
        raise _problem(f"{config_fname!r} holds no mapping of modalities")
    return {
        modality: _in_order(modality, bands, config_fname)
        for modality, bands in content.items()
        if isinstance(bands, dict)
    }


def _in_order(modality: str, bands: Mapping[str, Any], config_fname: str) -> tuple[Band, ...]:
    known = {band.name: band for band in shipped_statistics().get(modality, ())}
    read = {}
    for name, values in bands.items():
        try:
            mean, std = float(values["mean"]), float(values["std"])
        except (KeyError, TypeError, ValueError) as error:
            raise _problem(f"{config_fname!r}: {modality}.{name} has no numbers `mean` and `std`") from error
        if std <= 0:
            raise _problem(f"{config_fname!r}: {modality}.{name}.std is {std}, must be positive")
        read[name] = Band(name, mean, std, known[name].nm if name in known else None)
    absent = [name for name in known if name not in read]
    if absent:
        raise _problem(f"{config_fname!r}: {modality} lacks the bands {', '.join(absent)}")
    return tuple(read[name] for name in known) + tuple(band for name, band in read.items() if name not in known)


def _problem(message: str) -> ConfigError:
    return ConfigError(Problem(message, key="HeliosNormalize.config_fname"))
