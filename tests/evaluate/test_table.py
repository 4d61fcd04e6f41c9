"""The table of an evaluation: in a terminal of 80 columns no number is cut."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from rslp.evaluate.rows import Evaluation, Row
from rslp.evaluate.table import table


def evaluation(split: str) -> Evaluation:
    common: dict[str, Any] = {"n": 14400, "floor": -0.034, "higher_is_better": True, "primary": True}
    rows = (
        Row("shrubland", "fuel_moisture", "r2", 0.879, **common),
        Row("shrubland_of_the_north", "shrub", "balanced_accuracy", 0.848, **common),
    )
    return Evaluation("demo/two", split, "checkpoints/best.ckpt", "0", 344, None, "0", 0.8635, (), rows)


def test_no_number_is_cut_in_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table([evaluation("val"), evaluation("test")]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for number, times in (("0.879", 2), ("0.848", 2), ("-0.034", 4), ("14400, 14400", 2), ("0.864", 2)):
        assert text.count(number) == times, text
