"""The report of a study: which arm is better for which dataset, how sure that is, and what it costs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rslp.errors import RunError
from rslp.figures import charts
from rslp.figures.picture import Picture
from rslp.report.contents import name_of
from rslp.report.page import Blocks, Cell, Code, Facts, Figures, Fold, Number, Page, Section, Table, Text
from rslp.study.table import OF_ONE_SEED, finding, headline, in_words, is_of_one_seed

_SURE = "Differences are in units of each dataset's metric. An asterisk: the 95 % interval does not hold 0."
# These arms have a figure of their own.
_OF_PAIRS = ("pair:", "without:")
_MOST_LISTED = 8
Content = Mapping[str, Any]


def study_page(folder: Path) -> Page:
    """The report of a study in its present state.

    Raises:
        RunError: the folder is no study's, or its files are damaged.
    """
    arms, comparison = _read(folder / "arms.json"), _read(folder / "comparison.json")
    if not arms and not comparison:
        raise RunError(f"{folder} is no directory of a study: it has neither arms.json nor comparison.json")
    runs = arms.get("runs") or {}
    states = Counter(run.get("state") for run in runs.values())
    progress = f"{states['done']} of {len(runs)} runs are done"
    not_yet = f"There is no comparison yet, since no seed of the reference arm is finished: {progress}."
    parts = (
        ("overview", "Overview", _overview),
        ("found", "What was found", _found),
        ("values", "Values", _values),
        ("differences", "Differences", _differences),
        ("transfer", "Transfer", _transfer),
        ("influence", "Influence", _influence),
        ("cost", "Cost", _cost),
    )
    try:
        made = [(id_, title, make(comparison) if comparison else not_yet) for id_, title, make in parts]
    except (LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / 'comparison.json'} is damaged, or of another version: {error!r}") from error
    made += [("runs", "Runs", _runs(runs)), ("config", "Configs", _configs(folder))]
    facts: dict[str, str] = {name: str(comparison[name]) for name in ("split", "reference") if name in comparison}
    facts |= {"failed runs": str(states["failed"])} if states["failed"] else {}
    name = arms.get("study") or folder.name
    state = "done" if states["done"] == len(runs) else progress
    sections = [Section.of(*one) for one in made]
    return Page(f"{name}: report", "study", f"{folder.parent.name}/{name}", state, sections, (), facts)


def _read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where it is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return dict(content)
    except (ValueError, TypeError, OSError) as error:
        raise RunError(f"{path} is damaged, or can't be read: {error}") from error


def _overview(comparison: Content) -> Blocks:
    seeds = sorted({len(of_arm) for of_arm in comparison["seeds"].values()})
    items: list[tuple[str, Cell]] = [
        ("arms", Number(len(comparison["arms"]), "d")),
        ("seeds of an arm", " to ".join(dict.fromkeys(map(str, (*seeds[:1], *seeds[-1:]))))),
        ("tasks", Number(len(comparison["tasks"]), "d")),
        ("comparisons", Number(comparison["comparisons"], "d")),
    ]
    lines = [f"{line}." for line in headline(comparison)] or ["No difference has an interval yet."]
    if left := [f"{one['arm']} seed {one['seed']}" for one in comparison["missing"]]:
        more = f" and {len(left) - _MOST_LISTED} more" if len(left) > _MOST_LISTED else ""
        lines.append(f"Not finished: {', '.join(left[:_MOST_LISTED])}{more}.")
    note = (
        f"Differences are to the arm {comparison['reference']}, paired by seed and window. An interval that holds 0 is "
        "no evidence of a difference, which is not evidence of none."
    )
    return [Facts(items), Text(lines), Text([note, *([OF_ONE_SEED] if is_of_one_seed(comparison) else [])])]


def _found(comparison: Content) -> Blocks:
    """One sentence for each task."""
    return [Text([finding(task, comparison) for task in comparison["tasks"]])]


def _values(comparison: Content) -> Blocks:
    """The value of each arm for each task."""
    pictures, rows = [], []
    for task in comparison["tasks"]:
        arms, name = task["arms"], _name(task)
        rows += [[name, arm, task["metric"], *_ends(one, ".3f"), one["over"] or "none"] for arm, one in arms.items()]
        bars = [
            charts.Bar(arm, *_raw(one), mark=task["floor"], series=int(arm != comparison["reference"]))
            for arm, one in arms.items()
        ]
        axis = f"{task['metric']} (bar: 95 % interval; line: baseline)"
        pictures.append(charts.intervals(f"values-{name}", name, bars, axis=axis))
    head = ("dataset", "arm", "metric", "value", "from", "to", "interval over")
    caption = f"Means over seeds on the {comparison['split']} split, with 95 % intervals"
    return [Figures(pictures), Fold("As a table", [Table(caption, head, rows)])]


def _differences(comparison: Content) -> Blocks | str:
    """Differences to the reference arm, drawn as bars and as a table."""
    reference = comparison["reference"]
    pictures, rows = [], []
    for task in comparison["tasks"]:
        name = _name(task)
        shown = {arm: one for arm, one in task["differences"].items() if one["low"] is not None}
        for arm, one in shown.items():
            sure = Number(one["p_holm"], ".2g"), in_words(one, comparison)
            rows.append([name, arm, task["metric"], *_ends(one, "+.3f"), *sure])
        # Green, red, or blue.
        bars = [
            charts.Bar(arm, *_raw(one), series={"better": 2, "worse": 4}.get(one["verdict"], 0))
            for arm, one in shown.items()
            if not arm.startswith(_OF_PAIRS)
        ]
        if bars:
            better = "higher is better" if task["higher_is_better"] else "lower is better"
            axis = f"difference of {task['metric']} to {reference}; {better}"
            pictures.append(charts.intervals(f"difference-{name}", name, bars, axis=axis, zero=True))
    if not rows:
        return "No difference has an interval, and those without are not shown."
    head = ("dataset", "arm", "metric", "difference", "from", "to", "p (Holm)", "verdict")
    gains = [
        [arm, *_ends(gain, "+.1f"), Number(gain["tasks"], "d"), ", ".join(gain["left_out"]) or "none"]
        for arm, gain in comparison["gains"].items()
        if gain["low"] is not None
    ]
    of_gains = ("arm", "%", "from", "to", "tasks", "left out")
    return [
        Text(["Green: better; red: worse; blue: no evidence of a difference."]),
        Figures(pictures),
        Table(f"Differences to {reference} with 95 % intervals", head, rows),
        *([Table(f"Mean relative gain over {reference}, all tasks (Delta-m)", of_gains, gains)] if gains else ()),
    ]


def _transfer(comparison: Content) -> Blocks | str:
    cells = _cells(comparison["transfer"], "Transfer", "with", "trained together with")
    return cells or "No arm of a pair is finished; such arms show what a dataset gains from another."


def _influence(comparison: Content) -> Blocks | str:
    cells = _cells(comparison["influence"], "Influence", "of", "what this dataset gives")
    return cells or "No arm without a dataset is finished; such arms show what it gives to the others."


def _cells(cells: Sequence[Content], title: str, other: str, column: str) -> Blocks:
    """What datasets do to each other, as a matrix and as a table; nothing without a difference with an interval."""
    if not (cells := [cell for cell in cells if cell["low"] is not None]):
        return []
    rows = [[_name(cell), cell[other], *_ends(cell, "+.3f")] for cell in cells]
    head = ("dataset", column, "difference", "from", "to")
    table = Table(f"{title}: differences with 95 % intervals", head, rows)
    return [Text([_SURE]), Figures([_matrix(cells, title, other, column)]), table]


def _matrix(cells: Sequence[Content], title: str, other: str, column: str) -> Picture:
    rows, columns = sorted({_name(cell) for cell in cells}), sorted({cell[other] for cell in cells})
    values = np.full((len(rows), len(columns)), math.nan)
    texts = [["" for _ in columns] for _ in rows]
    for cell in cells:
        row, at = rows.index(_name(cell)), columns.index(cell[other])
        values[row, at] = cell["value"]
        texts[row][at] = f"{cell['value']:+.2f}{'' if cell['low'] <= 0 <= cell['high'] else '*'}"
    text = "; ".join(f"{_name(cell)} {other} {cell[other]} {cell['value']:+.3f}" for cell in cells)
    shares = values / (np.nanmax(np.abs(values)) or 1.0)
    axes = ("dataset", column)
    return charts.matrix(title, title, shares, texts, (rows, columns), axes=axes, text=f"{text}. {_SURE}")


def _cost(comparison: Content) -> Blocks:
    """What one seed of each arm takes."""
    forms = {"parameters": ",.0f", "samples": ",.0f", "steps": ",.0f", "seconds": ",.0f"}
    rows = [
        [arm, *(Number(cost[key], form) for key, form in forms.items())] for arm, cost in comparison["cost"].items()
    ]
    return [Table("Cost of one seed of each arm", ("arm", *forms), rows)]


def _runs(runs: Mapping[str, Content]) -> Blocks | str:
    if not runs:
        return "The directory has no list of runs."
    keys = ("arm", "seed", "state", "reason")
    rows = [[name, *(str(run.get(key, "")) for key in keys)] for name, run in runs.items()]
    failed = [f"{name}: {run.get('reason')}" for name, run in runs.items() if run.get("state") == "failed"]
    folded = Fold(f"All {len(rows)} runs", [Table("All runs", ("run", *keys), rows)])
    return [Text(failed), folded] if failed else [folded]


def _configs(folder: Path) -> Blocks | str:
    files = [path for name in ("study.yaml", "OUT_joint.yaml") if (path := folder / name).is_file()]
    folds = [Fold(path.name, [Code(path.name, path.read_text(errors="replace"))]) for path in files]
    return folds or "The directory has no study.yaml."


def _raw(one: Content) -> tuple[float, float | None, float | None]:
    return one["value"], one["low"], one["high"]


def _ends(one: Content, form: str) -> tuple[Cell, Cell, Cell]:
    value, low, high = _raw(one)
    return Number(value, form), Number(low, form), Number(high, form)


def _name(task: Content) -> str:
    return name_of(task["dataset"], task["task"])
