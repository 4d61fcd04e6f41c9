"""Tables that summarise the checked datasets, for a person to read before a long run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from rslp.check.dataset import DatasetReport
from rslp.check.images import InputSummary
from rslp.check.labels import LabelSummary
from rslp.check.view import SPLITS

_MOST_CLASSES = 12


def summary_tables(reports: Sequence[DatasetReport]) -> list[Table]:
    """Make three tables from the windows that were read: datasets, images by input, labels by task.

    They fit a terminal of 80 columns: wide cells are wrapped, and nothing is cut.
    """
    datasets = _table("datasets", ("dataset", "windows: train / val / test", "size, px", "batch"))
    images = _table("images", ("dataset", "input", "bands", "dates", "values", "nodata"))
    labels = _table("labels", ("dataset", "task", "split", "seen"))
    for report in reports:
        windows = " / ".join(str(report.windows[split]) for split in SPLITS if split in report.windows)
        sizes = ", ".join(dict.fromkeys(_size_text(sizes) for sizes in report.sizes.values()))
        datasets.add_row(report.name, windows, sizes, str(report.batch_size or ""))
        for row, entry in enumerate(report.inputs):
            images.add_row(report.name if row == 0 else "", *_input_cells(entry))
        for task, splits in report.labels.items():
            for row, split in enumerate(split for split in SPLITS if split in splits):
                labels.add_row(*((report.name, task) if row == 0 else ("", "")), split, _label_counts(splits[split]))
        images.add_section()
        labels.add_section()
    return [datasets, images, labels]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        right = column in ("batch", "bands", "dates", "nodata")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _size_text(sizes: Sequence[tuple[int, int]]) -> str:
    if not sizes:
        return ""
    return f"{sizes[0][0]}x{sizes[0][1]}" + (f" … {sizes[-1][0]}x{sizes[-1][1]}" if len(sizes) > 1 else "")


def _input_cells(entry: InputSummary) -> list[str]:
    low, high = entry.dates
    values = "" if entry.values.empty else f"{entry.values.low:.4g} .. {entry.values.high:.4g}"
    units = f" {entry.units}" if entry.units else ""
    dates = f"{low}" if low == high else f"{low}-{high}"
    return [entry.name, str(entry.bands), dates, values + units, f"{entry.nodata:.0%}"]


def _label_counts(summary: LabelSummary) -> str:
    """The range of a regression's labels, or the share of each class."""
    if not math.isnan(summary.low):
        return f"{summary.low:g} .. {summary.high:g}"
    total = sum(summary.classes.values())
    if not total:
        return "nothing"
    ordered = sorted(summary.classes.items(), key=lambda item: -item[1])
    shares = [f"{name} {count / total:.0%}" for name, count in ordered[:_MOST_CLASSES]]
    more = f", … {len(ordered) - _MOST_CLASSES} more classes" if len(ordered) > _MOST_CLASSES else ""
    return ", ".join(shares) + more
