"""Evaluations as a table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rslp.evaluate.rows import Evaluation, MetricRow

_SHOWN = 12


def table(evaluations: Sequence[Evaluation]) -> Table:
    """One line per task: its primary metric, and for each split the value and its floor, and what it is of."""
    title = f"{evaluations[0].run}: {evaluations[0].checkpoint}, step {evaluations[0].step}"
    caption = "floor: the best constant prediction; score: 0 floor, 1 best; n: windows; valid: share of label pixels"
    view = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # Where there is little room, names go on in the next line; numbers are never cut.
    view.add_column("dataset", overflow="fold")
    view.add_column("metric", overflow="fold")
    for evaluation in evaluations:
        view.add_column(evaluation.split, justify="right", style="bold", no_wrap=True)
        view.add_column("floor", justify="right", no_wrap=True)
    for name in ("n", "valid"):
        view.add_column(name, justify="right", no_wrap=True)
    for key, rows in _by_task(evaluations).items():
        found = [row for row in rows if row is not None]
        cells = [cell for row in rows for cell in _cells(row)]
        windows = [str(row.n if row.n_windows is None else row.n_windows) for row in found]
        view.add_row(_name(key), found[0].metric, *cells, _lines(windows), _lines(_share(row) for row in found))
    view.add_section()
    scores = [cell for e in evaluations for cell in ("" if e.score is None else f"{e.score:.3f}", "")]
    view.add_row("score", "mean", *scores)
    return view


def _by_task(evaluations: Sequence[Evaluation]) -> dict[tuple[str, str], list[MetricRow | None]]:
    """The primary rows by dataset and task, one for each evaluation."""
    splits = [{(r.dataset, r.task): r for r in evaluation.rows if r.primary} for evaluation in evaluations]
    return {key: [rows.get(key) for rows in splits] for key in sorted({key for rows in splits for key in rows})}


def _name(key: tuple[str, str]) -> str:
    return key[0] if key[0] == key[1] else " / ".join(key)


def _cells(row: MetricRow | None) -> tuple[str, str]:
    value, floor = (None, None) if row is None else (row.value, row.floor)
    return "none" if value is None else f"{value:.3f}", "" if floor is None else f"{floor:.3f}"


def _share(row: MetricRow) -> str:
    """A percentage that says 100 of nothing less."""
    if row.valid_share is None:
        return ""
    return "100%" if row.valid_share == 1 else f"{math.floor(row.valid_share * 1000) / 10:.1f}%"


def _lines(texts: Iterable[str]) -> str:
    """A line for each split; one if they are alike."""
    found = list(texts)
    return found[0] if len(set(found)) == 1 else "\n".join(found)


def notes(evaluations: Sequence[Evaluation], *, unmoved: Iterable[str] = ()) -> list[str]:
    """What numbers alone do not say: the classes that means run over, and scores that never moved.

    Args:
        evaluations: as for ``table``.
        unmoved: tasks, as ``<dataset>/<task>``, that were no better than their baseline in any epoch.
    """
    said = []
    for key, rows in _by_task(evaluations).items():
        classes = {e.split: row.classes for e, row in zip(evaluations, rows, strict=True) if row and row.classes}
        parts = [f"{_listed(names)}{_of(split, classes)}" for split, names in classes.items()]
        if parts:
            said.append(f"{_name(key)}: classes: {'; '.join(dict.fromkeys(parts))}")
    said += [f"{task}: the score was 0 in every epoch, no better than the floor" for task in unmoved]
    return said


def _of(split: str, classes: Mapping[str, tuple[str, ...] | None]) -> str:
    return f" ({split})" if len(set(classes.values())) > 1 else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def print_table(evaluations: Sequence[Evaluation], *, unmoved: Iterable[str] = ()) -> None:
    """Print to the terminal."""
    console = Console()
    console.print(table(evaluations))
    for note in notes(evaluations, unmoved=unmoved):
        console.print(note, markup=False, highlight=False)


def predictions(summary: Mapping[str, Any]) -> Table:
    """One line per task: how many windows were predicted, and where they lie."""
    title = f"{summary['run']}: {summary['checkpoint']}, step {summary['step']}"
    view = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("dataset", "split", "windows", "left out", "written to"):
        view.add_column(name, justify="right" if name in ("windows", "left out") else "left", overflow="fold")
    for dataset, told in summary["datasets"].items():
        for task, where in told["tasks"].items():
            name = dataset if dataset == task else f"{dataset} / {task}"
            place = where["files"].partition("*")[0] if "files" in where else f"layer {where['layer']}"
            view.add_row(name, told["split"], str(told["windows"]), str(told["left_out"] or ""), place)
    return view


def print_predictions(summary: Mapping[str, Any]) -> None:
    """Print to the terminal."""
    Console().print(predictions(summary))
