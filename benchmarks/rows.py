"""The common form of a result: rows and curves, one JSON object a line, so that a script can be rerun by itself."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import machine


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        median: the middle one.
        low: the lower quartile, or the lowest of fewer than eight.
        high: the upper quartile, or the highest of fewer than eight.
        n: how many there are.
    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of values."""
        if len(values) < 8:
            return cls(statistics.median(values), min(values), max(values), len(values))
        low, _, high = statistics.quantiles(values, n=4)
        return cls(statistics.median(values), low, high, len(values))


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: short, the same in every run.
        what: what was measured.
        unit: of the three spreads.
        ours: this project.
        rslearn: rslearn 0.1.19, with the smallest repairs that make it run; None where it has no like of this.
        limit: what the machine allows; None where nothing bounds it.
        limit_is: what the limit is.
        ratio: how many times better than rslearn, pair by pair.
        share: how much of the limit is reached, pair by pair.
        wanted_ratio: the ratio that was asked for.
        wanted_share: the share that was asked for.
        note: what a reader has to know.
    """

    name: str
    what: str
    unit: str
    ours: Spread
    rslearn: Spread | None = None
    limit: Spread | None = None
    limit_is: str = ""
    ratio: Spread | None = None
    share: Spread | None = None
    wanted_ratio: float | None = None
    wanted_share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Measurements over a size.

    Attributes:
        name: short, the same in every run; the plot's file is named by it.
        title: the plot's title.
        x: what grows.
        y: what was measured, with its unit.
        series: for each line its points.
        linear: whether the axes are linear, else logarithmic.
    """

    name: str
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    linear: bool = False


def row(
    name: str,
    what: str,
    *,
    unit: str,
    ours: Sequence[float],
    rslearn: Sequence[float] = (),
    limit: Sequence[float] = (),
    more_is_better: bool = False,
    **more: Any,
) -> Row:
    """A row from measurements, which are pairs where there are as many of both.

    Args:
        name: see ``Row``.
        what: see ``Row``.
        unit: see ``Row``.
        ours: of this project.
        rslearn: of rslearn, if any.
        limit: of what the machine allows, if any.
        more_is_better: whether the unit is a rate and no cost.
        **more: further attributes of the row.
    """
    return Row(
        name,
        what,
        unit,
        ours=Spread.of(ours),
        rslearn=Spread.of(rslearn) if rslearn else None,
        limit=Spread.of(limit) if limit else None,
        ratio=_times(ours, rslearn, more_is_better=more_is_better) if rslearn else None,
        share=_times(ours, limit, more_is_better=more_is_better) if limit else None,
        **more,
    )


def _times(ours: Sequence[float], other: Sequence[float], *, more_is_better: bool) -> Spread:
    """How many times better ours is."""
    if len(ours) != len(other):
        ours, other = [statistics.median(ours)], [statistics.median(other)]
    pairs = zip(ours, other, strict=True)
    return Spread.of([a / b if more_is_better else b / a for a, b in pairs])


@dataclass
class Report:
    """What a script has measured so far.

    Attributes:
        quick: whether to measure little, to see that everything works.
        out: the file for the JSON lines; None prints alone.
    """

    quick: bool = False
    out: Path | None = None
    _begun: bool = field(default=False, init=False)

    def add(self, result: Row | Curve) -> None:
        """Print a result, and append it to the file."""
        print(json.dumps({"kind": "row" if isinstance(result, Row) else "curve", **asdict(result)}), file=sys.stdout)
        sys.stdout.flush()
        print(f"  {summary(result)}", file=sys.stderr, flush=True)
        if self.out is None:
            return
        lines = [] if self._begun else [{"kind": "machine", "load": os.getloadavg()[0], **machine()}]
        self._begun = True
        lines.append({"kind": "row" if isinstance(result, Row) else "curve", **asdict(result)})
        with self.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def summary(result: Row | Curve) -> str:
    """One line for a person who waits."""
    if isinstance(result, Curve):
        return f"{result.name}: " + "; ".join(f"{line} {list(points)}" for line, points in result.series.items())
    parts = [f"{result.name}: {result.ours.median:.4g} {result.unit}"]
    if result.ratio:
        parts.append(f"{result.ratio.median:.3g}x ({result.ratio.low:.3g} … {result.ratio.high:.3g}) rslearn")
    if result.share:
        parts.append(f"{result.share.median:.2f} of {result.limit_is}")
    return ", ".join(parts)


def report(description: str) -> Report:
    """The report that the command line asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it works")
    parser.add_argument("--out", type=Path, help="a file for the results, JSON lines")
    options = parser.parse_args()
    return Report(quick=options.quick, out=options.out)
