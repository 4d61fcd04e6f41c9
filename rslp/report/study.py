"""The report of a study: which arm is better for which dataset, how sure that is, and what it costs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rslp.errors import RunError
from rslp.figures import charts
from rslp.figures.picture import Picture
from rslp.report.contents import name_of
from rslp.report.page import Code, Facts, Figures, Fold, Number, Page, Section, Table, Text
from rslp.study.table import finding, headline, in_words

_NOT_YET = "There is no comparison yet: no seed of the reference arm is finished."
Comparison = Mapping[str, Any]
# Arms that have a figure of their own.
_OF_PAIRS = ("pair:", "without:")
_MOST_LISTED = 8


def study_page(folder: Path) -> Page:
    """The report of a study in its present state.

    Raises:
        RunError: the folder is no study's, or its files are damaged.
    """
    arms, comparison = _read(folder / "arms.json"), _read(folder / "comparison.json")
    if not arms and not comparison:
        raise RunError(f"{folder} is no directory of a study: it has neither arms.json nor comparison.json")
    runs = arms.get("runs") or {}
    found = [_compared, _values, _differences, _transfer, _influence, _cost]
    try:
        sections = [_overview(comparison, runs), *(make(comparison) for make in found)]
    except (LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / 'comparison.json'} is damaged, or of another version: {error!r}") from error
    states = Counter(run.get("state") for run in runs.values())
    done, failed = states.get("done", 0), states.get("failed", 0)
    state = "done" if runs and done == len(runs) else f"{done} of {len(runs)} runs are done"
    state = state if runs else "done"
    name = arms.get("study") or folder.name
    facts = {
        "split": str(comparison.get("split", "none yet")),
        "reference": str(comparison.get("reference", "none yet")),
    }
    facts |= {"failed runs": str(failed)} if failed else {}
    sections += [_runs(runs), _config(folder)]
    return Page(f"{name}: report", "study", f"{folder.parent.name}/{name}", state, sections, (), facts)


def _read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where it is missing.

    Raises:
        RunError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, OSError) as error:
        raise RunError(f"{path} is damaged, or can't be read: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds no mapping")
    return content


def _overview(comparison: Comparison, runs: Mapping[str, Any]) -> Section:
    if not comparison:
        waiting = f"{sum(run.get('state') == 'done' for run in runs.values())} of {len(runs)} runs are done."
        return Section("overview", "Overview", [Text([f"{_NOT_YET} {waiting}"])])
    seeds = sorted({len(of_arm) for of_arm in comparison["seeds"].values()})
    items: list[tuple[str, Any]] = [
        ("arms", Number(len(comparison["arms"]), "d")),
        ("seeds of an arm", " to ".join(dict.fromkeys((str(seeds[0]), str(seeds[-1])))) if seeds else "0"),
        ("tasks", Number(len(comparison["tasks"]), "d")),
        ("comparisons", Number(comparison["comparisons"], "d")),
    ]
    lines = [f"{line}." for line in headline(comparison)]
    if missing := comparison["missing"]:
        left = [f"{one['arm']} seed {one['seed']}" for one in missing]
        more = f" and {len(left) - _MOST_LISTED} more" if len(left) > _MOST_LISTED else ""
        lines.append(f"Not finished: {', '.join(left[:_MOST_LISTED])}{more}.")
    notes = [
        f"Differences are to the arm {comparison['reference']}, paired by seed and window. An interval that holds 0 is "
        "no evidence of a difference, which is not evidence of none."
    ]
    return Section(
        "overview", "Overview", [Facts(items), Text(lines or ["No difference has an interval yet."]), Text(notes)]
    )


def _compared(comparison: Comparison) -> Section:
    """One sentence for each task."""
    if not comparison:
        return Section("found", "What was found", absent=_NOT_YET)
    return Section("found", "What was found", [Text([finding(task, comparison) for task in comparison["tasks"]])])


def _values(comparison: Comparison) -> Section:
    """The value of each arm for each task."""
    if not comparison:
        return Section("values", "Values", absent=_NOT_YET)
    rows = [
        [_name(task), arm, task["metric"], *map(Number, _ends(one)), one["over"] or "none"]
        for task in comparison["tasks"]
        for arm, one in task["arms"].items()
    ]  # fmt: skip
    head = ("dataset", "arm", "metric", "value", "from", "to", "interval over")
    caption = f"Means over seeds on the {comparison['split']} split, with 95 % intervals"
    pictures = []
    for task in comparison["tasks"]:
        bars = [
            charts.Bar(arm, one["value"], one["low"], one["high"], mark=task["floor"], series=_series(comparison, arm))
            for arm, one in task["arms"].items()
        ]
        axis = f"{task['metric']} (bar: 95 % interval; line: baseline)"
        pictures.append(charts.intervals(f"values-{task['dataset']}-{task['task']}", _name(task), bars, axis=axis))
    return Section("values", "Values", [Figures(pictures), Fold("As a table", [Table(caption, head, rows)])])


def _ends(one: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    return one["value"], one["low"], one["high"]


def _series(comparison: Comparison, arm: str) -> int:
    return 0 if arm == comparison["reference"] else 1


def _differences(comparison: Comparison) -> Section:
    """Differences to the reference arm, drawn as bars and as a table."""
    if not comparison:
        return Section("differences", "Differences", absent=_NOT_YET)
    reference = comparison["reference"]
    pictures, rows = [], []
    for task in comparison["tasks"]:
        shown = {arm: one for arm, one in task["differences"].items() if one["low"] is not None}
        for arm, one in shown.items():
            rows.append([
                _name(task), arm, task["metric"], Number(one["value"], "+.3f"), Number(one["low"], "+.3f"),
                Number(one["high"], "+.3f"), Number(one["p_holm"], ".2g"), in_words(one, comparison),
            ])  # fmt: skip
        bars = [
            charts.Bar(
                arm,
                one["value"],
                one["low"],
                one["high"],
                series=_colour(one),
                text=f"{arm} {in_words(one, comparison)}",
            )
            for arm, one in shown.items()
            if not arm.startswith(_OF_PAIRS)
        ]
        if bars:
            better = "higher is better" if task["higher_is_better"] else "lower is better"
            axis = f"difference of {task['metric']} to {reference}; {better}"
            name = f"difference-{task['dataset']}-{task['task']}"
            pictures.append(charts.intervals(name, _name(task), bars, axis=axis, zero=True))
    if not rows:
        return Section(
            "differences", "Differences", absent="No difference has an interval, and those without are not shown."
        )
    head = ("dataset", "arm", "metric", "difference", "from", "to", "p (Holm)", "verdict")
    table = Table(f"Differences to {reference} with 95 % intervals", head, rows)
    gains = [
        [arm, Number(gain["value"], "+.1f"), Number(gain["low"], "+.1f"), Number(gain["high"], "+.1f"),
         Number(gain["tasks"], "d"), ", ".join(gain["left_out"]) or "none"]
        for arm, gain in comparison["gains"].items() if gain["low"] is not None
    ]  # fmt: skip
    blocks: list[Any] = [
        Text(["Green: better; red: worse; blue: no evidence of a difference."]), Figures(pictures), table
    ]  # fmt: skip
    if gains:
        of_gains = ("arm", "%", "from", "to", "tasks", "left out")
        blocks.append(Table(f"Mean relative gain over {reference}, all tasks (Delta-m)", of_gains, gains))
    return Section("differences", "Differences", blocks)


def _colour(one: Mapping[str, Any]) -> int:
    """The colour of a difference: green, red, or blue."""
    return {"better": 2, "worse": 4}.get(str(one.get("verdict")), 0)


def _matrix(cells: Sequence[Mapping[str, Any]], other: str, title: str, axes: tuple[str, str]) -> Picture:
    rows = sorted({_name(cell) for cell in cells})
    columns = sorted({cell[other] for cell in cells})
    values = np.full((len(rows), len(columns)), math.nan)
    texts = [["" for _ in columns] for _ in rows]
    for cell in cells:
        at = rows.index(_name(cell)), columns.index(cell[other])
        values[at] = cell["value"]
        sure = cell["low"] is not None and not cell["low"] <= 0 <= cell["high"]
        texts[at[0]][at[1]] = f"{cell['value']:+.2f}{'*' if sure else ''}"
    largest = np.nanmax(np.abs(values)) or 1.0
    texts = [f"{_name(cell)} with {cell[other]} {cell['value']:+.3f}" for cell in cells]
    text = f"{'; '.join(texts)}. An asterisk: the 95 % interval does not hold 0."
    return charts.matrix(other, title, values / largest, texts, (rows, columns), axes=axes, text=text)


def _cells(comparison: Comparison, key: str, other: str, words: tuple[str, str, str, str]) -> Section:
    """A matrix of what datasets do to each other."""
    id_, title, absent, column = words
    cells = [cell for cell in (comparison.get(key) or ()) if cell["low"] is not None]
    if not cells:
        return Section(id_, title, absent=absent)
    picture = _matrix(cells, other, title, ("dataset", column))
    rows = [
        [
            _name(cell),
            cell[other],
            Number(cell["value"], "+.3f"),
            Number(cell["low"], "+.3f"),
            Number(cell["high"], "+.3f"),
        ]
        for cell in cells
    ]
    table = Table(f"{title}: differences with 95 % intervals", ("dataset", column, "difference", "from", "to"), rows)
    note = "Differences are in units of each dataset's metric. An asterisk: the 95 % interval does not hold 0."
    return Section(id_, title, [Text([note]), Figures([picture]), table])


def _transfer(comparison: Comparison) -> Section:
    absent = "The study has no arms of pairs, which show what a dataset gains from another."
    return _cells(comparison, "transfer", "with", ("transfer", "Transfer", absent, "trained together with"))


def _influence(comparison: Comparison) -> Section:
    absent = "The study has no arms that leave a dataset out, which show what it gives to the others."
    return _cells(comparison, "influence", "of", ("influence", "Influence", absent, "of the dataset"))


def _cost(comparison: Comparison) -> Section:
    """What one seed of each arm takes."""
    forms: Mapping[str, tuple[str, Callable[[float], float], str]] = {
        "parameters": ("million parameters", lambda n: n / 1e6, ".2f"),
        "samples": ("samples", float, ",.0f"),
        "steps": ("steps", float, ",.0f"),
        "seconds": ("minutes", lambda n: n / 60, ".1f"),
    }
    rows = [
        [
            arm,
            *(Number(None if cost[key] is None else scale(cost[key]), form) for key, (_, scale, form) in forms.items()),
        ]
        for arm, cost in (comparison.get("cost") or {}).items()
    ]
    if not rows:
        return Section("cost", "Cost", absent=_NOT_YET)
    return Section(
        "cost", "Cost", [Table("Cost of one seed of each arm", ("arm", *(f[0] for f in forms.values())), rows)]
    )


def _runs(runs: Mapping[str, Any]) -> Section:
    if not runs:
        return Section("runs", "Runs", absent="The directory has no list of runs.")
    rows = [
        [name, str(run.get("arm")), str(run.get("seed")), str(run.get("state")), str(run.get("reason") or "")]
        for name, run in runs.items()
    ]
    failed = [f"{row[0]}: {row[4]}" for row in rows if row[3] == "failed"]
    table = Table("All runs", ("run", "arm", "seed", "state", "reason"), rows)
    blocks: list[Any] = [Text(failed)] if failed else []
    return Section("runs", "Runs", [*blocks, Fold(f"All {len(rows)} runs", [table])])


def _config(folder: Path) -> Section:
    texts = [(name, folder / name) for name in ("study.yaml", "OUT_joint.yaml")]
    folds = [Fold(name, [Code(name, path.read_text(errors="replace"))]) for name, path in texts if path.is_file()]
    absent = "" if folds else "The directory has no study.yaml."
    return Section("config", "Configs", folds, absent)


def _name(task: Mapping[str, Any]) -> str:
    return name_of(task["dataset"], task["task"])
