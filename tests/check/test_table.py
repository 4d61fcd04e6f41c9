"""The summary can be read where there is little room: in 80 columns nothing is cut."""

from __future__ import annotations

import io

from rich.console import Console

from rslp.check.dataset import DatasetReport
from rslp.check.images import InputSummary
from rslp.check.labels import LabelSummary
from rslp.check.reading import Range
from rslp.check.table import summary_tables

NAME = "cropland_of_the_northern_provinces"


def shown(*reports: DatasetReport) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(*summary_tables(reports))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_nothing_is_cut_in_80_columns() -> None:
    inputs = [InputSummary("sentinel2_l2a", 12, (8, 12), "digital numbers", Range(73, 6662, True), 0.25)]
    labels = {"crop_type": {"train": LabelSummary(classes={f"kind_{i}": 10 - i for i in range(9)})}}
    sizes = {"train": [(16, 16)], "val": [(32, 32), (64, 48)]}
    report = DatasetReport(NAME, {"train": 32000, "val": 4800, "test": 14400}, sizes, 16, inputs, labels)
    text = shown(report)
    assert "…" not in text.replace(" … ", "")
    assert max(map(len, text.splitlines())) <= 80
    together = "".join(part.strip() for line in text.splitlines() for part in line.split("│"))
    for word in ("32000 / 4800 / 14400", "32x32 … 64x48", "sentinel2_l2a", "8-12", "25%", "kind_8 4%"):
        assert word.replace(" ", "") in together.replace(" ", "")


def test_a_name_that_is_too_long_goes_on_in_the_next_line() -> None:
    long = NAME * 3
    text = shown(DatasetReport(long, {"train": 1}, {"train": [(8, 8)]}, 1, [], {}))
    cells = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert "".join(cells) == long
