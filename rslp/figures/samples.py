"""Samples: an image beside label and prediction, with boxes, class colours or shades; or a series of one pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from rslp.figures.picture import CLASSES, GRID, SERIES, UNLABELLED, WIDTH, Picture, new_figure, styled

Array = npt.NDArray[Any]
# Width of a picture without rasters beside it (px).
SMALL = 150.0


@dataclass(frozen=True)
class SampleView:
    """What is shown of a sample.

    Attributes:
        image: ``H W 3`` or ``H W``, uint8; None for a series.
        series: ``T C``; None for an image.
        bands: names of the bands of the image or of the series.
        truth: label raster ``H W``: class numbers (negative: unlabelled), or numbers (not finite: unlabelled).
        prediction: likewise.
        boxes: x0 y0 x1 y1 in px, of the objects and of the detections.
    """

    image: Array | None
    series: Array | None
    bands: Sequence[str]
    truth: Array | None = None
    prediction: Array | None = None
    boxes: Mapping[str, Sequence[Sequence[float]]] | None = None


@styled
def draw_sample(name: str, title: str, view: SampleView, *, caption: str, classes: int) -> Picture:
    """Draw a sample.

    Args:
        name: name of the figure's file.
        title: its title.
        view: what is shown.
        caption: label, prediction and error in words.
        classes: number of classes of a label raster; 0 for numbers.
    """
    if view.series is not None:
        figure, (axis,) = new_figure(170)
        for number, band in enumerate(view.bands):
            axis.plot(view.series[:, number], "o-", ms=3, lw=1.5, color=SERIES[number % len(SERIES)], label=band)
        axis.set_xlabel("number of the image in the series")
        axis.grid(lw=0.6, color=GRID)
        axis.legend(ncols=3)
        return Picture(name, title, caption, figure, caption)
    shown = {"label": view.truth, "prediction": view.prediction} if view.truth is not None else {}
    figure, axes = new_figure(
        132 if shown else 168, columns=1 + len(shown), width=WIDTH if shown else SMALL, plain=True
    )
    _draw_image(axes[0], view)
    ends = _ends([raster for raster in shown.values() if raster is not None])
    for axis, (label, raster) in zip(axes[1:], shown.items(), strict=True):
        axis.set_title(label, fontsize=9)
        if raster is not None:
            axis.imshow(_painted(raster, classes, ends), interpolation="none")
    return Picture(name, title, caption, figure, caption)


def _draw_image(axis: Axes, view: SampleView) -> None:
    axis.set_title(", ".join(view.bands), fontsize=9)
    if view.image is not None:
        axis.imshow(view.image, cmap="gray", interpolation="none")
    for number, (_, boxes) in enumerate((view.boxes or {}).items()):
        for x0, y0, x1, y1 in boxes:
            # Pixel 0 reaches from -0.5 to 0.5.
            corner, style = (x0 - 0.5, y0 - 0.5), ("-", "--")[number % 2]
            colour = ("#ffd43b", "#ff5c8a")[number % 2]
            axis.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, lw=1.6, ls=style, ec=colour))


def _ends(rasters: Sequence[Array]) -> tuple[float, float]:
    """The ends of the shades that all rasters share."""
    values = np.concatenate([raster[np.isfinite(raster)].ravel() for raster in rasters] or [np.zeros(1)])
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _painted(raster: Array, classes: int, ends: tuple[float, float]) -> Array:
    """A raster as colours ``H W 3``: those of classes, or from dark to bright."""
    if classes:
        table = np.array([to_rgb(CLASSES[number % len(CLASSES)]) for number in range(classes)] + [to_rgb(UNLABELLED)])
        known = (raster >= 0) & (raster < classes)
        painted: Array = table[np.where(known, raster, classes).astype(np.int64)]
        return painted
    low, high = ends
    shade = np.clip((np.nan_to_num(raster) - low) / max(high - low, 1e-12), 0, 1)
    shades: Array = np.where(np.isfinite(raster)[..., None], np.repeat(shade[..., None], 3, axis=2), to_rgb(UNLABELLED))
    return shades
