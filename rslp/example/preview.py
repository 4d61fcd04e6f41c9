"""Pictures of the example datasets, drawn from what is on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Polygon

from rslp.example import crops, fields, spectra
from rslp.example.scene import Array

# Colours that also colour-blind readers can tell apart.
_CROPS = dict(zip(crops.CLASSES, ("#e0b040", "#f2e93c", "#b8860b", "#2f9e44", "#c2255c", "#8fd16a"), strict=True))
_COVER = ("#3b76c4", "#c0392b", "#1b5e3a", "#a5d46a", "#e3b23c", "#f4a3c0", "#7a4a8c")
# Pages with curves need room for their axes.
_CURVED = ("crop_type", "fuel_moisture")
_INK, _FAINT = "#222222", "#8a8a8a"


class _Window:
    """A window on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.meta = json.loads((root / "metadata.json").read_text(encoding="utf-8"))

    def images(self, layer: str) -> tuple[Array, list[str]]:
        """Return ``T C H W`` and the dates."""
        folder = next(path.parent for path in sorted((self.root / "layers" / layer).rglob("geotiff.tif")))
        note = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        with rasterio.open(folder / "geotiff.tif") as file:
            values = file.read()
        shape = (note["num_channels"], note["num_timesteps"], *values.shape[1:])
        dates = [span[0][:10] for span in note["timestamps"]]
        return values.reshape(shape).swapaxes(0, 1).astype(float), dates

    def marks(self) -> list[tuple[Array, dict[str, str]]]:
        """Return the vector labels: coordinates ``N 2`` in px of the window, and properties."""
        text = (self.root / "layers" / "label" / "data.geojson").read_text(encoding="utf-8")
        corner = np.array(self.meta["bounds"][:2])
        labels = []
        for feature in json.loads(text)["features"]:
            points = np.array(feature["geometry"]["coordinates"], dtype=float).reshape(-1, 2)
            labels.append((points - corner, feature["properties"]))
        return labels


def draw(root: Path) -> None:
    """Draw ``preview/<dataset>.png`` for each dataset.

    Args:
        root: the example folder with its datasets.
    """
    (root / "preview").mkdir()
    pages: dict[str, Callable[[list[_Window]], Figure]] = {
        "crop_type": _crop_type,
        "vessel_detection": _vessels,
        "land_cover": _land_cover,
        "fuel_moisture": _fuel_moisture,
    }
    for name, page in pages.items():
        folders = sorted((root / name / "windows" / "example").iterdir())
        # The first of each block: neighbours look alike.
        windows = [_Window(folder) for folder in folders[::4]]
        # Without the fixed metadata, a picture would name the version of its library.
        figure = page(windows)
        # Set by hand: matplotlib's own layout would take longer than all the drawing.
        figure.subplots_adjust(
            left=0.035, right=0.975, bottom=0.06, top=0.96, wspace=0.12, hspace=0.3 if name in _CURVED else 0.16
        )
        figure.savefig(root / "preview" / f"{name}.png", dpi=90, metadata={"Software": "rslp"})


def _crop_type(windows: list[_Window]) -> Figure:
    """Draw one field a crop: true colour over the year, and what its leaves and its echo do."""
    chosen = {window.marks()[0][1]["crop"]: window for window in reversed(windows)}
    order = [crop for crop in crops.CLASSES if crop in chosen]
    figure = Figure(figsize=(15.5, 2.05 * len(order) + 0.5))
    axes = figure.subplots(len(order), 9, squeeze=False, width_ratios=[1] * 7 + [1.5, 1.5])
    for row, crop in zip(axes, order, strict=True):
        window = chosen[crop]
        ring = window.marks()[0][0]
        images, dates = window.images("sentinel2")
        picks = np.unique(np.linspace(0, len(dates) - 1, 7).round().astype(int))
        for axis in row[:7]:
            _bare(axis)
        for axis, which in zip(row, picks, strict=False):
            axis.imshow(_true_colour(images[which]))
            axis.add_patch(Polygon(ring - 0.5, fill=False, color=_CROPS[crop], lw=1.6))
            axis.set_title(dates[which][5:], fontsize=8, color=_FAINT, pad=2)
        row[0].set_ylabel(crop.replace("_", " "), fontsize=10, color=_INK)
        inside = np.s_[..., 13:19, 13:19]
        red, nir = images[:, 2][inside], images[:, 3][inside]
        _curve(row[7], dates, np.median((nir - red) / (nir + red), axis=(1, 2)), "NDVI", (-0.1, 1.0), _CROPS[crop])
        echoes, radar = window.images("sentinel1")
        _curve(row[8], radar, echoes[:, 1][inside].mean((1, 2)), "VH, dB", (-26, -10), _CROPS[crop])
    return figure


def _vessels(windows: list[_Window]) -> Figure:
    """Draw scenes with their labels: true colour above, short-wave infrared, near infrared and thermal below."""
    chosen = sorted(windows, key=lambda window: -len(window.marks()))[:8]
    figure = Figure(figsize=(9.2, 9.6))
    axes = figure.subplots(4, 4)
    for number, window in enumerate(chosen):
        image = window.images("landsat")[0][0]
        upper, lower = axes[number // 4 * 2][number % 4], axes[number // 4 * 2 + 1][number % 4]
        upper.imshow(_stretch(image[[4, 3, 2]], 0.5, 99.7))
        lower.imshow(_stretch(image[[7, 5, 0]], 0.5, 99.7))
        for axis in (upper, lower):
            _bare(axis)
        for points, _ in window.marks():
            upper.add_patch(Circle(points[0] - 0.5, 9, fill=False, color="#ffd43b", lw=1.2))
        upper.set_title(window.root.name, fontsize=8, color=_FAINT, pad=2)
    axes[0][0].set_ylabel("true colour, labels", fontsize=9, color=_INK)
    axes[1][0].set_ylabel("B7, B5, panchromatic", fontsize=9, color=_INK)
    return figure


def _land_cover(windows: list[_Window]) -> Figure:
    """Draw landscapes: every date in true colour, one in infrared, the label."""
    figure = Figure(figsize=(13.5, 9.6))
    axes = figure.subplots(5, 7)
    for row, window in zip(axes, windows, strict=False):
        images, dates = window.images("sentinel2")
        for axis in row:
            _bare(axis)
        for axis, image, date in zip(row, images, dates, strict=False):
            axis.imshow(_true_colour(image))
            axis.set_title(date[5:], fontsize=8, color=_FAINT, pad=2)
        middle = images[min(2, len(images) - 1)]
        row[5].imshow(_stretch(middle[[3, 8, 2]], 0.5, 99.5))
        row[5].set_title("B8, B11, B4", fontsize=8, color=_FAINT, pad=2)
        label = window.images("label")[0][0, 0].astype(int)
        row[6].imshow(_paint(label))
        row[6].set_title("label", fontsize=8, color=_FAINT, pad=2)
    patches = [
        Patch(color=colour, label=name.replace("_", " ")) for colour, name in zip(_COVER, fields.CLASSES, strict=True)
    ]
    figure.legend(
        handles=[*patches, Patch(color="#d9d9d9", label="unlabelled")],
        loc="lower center",
        ncols=8,
        fontsize=9,
        frameon=False,
    )
    return figure


def _fuel_moisture(windows: list[_Window]) -> Figure:
    """Draw plots from dry to moist: infrared images, and the water band and the echo over the summer."""
    value = {window.root.name: float(window.marks()[0][1]["lfmc"]) for window in windows}
    ranked = sorted(windows, key=lambda window: value[window.root.name])
    chosen = [ranked[k] for k in np.linspace(0, len(ranked) - 1, 5).round().astype(int)]
    figure = Figure(figsize=(13.5, 9.2))
    axes = figure.subplots(5, 8, width_ratios=[1] * 6 + [1.6, 1.6])
    for row, window in zip(axes, chosen, strict=True):
        images, dates = window.images("sentinel2")
        for axis in row[:6]:
            _bare(axis)
        for axis, image, date in zip(row, images, dates, strict=False):
            axis.imshow(np.clip(image[[8, 3, 2]].transpose(1, 2, 0) / np.array([4500, 4500, 3000]), 0, 1))
            axis.set_title(date[5:], fontsize=8, color=_FAINT, pad=2)
        row[0].set_ylabel(f"{value[window.root.name]:.0f} %", fontsize=11, color=_INK)
        nir, swir = images[:, 7], images[:, 8]
        colour = _mellow(value[window.root.name])
        _curve(
            row[6], dates, np.median((nir - swir) / (nir + swir), axis=(1, 2)), "NDMI (B8A, B11)", (-0.3, 0.5), colour
        )
        echoes, radar = window.images("sentinel1")
        _curve(row[7], radar, echoes[:, 1].mean((1, 2)), "VH, dB", (-24, -12), colour)
    axes[0][0].text(0, -4.2, "B11, B8, B4", fontsize=9, color=_FAINT)
    return figure


def _mellow(value: float) -> tuple[float, float, float]:
    """Return a colour between brown (dry) and green (moist)."""
    share = float(np.clip((value - 50) / 120, 0, 1))
    dry, moist = np.array(to_rgb("#a0522d")), np.array(to_rgb("#2f9e44"))
    red, green, blue = dry * (1 - share) + moist * share
    return float(red), float(green), float(blue)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _curve(
    axis: Axes,
    dates: list[str],
    values: Array,
    name: str,
    limits: tuple[float, float],
    colour: str | tuple[float, float, float],
) -> None:
    """Draw a quantity over the months."""
    months = [int(date[5:7]) + int(date[8:10]) / 31 for date in dates]
    axis.plot(months, values, "-o", ms=3, lw=1.4, color=colour)
    axis.set_ylim(*limits)
    ticks = [month for month in (1, 4, 7, 10) if months[0] - 1 <= month <= months[-1] + 1]
    axis.set_xticks(ticks, [("Jan", "Apr", "Jul", "Oct")[month // 3] for month in ticks], fontsize=7)
    axis.tick_params(labelsize=7, colors=_FAINT)
    axis.set_title(name, fontsize=8, color=_FAINT, pad=2)
    axis.yaxis.tick_right()
    axis.tick_params(axis="y", direction="in", pad=-22)
    axis.spines[["top", "left"]].set_visible(False)


def _true_colour(image: Array) -> npt.NDArray[np.float64]:
    """Return red, green, blue of a Sentinel-2 image with one fixed stretch, so that dates compare."""
    bands = [spectra.S2_BANDS.index(band) for band in ("B04", "B03", "B02")]
    return np.asarray(np.clip(image[bands].transpose(1, 2, 0) / np.array([2600, 2400, 2400]), 0, 1) ** 0.7)


def _stretch(image: Array, low: float, high: float) -> npt.NDArray[np.float64]:
    """Return three bands as colours, each stretched between two percentiles."""
    ends = np.percentile(image, (low, high), axis=(1, 2))
    return np.asarray(np.clip((image.transpose(1, 2, 0) - ends[0]) / (ends[1] - ends[0]), 0, 1) ** 0.8)


def _paint(label: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return a class raster in the classes' colours."""
    colours = np.full((256, 3), 0.85)
    colours[: len(_COVER)] = [to_rgb(colour) for colour in _COVER]
    return np.asarray(colours[label])
