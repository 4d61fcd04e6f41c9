"""The table of encoders: the inputs that each takes, their bands in order, their units, and how it cuts images.

Normalisation, ``check``, ``make_dataset`` and the page on encoders read this table; a new encoder is one entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rslp.helios.images.statistics import shipped_statistics

OPTICAL, RADAR = "optical", "radar"


@dataclass(frozen=True)
class Quantity:
    """What the values of a band measure.

    Attributes:
        units: the unit that the encoder takes, in words.
        low: the lowest value that occurs on Earth; None where any may.
        high: the highest, likewise.
        kind: ``optical`` or ``radar`` for images whose units can be told from their values, see ``images.units``.
    """

    units: str
    low: float | None = None
    high: float | None = None
    kind: str | None = None


@dataclass(frozen=True)
class EncoderInput:
    """One input of an encoder.

    Attributes:
        name: the input's name in configs.
        content: what it holds, in words.
        bands: names of its bands, in the encoder's order.
        quantities: what they measure: one for each band, or one for all.
        dated: whether it is a series with dates.
        per_pixel: whether it differs between the pixels of an image; otherwise its mean over all pixels is used.
    """

    name: str
    content: str
    bands: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    dated: bool = True
    per_pixel: bool = True

    def quantity_of(self, band: str) -> Quantity:
        """What a band measures."""
        at = next((index for index, name in enumerate(self.bands) if same_band(name, band)), 0)
        return self.quantities[min(at, len(self.quantities) - 1)]

    @property
    def kind(self) -> str | None:
        """The kind of its images, see ``Quantity``."""
        return self.quantities[0].kind


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder and its inputs.

    Attributes:
        name: as people call it; in lower case the value of ``encoder`` in the configuration of ``make_dataset``.
        class_paths: the classes that build it, ours first, then rslearn's.
        inputs: its inputs.
        normalises: whether it normalises raw values by itself and takes bands by their position.
        pixelwise: whether it encodes each pixel by itself; otherwise its argument ``patch_size`` says how large a patch
            is.
        max_dates: how many dates a sample may have; None for any number.
        shrinks_patches: whether in an image with a side shorter than a patch, a patch is as large as that side.
    """

    name: str
    class_paths: tuple[str, ...]
    inputs: tuple[EncoderInput, ...]
    normalises: bool = True
    pixelwise: bool = False
    max_dates: int | None = None
    shrinks_patches: bool = False

    def find(self, name: str) -> EncoderInput | None:
        """The input of this name; None if the encoder has no such input."""
        return next((one for one in self.inputs if one.name == name), None)


_S2_10 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
_DIGITAL = Quantity("digital numbers (reflectance x 10000)", 0, 65535, OPTICAL)
_DECIBEL = Quantity("dB", -120, 60, RADAR)
_KELVIN, _RAIN = Quantity("K", 150, 350), Quantity("m per month", -0.01, 5)
_METRES, _SLOPE = Quantity("m", -500, 9000), Quantity("degrees", 0, 90)
_TENTH_MM, _SHARE, _PERCENT = Quantity("0.1 mm", -100, 10_000), Quantity("share, 0 to 1", 0, 1), Quantity("%", 0, 100)
# Inputs that Galileo and Presto share, under the same names.
_SHARED = (
    EncoderInput("s1", "Sentinel-1", ("vv", "vh"), (_DECIBEL,)),
    EncoderInput("s2", "Sentinel-2", _S2_10, (_DIGITAL,)),
)
_WEATHER = ("temperature_2m", "total_precipitation")
_TERRAIN = EncoderInput("srtm", "elevation and slope", ("elevation", "slope"), (_METRES, _SLOPE), dated=False)
_LATLON = EncoderInput(
    "latlon", "place; by default that of the window", ("latitude", "longitude"),
    (Quantity("degrees", -90, 90), Quantity("degrees", -180, 180)), dated=False, per_pixel=False,
)  # fmt: skip
# The inputs that the published models were trained to take; others are those of the modalities' statistics.
_HELIOS = (
    ("sentinel2_l2a", "Sentinel-2 L2A", _DIGITAL),
    ("sentinel1", "Sentinel-1", _DECIBEL),
    ("landsat", "Landsat 8/9 level 1", Quantity("digital numbers", 0, 65535, OPTICAL)),
)
_DYNAMIC_WORLD = ("water", "trees", "grass", "flooded_vegetation", "crops", "shrub", "built", "bare", "snow")

HELIOS = EncoderSpec(
    "Helios",
    ("rslp.helios.model.Helios", "rslearn.models.olmoearth_pretrain.model.OlmoEarth"),
    tuple(
        EncoderInput(name, content, tuple(band.name for band in shipped_statistics()[name]), (quantity,))
        for name, content, quantity in _HELIOS
    ),
    normalises=False,
)
GALILEO = EncoderSpec(
    "Galileo",
    (
        "rslp.helios.galileo.Galileo",
        "rslearn.models.galileo.GalileoModel",
        "rslearn.models.galileo.galileo.GalileoModel",
    ),
    (
        *_SHARED,
        EncoderInput("era5", "weather (ERA5)", _WEATHER, (_KELVIN, _RAIN), per_pixel=False),
        EncoderInput("tc", "TerraClimate", ("def", "soil", "aet"), (_TENTH_MM,), per_pixel=False),
        EncoderInput("viirs", "night lights (VIIRS)", ("avg_rad",), (Quantity("nW/cm2/sr"),), per_pixel=False),
        _TERRAIN,
        EncoderInput("dw", "Dynamic World, mean over time", _DYNAMIC_WORLD, (_SHARE,), dated=False),
        EncoderInput(
            "wc", "WorldCereal", ("temporarycrops", "maize", "wintercereals", "springcereals", "irrigation"),
            (_PERCENT,), dated=False,
        ),
        EncoderInput(
            "landscan", "population (LandScan)", ("b1",), (Quantity("persons per pixel", 0),), dated=False,
            per_pixel=False,
        ),
        _LATLON,
    ),
    max_dates=24,
    shrinks_patches=True,
)  # fmt: skip
PRESTO = EncoderSpec(
    "Presto",
    (
        "rslp.helios.presto.Presto",
        "rslearn.models.presto.Presto",
        "rslearn.models.presto.presto.Presto",
    ),
    (
        *_SHARED,
        EncoderInput("era5", "weather (ERA5)", _WEATHER, (_KELVIN, _RAIN)),
        _TERRAIN,
        EncoderInput("dynamic_world", "class of Dynamic World", ("class",), (Quantity("0 to 8, 9: none", 0, 9),)),
        _LATLON,
    ),
    pixelwise=True,
    max_dates=24,
)
ENCODERS = (HELIOS, GALILEO, PRESTO)


def encoder_of(class_path: object) -> EncoderSpec | None:
    """The encoder that a class builds; None for classes that the table does not have."""
    return next((spec for spec in ENCODERS if class_path in spec.class_paths), None)


def names_of_kind(kind: str) -> frozenset[str]:
    """The names of all inputs of a kind, in any encoder."""
    return frozenset(one.name for spec in ENCODERS for one in spec.inputs if one.kind == kind)


def bands_taken(spec: EncoderSpec, name: str, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The bands that a configured encoder expects of an input, in order: its argument ``bands``, or all of them.

    Args:
        spec: the encoder.
        name: one of its inputs.
        arguments: the arguments of its class in a config.
    """
    given = arguments.get("bands")
    chosen = given.get(name) if isinstance(given, Mapping) else None
    known = spec.find(name)
    return tuple(map(str, chosen)) if isinstance(chosen, list | tuple) else known.bands if known else ()


def same_band(first: str, second: str) -> bool:
    """Whether two names are those of one band: ``B2`` and ``B02``, ``VV`` and ``vv``."""
    return _plain(first) == _plain(second)


def _plain(name: str) -> str:
    lower = name.lower()
    return lower[0] + lower[1:].lstrip("0") if lower[:1] == "b" and lower[1:2].isdigit() else lower
