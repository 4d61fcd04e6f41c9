"""Charts: curves, bars with intervals, matrices, points, maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rslp.figures.picture import GRID, INK, MUTED, SERIES, Picture, new_figure, styled

Floats = npt.NDArray[np.float64]
Points = Sequence[tuple[float, float]]
# Names of at most so many letters stand in two columns.
_SHORT = 20
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Bar:
    """One value with its interval.

    Attributes:
        label: what it is of.
        value: the value.
        low: lower end of its interval; None without one.
        high: upper end.
        mark: a second value to compare with, drawn as a line; None without one.
        series: number of its colour.
    """

    label: str
    value: float
    low: float | None
    high: float | None
    mark: float | None = None
    series: int = 0

    def __str__(self) -> str:
        """The values in words."""
        interval = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        mark = "" if self.mark is None else f", line at {self.mark:.3f}"
        return f"{self.label} {self.value:.3f}{interval}{mark}"


@styled
def intervals(name: str, title: str, bars: Sequence[Bar], *, axis: str, zero: bool = False) -> Picture:
    """Values as points with their intervals as bars, one below the other.

    Args:
        name: name of the figure's file.
        title: its title.
        bars: the values.
        axis: label of the axis.
        zero: draw a line at 0, for differences.
    """
    figure, (axes,) = new_figure(58 + 40 * len(bars))
    for row, bar in enumerate(bars):
        colour = SERIES[bar.series % len(SERIES)]
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [row, row], color=colour, lw=6, alpha=0.45, solid_capstyle="butt")
        if bar.mark is not None:
            axes.plot([bar.mark] * 2, [row - 0.22, row + 0.22], color=INK, lw=2)
        axes.plot([bar.value], [row], "o", color=colour, ms=8)
        axes.annotate(bar.label, (0, row - 0.32), xycoords=("axes fraction", "data"), va="bottom", fontsize=10)
    axes.set_ylim(len(bars) - 0.5, -0.95)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    if zero:
        axes.axvline(0, color=INK, lw=1)
        reach = max((abs(end) for bar in bars for end in (bar.value, bar.low or 0.0, bar.high or 0.0)), default=1.0)
        axes.set_xlim(-1.12 * (reach or 1.0), 1.12 * (reach or 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(axis)
    axes.grid(axis="x", lw=0.6, color=GRID)
    return Picture(name, title, f"{axis}. {'; '.join(map(str, bars))}.", figure)


@dataclass(frozen=True)
class Panel:
    """Axes with curves.

    Attributes:
        curves: x and y by name; the same name has the same colour in all panels of a figure.
        title: what is drawn.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        level: a horizontal line, with its name.
        diagonal: draw the diagonal.
        unit_square: both axes from 0 to 1.
        dots: draw points, not lines.
        from_zero: the vertical axis begins at 0.
    """

    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    title: str = ""
    x: str = ""
    y: str = ""
    level: tuple[str, float] | None = None
    diagonal: bool = False
    unit_square: bool = False
    dots: bool = False
    from_zero: bool = False


@styled
def lines(name: str, title: str, panels: Sequence[Panel], *, text: str, height: float = 210) -> Picture:
    """Curves in one or two panels beside each other."""
    figure, axes = new_figure(height, columns=len(panels))
    names = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, names)
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=3)
    return Picture(name, title, text, figure)


def _draw_panel(axis: Axes, panel: Panel, names: Sequence[str]) -> None:
    for label, (x, y) in panel.curves.items():
        number = names.index(label)
        colour = SERIES[number % len(SERIES)]
        if panel.dots:
            axis.plot(x, y, "o", ms=4, color=colour, alpha=0.55, mew=0, label=label)
        else:
            style = _DASHES[number % len(_DASHES)]
            axis.plot(x, y, style, color=colour, lw=1.8, marker="o" if len(x) < 12 else "", ms=3.5, label=label)
    if panel.level is not None:
        axis.axhline(panel.level[1], color=MUTED, lw=1.4, ls=":", label=panel.level[0])
    for ticked in (axis.xaxis, axis.yaxis):
        ticked.set_major_locator(MaxNLocator(4))
    if panel.unit_square:
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), box_aspect=1)
    if panel.diagonal:
        ends = [min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])]
        axis.plot(ends, ends, color=MUTED, lw=1, ls=":")
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    axis.set_title(panel.title, loc="left")
    axis.set(xlabel=panel.x, ylabel=panel.y)
    axis.grid(lw=0.6, color=GRID)


@styled
def matrix(
    name: str, title: str, shares: Floats, texts: Sequence[Sequence[str]], labels: tuple[Sequence[str], Sequence[str]],
    *, axes: tuple[str, str], text: str,
) -> Picture:  # fmt: skip
    """A matrix of cells, the darker the larger their share; negative shares have another colour.

    Args:
        name: name of the figure's file.
        title: its title.
        shares: -1 to 1, ``R C``; not finite: an empty cell.
        texts: the text of each cell.
        labels: names of rows and of columns.
        axes: what rows and columns are.
        text: the matrix in words.
    """
    rows, columns = shares.shape
    size = max(26.0, min(54.0, 230 / max(columns, 1)))
    figure, (axis,) = new_figure(86 + size * rows)
    for (row, column), share in np.ndenumerate(shares):
        if math.isfinite(share):
            colour = SERIES[0] if share >= 0 else SERIES[1]
            axis.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, color=colour, alpha=0.5 * abs(share))
            if size >= 26 and columns <= 10:
                axis.text(column, row, texts[row][column], ha="center", va="center", fontsize=9 if columns < 8 else 7.5)
    axis.set_xlim(-0.5, columns - 0.5)
    axis.set_ylim(rows - 0.5, -0.5)
    small = 9 if max(rows, columns) <= 12 else 7
    long = max((len(label) for label in labels[1]), default=0) * columns > 40
    axis.set_xticks(
        range(columns), labels[1], rotation=60 if long else 0, ha="right" if long else "center", fontsize=small
    )
    axis.set_yticks(range(rows), labels[0], fontsize=small)
    axis.tick_params(length=0)
    axis.set_ylabel(axes[0])
    axis.set_xlabel(axes[1])
    for spine in axis.spines.values():
        spine.set_visible(False)
    return Picture(name, title, text, figure)


@styled
def shares_over_time(
    name: str, title: str, epochs: Sequence[int], counts: Mapping[str, Sequence[float]], *, text: str
) -> Picture:
    """Stacked bars: for each epoch the share of each name."""
    columns = 2 if max(map(len, counts)) <= _SHORT else 1
    figure, (axis,) = new_figure(190 + 16 * math.ceil(len(counts) / columns))
    values = np.array([counts[name] for name in counts], dtype=np.float64)
    shares = values / np.maximum(values.sum(axis=0), 1)
    base = np.zeros(len(epochs))
    for number, (label, share) in enumerate(zip(counts, shares, strict=True)):
        hatch = ("", "///", "...")[number // len(SERIES) % 3]
        colour = SERIES[number % len(SERIES)]
        axis.bar(epochs, share, bottom=base, width=0.9, color=colour, label=label, hatch=hatch, edgecolor="none")
        base = base + share
    axis.set_ylim(0, 1)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlabel("epoch")
    axis.set_ylabel("share of the samples")
    figure.legend(loc="outside upper left", ncols=columns)
    return Picture(name, title, text, figure)


@styled
def places(name: str, title: str, points: Mapping[str, Points], *, text: str) -> Picture:
    """A map of points by group, in degrees, with equal scales in the middle; no map tiles."""
    figure, (axis,) = new_figure(300)
    for number, (label, of_group) in enumerate(points.items()):
        lon, lat = (list(part) for part in zip(*of_group, strict=True))
        marker = "osD^v"[number % 5]
        axis.plot(
            lon, lat, marker, color=SERIES[number % len(SERIES)], ms=5, alpha=0.6, mew=0, label=f"{label} ({len(lon)})"
        )
    every = np.array([point for of_group in points.values() for point in of_group])
    middle, spread = (every.min(axis=0) + every.max(axis=0)) / 2, np.ptp(every, axis=0)
    stretch = 1 / max(0.05, math.cos(math.radians(float(np.clip(middle[1], -85, 85)))))
    half = max(0.55 * float(max(spread[0] / stretch, spread[1])), 1e-4)
    axis.set_xlim(middle[0] - half * stretch, middle[0] + half * stretch)
    axis.set_ylim(middle[1] - half, middle[1] + half)
    axis.set_box_aspect(1)
    axis.ticklabel_format(useOffset=False)
    for axis_of in (axis.xaxis, axis.yaxis):
        axis_of.set_major_locator(MaxNLocator(3))
    axis.set_xlabel("longitude (°)")
    axis.set_ylabel("latitude (°)")
    axis.grid(lw=0.6, color=GRID)
    figure.legend(loc="outside upper left", ncols=3)
    return Picture(name, title, text, figure)
