"""Evaluations as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rslp.evaluate.rows import Evaluation, Row


def table(evaluations: Sequence[Evaluation]) -> Table:
    """One line per task: its primary metric, and for each split the value above its floor."""
    title = f"{evaluations[0].run}: {evaluations[0].checkpoint}, step {evaluations[0].step}"
    caption = "floor: the best constant prediction; score: 0 floor, 1 best"
    view = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # Where there is little room, names go on in the next line; numbers are never cut.
    view.add_column("dataset", overflow="fold")
    view.add_column("metric", overflow="fold")
    for evaluation in evaluations:
        view.add_column(evaluation.split, justify="right", style="bold", no_wrap=True)
        view.add_column("floor", justify="right", no_wrap=True)
    view.add_column("n", justify="right", no_wrap=True)
    by_task = [{(r.dataset, r.task): r for r in evaluation.rows if r.primary} for evaluation in evaluations]
    for key in sorted({key for rows in by_task for key in rows}):
        rows = [found[key] for found in by_task if key in found]
        name = key[0] if key[0] == key[1] else " / ".join(key)
        cells = [cell for row in rows for cell in _cells(row)]
        view.add_row(name, rows[0].metric, *cells, ", ".join(str(row.n) for row in rows))
    view.add_section()
    scores = [cell for e in evaluations for cell in ("" if e.score is None else f"{e.score:.3f}", "")]
    view.add_row("score", "mean", *scores)
    return view


def _cells(row: Row) -> tuple[str, str]:
    return f"{row.value:.3f}", "" if row.floor is None else f"{row.floor:.3f}"


def print_table(evaluations: Sequence[Evaluation]) -> None:
    """Print to the terminal."""
    Console().print(table(evaluations))


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
