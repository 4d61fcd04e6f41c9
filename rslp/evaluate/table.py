"""Evaluations as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rslp.evaluate.rows import Evaluation, Row


def table(evaluations: Sequence[Evaluation]) -> Table:
    """One line per task: its primary metric, the floor, and the value on each split."""
    view = Table(title=f"{evaluations[0].run}, {evaluations[0].checkpoint}, step {evaluations[0].step}")
    view.add_column("dataset")
    view.add_column("metric")
    for evaluation in evaluations:
        view.add_column(f"{evaluation.split} floor", justify="right")
        view.add_column(evaluation.split, justify="right", style="bold")
        view.add_column("n", justify="right")
    by_task = [{(r.dataset, r.task): r for r in evaluation.rows if r.primary} for evaluation in evaluations]
    for key in sorted({key for rows in by_task for key in rows}):
        name = key[0] if key[0] == key[1] else " / ".join(key)
        cells = [cell for rows in by_task for cell in _cells(rows.get(key))]
        metric = next(rows[key].metric for rows in by_task if key in rows)
        view.add_row(name, metric, *cells)
    view.add_section()
    scores = [cell for e in evaluations for cell in ("", "" if e.score is None else f"{e.score:.3f}", "")]
    view.add_row("score (0 floor, 1 best)", "mean", *scores)
    return view


def _cells(row: Row | None) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    return ("" if row.floor is None else f"{row.floor:.3f}"), f"{row.value:.3f}", str(row.n)


def print_table(evaluations: Sequence[Evaluation]) -> None:
    """Print to the terminal."""
    Console().print(table(evaluations))
