"""Tables of evaluations and predictions for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rslp.evaluate.rows import Evaluation, MetricRow

# So many names of classes are printed.
_SHOWN = 12


def table(evaluations: Sequence[Evaluation], *, own: Sequence[Evaluation] = ()) -> Table:
    """Make a table with a line per task: its primary metric, for each split value and floor, and numbers of windows.

    Args:
        evaluations: of one checkpoint, one for each split.
        own: of each dataset's own best checkpoint, where that is another one; their values stand below.
    """
    title = f"{evaluations[0].run}: {evaluations[0].checkpoint}, step {evaluations[0].step}"
    caption = "floor: the best constant prediction; score: 0 floor, 1 best; n: windows; valid: share of label pixels"
    if own:
        caption = f"own best: of the checkpoint that is best for the dataset; {caption}"
    view = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # On a narrow terminal names are wrapped; numbers are never cut.
    view.add_column("dataset", overflow="fold")
    view.add_column("metric", overflow="fold")
    for evaluation in evaluations:
        view.add_column(evaluation.split, justify="right", style="bold", no_wrap=True)
        view.add_column("floor", justify="right", no_wrap=True)
    for name in ("n", "valid"):
        view.add_column(name, justify="right", no_wrap=True)
    for key, rows in _by_task(evaluations).items():
        present = [row for row in rows if row is not None]
        best = _by_task([e for e in own if any((r.dataset, r.task) == key for r in e.rows)]).get(key, [])
        cells = [cell for i, row in enumerate(rows) for cell in _cells(row, *best[i : i + 1])]
        windows = [str(row.n if row.n_windows is None else row.n_windows) for row in present]
        metric = present[0].metric + ("\nown best" if best else "")
        view.add_row(_name(key), metric, *cells, _lines(windows), _lines(map(_share, present)))
    view.add_section()
    scores = [cell for e in evaluations for cell in ("" if e.score is None else f"{e.score:.3f}", "")]
    view.add_row("score", "mean", *scores)
    return view


def _by_task(evaluations: Sequence[Evaluation]) -> dict[tuple[str, str], list[MetricRow | None]]:
    """For each dataset and task its primary row in each evaluation."""
    splits = [{(r.dataset, r.task): r for r in evaluation.rows if r.primary} for evaluation in evaluations]
    return {key: [rows.get(key) for rows in splits] for key in sorted({key for rows in splits for key in rows})}


def _name(key: tuple[str, str]) -> str:
    return key[0] if key[0] == key[1] else " / ".join(key)


def _cells(row: MetricRow | None, *own: MetricRow | None) -> tuple[str, str]:
    """The value, below it that of the dataset's own best checkpoint if there is one; and the floor."""
    floor = None if row is None else row.floor
    values = ("none" if one is None or one.value is None else f"{one.value:.3f}" for one in (row, *own))
    return "\n".join(values), "" if floor is None else f"{floor:.3f}"


def _share(row: MetricRow) -> str:
    """The valid share as a percentage, rounded down, so that 100% means all."""
    if row.valid_share is None:
        return ""
    return "100%" if row.valid_share == 1 else f"{math.floor(row.valid_share * 1000) / 10:.1f}%"


def _lines(texts: Iterable[str]) -> str:
    """One line for each split, or a single one if all are equal."""
    lines = list(texts)
    return lines[0] if len(set(lines)) == 1 else "\n".join(lines)


def notes(evaluations: Sequence[Evaluation], *, unmoved: Iterable[str] = ()) -> list[str]:
    """Write the lines below the table: the classes over which means are taken, and scores that never moved.

    Args:
        evaluations: as for ``table``.
        unmoved: tasks, as ``<dataset>/<task>``, that were no better than their baseline in any epoch.
    """
    lines = []
    for key, rows in _by_task(evaluations).items():
        classes = {e.split: row.classes for e, row in zip(evaluations, rows, strict=True) if row and row.classes}
        differ = len(set(classes.values())) > 1
        parts = [_listed(names) + (f" ({split})" if differ else "") for split, names in classes.items()]
        if parts:
            lines.append(f"{_name(key)}: classes: {'; '.join(dict.fromkeys(parts))}")
    lines += [f"{task}: the score was 0 in every epoch, no better than the floor" for task in unmoved]
    return lines


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def print_table(
    evaluations: Sequence[Evaluation], *, own: Sequence[Evaluation] = (), unmoved: Iterable[str] = ()
) -> None:
    """Print the table of evaluations and its notes."""
    console = Console()
    console.print(table(evaluations, own=own))
    for note in notes(evaluations, unmoved=unmoved):
        console.print(note, markup=False, highlight=False)


def predictions(summary: Mapping[str, Any]) -> Table:
    """Make a table with a line per task: how many windows were predicted, and where the predictions are.

    Args:
        summary: the content of the file that marks a complete prediction.
    """
    title = f"{summary['run']}: {summary['checkpoint']}, step {summary['step']}"
    view = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("dataset", "split", "windows", "left out", "written to"):
        view.add_column(name, justify="right" if name in ("windows", "left out") else "left", overflow="fold")
    for dataset, entry in summary["datasets"].items():
        for task, output in entry["tasks"].items():
            place = output["files"].partition("*")[0] if "files" in output else f"layer {output['layer']}"
            counts = str(entry["windows"]), str(entry["left_out"] or "")
            view.add_row(_name((dataset, task)), entry["split"], *counts, place)
    return view


def print_predictions(summary: Mapping[str, Any]) -> None:
    """Print the table of predictions."""
    Console().print(predictions(summary))
