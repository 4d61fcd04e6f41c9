"""One figure with its title and its description in words; as inline SVG with the page's colours, as SVG or PNG file."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rslp.io import write_atomic

# Colours of a figure, and the CSS variables that take their place in a page, which has two sets of values.
INK, MUTED, GRID, PAPER = "#1a2027", "#59636e", "#d3d9df", "#fefefe"
SERIES = ("#1f5fbf", "#b4530a", "#14793c", "#7c3aec", "#bd123d", "#0f756e", "#a11bae", "#6b5b0e")
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper"} | {c: f"s{i}" for i, c in enumerate(SERIES, 1)}
# Colours of classes in label rasters, in both sets the same; grey is unlabelled.
CLASSES = (
    *("#e0b040", "#2f9e44", "#c2255c", "#3b76c4", "#7a4a8c", "#8fd16a", "#f4a3c0", "#1b5e3a"),
    *("#c0392b", "#5bc0de", "#ffd43b", "#495057", "#e8590c", "#12b886", "#ae3ec9", "#74c0fc"),
)
UNLABELLED = "#c9c9c9"
# Width of a figure on a phone (px; an inch has 72).
WIDTH = 340.0
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rslp",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: name of its file, without ending.
        title: its title.
        text: what it shows, in words, for readers who do not see it.
        figure: matplotlib's figure, without a title.
        caption: a text below it, if any.
    """

    name: str
    title: str
    text: str
    figure: Figure
    caption: str = ""

    def inline(self) -> str:
        """The figure as an SVG element, whose colours are variables of the page."""
        svg = re.sub(
            r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", "", self._written("svg").decode(), flags=re.DOTALL
        )
        used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
        # Ids of several figures in one page must differ; most are not referred to.
        kept = lambda match: f' id="{self._slug}-{match[1]}"' if match[1] in used else ""  # noqa: E731
        svg = re.sub(r' id="([^"]+)"', kept, svg)
        svg = re.sub(r'(url\(|href=")#', rf"\1#{self._slug}-", svg)
        svg = re.sub(r"font-family: [^;\"]*|font: (\d+)px [^;\"]*", lambda m: f"font-size: {m[1]}px" * bool(m[1]), svg)
        for colour, variable in VARIABLES.items():
            svg = svg.replace(colour, f"var(--{variable})")
        width, height = (72 * inches for inches in self.figure.get_size_inches())
        head = f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img"'
        label = escape(f"{self.title}. {self.text}", quote=True)
        return re.sub(r"<svg[^>]*>", lambda _: f'{head} aria-label="{label}">', svg, count=1)

    def save(self, folder: Path) -> None:
        """Write the figure to ``<name>.svg`` and ``<name>.png``."""
        write_atomic(folder / f"{self._slug}.svg", self._written("svg"))
        write_atomic(folder / f"{self._slug}.png", self.png())

    def png(self) -> bytes:
        """The content of a PNG file, with twice as many px."""
        return self._written("png")

    @property
    def _slug(self) -> str:
        return re.sub(r"[^\w-]+", "-", self.name)

    def _written(self, form: str) -> bytes:
        """The content of a file; the same figure gives the same bytes."""
        stream = io.BytesIO()
        metadata = {"Date": None, "Creator": "rslp"} if form == "svg" else {"Software": "rslp"}
        with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
            # The text of an SVG stays text: which letters matplotlib's own font has is no matter.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            self.figure.savefig(stream, format=form, dpi=144, transparent=form == "svg", metadata=metadata)
        return stream.getvalue()


# Decorates functions that draw.
styled = mpl.rc_context(_SETTINGS)


def new_figure(
    height: float, *, columns: int = 1, width: float = WIDTH, plain: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with its axes beside each other; to be called in a function that is ``styled``.

    Args:
        height: in px.
        columns: number of axes.
        width: in px; by default as wide as a phone.
        plain: axes of fixed size for images, without ticks and labels, which are quick to draw.
    """
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout=None if plain else "constrained")
    axes = list(figure.subplots(1, columns, squeeze=False).flat)
    if plain:
        figure.subplots_adjust(left=0, right=1, bottom=0, top=1 - 18 / height, wspace=0.04)
        for axis in axes:
            axis.set_axis_off()
    return figure, axes
