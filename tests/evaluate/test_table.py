"""The table of an evaluation: in a terminal of 80 columns no number is cut, and it says what numbers are of."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rslp.errors import RunError
from rslp.evaluate.rows import Evaluation, MetricRow
from rslp.evaluate.table import notes, table


def evaluation(split: str, *, share: float = 1.0, value: float | None = 0.879) -> Evaluation:
    common: dict[str, Any] = {"n": 14399, "floor": -0.034, "higher_is_better": True, "primary": True}
    common |= {"n_windows": 14400 + len(split), "valid_share": share}
    kinds = {"classes": ("alder", "birch", f"seen in {split}")}
    rows = (
        MetricRow("shrubland", "fuel_moisture", "r2", value, **common),
        MetricRow("shrubland_of_the_north", "shrub", "balanced_accuracy", 0.848, **common, **kinds),
    )
    return Evaluation("demo/two", split, "checkpoints/best.ckpt", "0", 344, None, "0", 0.8635, (), rows)


def shown(*evaluations: Evaluation) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(evaluations))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_no_number_is_cut_in_80_columns() -> None:
    text = shown(evaluation("val", share=0.9999), evaluation("test"))
    assert "…" not in text
    numbers = (("0.879", 2), ("0.848", 2), ("-0.034", 4), ("14403", 2), ("14404", 2), ("0.864", 2), ("99.9%", 2))
    for number, times in (*numbers, ("100%", 2)):
        assert text.count(number) == times, text


def test_what_has_no_value_is_none() -> None:
    assert shown(evaluation("val", value=None)).count("none") == 1


def test_the_classes_of_means_and_scores_that_never_moved_stand_below() -> None:
    found = notes([evaluation("val"), evaluation("test")], unmoved=["crops/boxes"])
    assert found == [
        "shrubland_of_the_north / shrub: classes: alder, birch, seen in val (val); alder, birch, seen in test (test)",
        "crops/boxes: the score was 0 in every epoch, no better than the floor",
    ]
    assert notes([evaluation("val")]) == ["shrubland_of_the_north / shrub: classes: alder, birch, seen in val"]


FORMER = """{"schema": 1, "run": "p/e", "split": "val", "checkpoint": "checkpoints/best.ckpt", "checkpoint_sha256": "a",
"step": 3, "commit": null, "data_fingerprint": "c", "score": 0.5, "faults": ["d/g/w: broken"], "rows": [{"dataset": "d",
"task": "t", "metric": "r2", "value": 0.5, "n": 4, "floor": 0.0, "higher_is_better": true, "primary": true, "low": null,
"high": null, "class": null}]}"""


def test_rows_of_schema_1_are_read() -> None:
    found = Evaluation.parse(FORMER)
    assert found.bad_samples == ("d/g/w: broken",)
    assert found.rows == (MetricRow("d", "t", "r2", 0.5, 4, 0.0, True, True),)
    assert "4" in shown(found)
    assert Evaluation.parse(found.json()) == found


def test_a_schema_to_come_is_refused() -> None:
    with pytest.raises(RunError, match="schema 3; this version knows 1 and 2"):
        Evaluation.parse(FORMER.replace('"schema": 1', '"schema": 3'))
    for torn in (
        "",
        "[1]",
        "null",
        FORMER[:200],
        FORMER.replace('"rows"', '"rovs"'),
        FORMER.replace('"step"', '"stop"'),
    ):
        with pytest.raises(RunError, match="not a file of evaluation rows, or a damaged one"):
            Evaluation.parse(torn)
