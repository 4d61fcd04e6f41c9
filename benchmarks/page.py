"""From results to docs/performance.md and its plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from results import Results
from rows import Curve, Row, Spread

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "performance.md"
PLOTS = DOCS / "performance"
# What was found out and is no row; the one part of the page that a person writes.
NOTES = Path(__file__).parent / "notes.md"

_HEAD = """\
# Performance

Written by `make bench`; do not edit. Each row is measured by a script of `benchmarks/` against rslearn 0.1.19 with the
smallest repairs that make it run, and against what the machine allows, alternated in one run. The ratios are what
counts: seconds are of this machine. Median, in brackets the quartiles (of fewer than eight measurements: the range).
`make bench-quick` measures a little of everything and changes nothing; `python benchmarks/all.py NAME …` runs some
again.

"""
_COLUMNS = "| what | ours | rslearn | times better | wanted | limit | share of it | wanted |\n" + "|---" * 8 + "|"
_COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#7d5ba6")


def write(results: Sequence[Results], *, missing: Sequence[str] = ()) -> None:
    """Write the page, and a plot for each curve.

    Args:
        results: of all benchmarks that were run, in the page's order.
        missing: those that were not.
    """
    PLOTS.mkdir(exist_ok=True)
    curves = [curve for result in results for curve in result.curves]
    for curve in curves:
        plot(curve, PLOTS / f"{curve.name}.svg")
    PAGE.write_text(text(results, missing=missing), encoding="utf-8")
    kept = {f"{curve.name}.svg" for curve in curves}
    for path in PLOTS.glob("*.svg"):
        if path.name not in kept:
            path.unlink()


def text(results: Sequence[Results], *, missing: Sequence[str] = ()) -> str:
    """The page."""
    curves = [curve for result in results for curve in result.curves]
    images = "\n".join(f"![{curve.title}: {curve.y} by {curve.x}](performance/{curve.name}.svg)" for curve in curves)
    parts = [
        _HEAD + _machines(results),
        table(results),
        f"Not run yet: {', '.join(missing)}." if missing else "",
        _failures(results),
        _notes_of_rows(results),
        f"## How it grows\n\n{images}" if images else "",
        NOTES.read_text(encoding="utf-8").strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(results: Iterable[Results]) -> str:
    """All rows, as one table in Markdown."""
    numbered = _numbered(results)
    return "\n".join([_COLUMNS, *(_line(row, numbered.get(row.name)) for result in results for row in result.rows)])


def _numbered(results: Iterable[Results]) -> dict[str, int]:
    """A number for each row that has a note."""
    noted = [row.name for result in results for row in result.rows if row.note]
    return {name: number for number, name in enumerate(noted, 1)}


def _line(row: Row, note: int | None) -> str:
    cells = [
        f"{row.what} [{note}]" if note else row.what,
        f"{_number(row.ours.median)} {row.unit}",
        _number(row.rslearn.median) if row.rslearn else "",
        _spread(row.ratio),
        "" if row.wanted_ratio is None else f"{_number(row.wanted_ratio)} {_met(row.ratio, row.wanted_ratio)}",
        f"{_number(row.limit.median)}: {row.limit_is}" if row.limit else "",
        _spread(row.share),
        "" if row.wanted_share is None else f"{_number(row.wanted_share)} {_met(row.share, row.wanted_share)}",
    ]
    return "| " + " | ".join(cells) + " |"


def _met(found: Spread | None, wanted: float) -> str:
    return "met" if found is not None and found.median >= wanted else "**missed**"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    around = f" ({_number(spread.low)} … {_number(spread.high)})" if spread.n > 1 else ""
    return _number(spread.median) + around


def _number(value: float) -> str:
    """Three digits, without an exponent where one can do without."""
    if value == 0 or 0.001 <= abs(value) < 1e6:
        digits = f"{value:.3g}"
        return f"{value:.0f}" if "e" in digits or abs(value) >= 100 else digits
    return f"{value:.1e}"


def _machines(results: Sequence[Results]) -> str:
    """What the benchmarks ran on; several machines are told apart by what ran on them."""
    by_machine: dict[str, list[str]] = {}
    for result in results:
        if result.machine:
            by_machine.setdefault(_machine(result.machine), []).append(result.name)
    if len(by_machine) == 1:
        lines = [f"Machine: {next(iter(by_machine))}."]
    else:
        lines = [f"Machine of {', '.join(names)}: {machine}." for machine, names in by_machine.items()]
    busy = [f"{r.name} {r.machine['load']:.1f}" for r in results if r.machine]
    seconds = sum(result.seconds for result in results)
    told = f"The benchmarks took {seconds / 60:.0f} minutes. Load of the machine at the first result of each, its own"
    return "\n".join([*lines, f"{told} included: {', '.join(busy)}."])


def _machine(of: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    return f"{of['processors']} processors ({of['processor']}), {of['memory_gb']} GB, {of['system']}; {versions}"


def _failures(results: Sequence[Results]) -> str:
    failed = [f"- `benchmarks/{result.name}.py` failed: {result.failure}" for result in results if result.failure]
    return "\n".join(["## What failed", "", *failed]) if failed else ""


def _notes_of_rows(results: Sequence[Results]) -> str:
    numbered = _numbered(results)
    notes = {row.name: row.note for result in results for row in result.rows}
    return "\n".join(f"[{number}] {notes[name]}  " for name, number in numbered.items()).rstrip()


def plot(curve: Curve, path: Path) -> None:
    """Draw a curve as SVG; the same curve gives the same bytes.

    Args:
        curve: what to draw.
        path: the file.
    """
    with mpl.rc_context({"svg.hashsalt": curve.name, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for colour, (name, points) in zip(_COLOURS, curve.series.items(), strict=False):
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
        if curve.linear:
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
