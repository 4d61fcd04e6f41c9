"""The four example datasets: region, content, metric and classes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rslp.example import crops, fields, fuel, vessels
from rslp.example.layout import Region
from rslp.example.scene import Scene, Site


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One example dataset.

    Attributes:
        region: place and number of windows.
        make: makes a window's content from the seed and its site.
        metric: its metric: ``balanced_accuracy``, ``average_precision``, ``miou`` or ``r2``.
        classes: names of the classes; empty for a regression.
    """

    region: Region
    make: Callable[[int, Site], Scene]
    metric: str
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the dataset, its folder and its config file."""
        return self.region.dataset


KINDS = (
    # Plains of Bohemia.
    Kind(
        region=Region(
            dataset="crop_type",
            epsg=32633,
            east=440_000,
            north=5_580_000,
            resolution=10,
            size=32,
            windows=(320, 48, 144),
        ),
        make=crops.make,
        metric="balanced_accuracy",
        classes=crops.CLASSES,
    ),
    # Southern North Sea.
    Kind(
        region=Region(
            dataset="vessel_detection",
            epsg=32631,
            east=450_000,
            north=5_850_000,
            resolution=15,
            size=128,
            windows=(240, 32, 100),
        ),
        make=vessels.make,
        metric="average_precision",
        classes=vessels.CLASSES,
    ),
    # Upper Swabia.
    Kind(
        region=Region(
            dataset="land_cover",
            epsg=32632,
            east=540_000,
            north=5_330_000,
            resolution=10,
            size=64,
            windows=(200, 24, 60),
        ),
        make=fields.make,
        metric="miou",
        classes=fields.CLASSES,
    ),
    # Southern California.
    Kind(
        region=Region(
            dataset="fuel_moisture",
            epsg=32611,
            east=420_000,
            north=3_830_000,
            resolution=10,
            size=16,
            windows=(360, 48, 160),
        ),
        make=fuel.make,
        metric="r2",
    ),
)
