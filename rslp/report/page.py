"""The page: its sections, made of blocks, and how they become one self-contained HTML file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rslp.figures.picture import CLASSES, UNLABELLED, Picture


@dataclass(frozen=True)
class Number:
    """A number of a table; the page has the exact value beside the rounded text.

    Attributes:
        value: the number; None where there is none.
        form: its format.
    """

    value: float | None
    form: str = ".3f"

    def __str__(self) -> str:
        """The text."""
        if self.value is None or not math.isfinite(self.value):
            return "none"
        return format(self.value, self.form).replace("-", "\N{MINUS SIGN}")

    @property
    def exact(self) -> str:
        """The value without loss."""
        return "" if self.value is None else repr(self.value)


Cell = str | Number


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list of several."""

    lines: Sequence[str]
    kind: str = "text"


@dataclass(frozen=True)
class Facts:
    """Names with values."""

    items: Sequence[tuple[str, Cell]]
    kind: str = "facts"


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    kind: str = "table"


@dataclass(frozen=True)
class Figures:
    """Figures beside each other; ``legend`` names the colours of classes."""

    pictures: Sequence[Picture]
    legend: Sequence[str] = ()
    title: str = ""
    kind: str = "figures"


@dataclass(frozen=True)
class Code:
    """The text of a file."""

    label: str
    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on request."""

    summary: str
    blocks: Sequence[Any]
    kind: str = "fold"


Blocks = Sequence[Text | Facts | Table | Figures | Code | Fold]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: its anchor.
        title: its heading.
        blocks: what it has.
        absent: in place of blocks, one sentence that says why there are none.
    """

    id: str
    title: str
    blocks: Blocks = ()
    absent: str = ""

    @classmethod
    def of(cls, id: str, title: str, made: Blocks | str) -> Section:
        """A section with blocks, or with the sentence that says why there are none."""
        return cls(id, title, absent=made) if isinstance(made, str) else cls(id, title, made)


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: its title.
        kind: ``run`` or ``study``.
        name: project and name.
        state: how far it is, in a word or two.
        sections: its parts.
        notes: one line for each damaged file.
        facts: what stands below the title.
    """

    title: str
    kind: str
    name: str
    state: str
    sections: Sequence[Section]
    notes: Sequence[str]
    facts: Mapping[str, str]

    def html(self) -> str:
        """The page as text."""
        loader = PackageLoader("rslp.report")
        environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        style = files("rslp.report").joinpath("templates/style.css").read_text(encoding="utf-8")
        environment.filters["inline"] = lambda picture: Markup(picture.inline())
        colours = {"classes": CLASSES, "unlabelled": UNLABELLED}
        return environment.get_template("page.html").render(page=self, style=Markup(style), colours=colours)

    def pictures(self) -> list[Picture]:
        """All figures."""
        return [picture for section in self.sections for picture in _pictures(section.blocks)]


def _pictures(blocks: Sequence[Any]) -> Iterator[Picture]:
    for block in blocks:
        yield from block.pictures if isinstance(block, Figures) else ()
        yield from _pictures(block.blocks) if isinstance(block, Fold) else ()
