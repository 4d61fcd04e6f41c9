"""The program around the benchmarks: results written and read, a page made of them, failures that stop nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ("rows", "results", "page", "all", "machine")

GOOD = """
from rows import Curve, report, row
out = report("")
quick = out.quick
out.add(row("a", "reading", unit="ms", ours=[1, 2, 4], rslearn=[10, 20, 44], limit=[1, 1, 1], limit_is="a map",
            wanted_ratio=10, wanted_share=0.9, note="quick" if quick else "whole"))
out.add(Curve("growth", "Growth", "windows", "s", {"ours": [(1, 1), (10, 2)]}))
"""
BAD = """
from rows import report, row
out = report("")
out.add(row("b", "before the fall", unit="samples/s", ours=[5], rslearn=[2], more_is_better=True))
raise ValueError("the disk is full")
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The modules of the benchmarks, with two benchmarks of our own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    modules = {name: importlib.import_module(name) for name in NAMES}
    for name, script in (("good", GOOD), ("bad", BAD)):
        (tmp_path / f"{name}.py").write_text(script)
    monkeypatch.setattr(modules["all"], "HERE", tmp_path)
    yield modules
    for name in NAMES:
        sys.modules.pop(name, None)


def test_a_benchmark_that_fails_is_reported_with_what_it_had(bench: dict[str, Any], tmp_path: Path) -> None:
    results = [bench["all"].run(name, tmp_path / "results", quick=False) for name in ("bad", "good")]
    assert [result.failure for result in results] == ["ValueError: the disk is full", ""]
    assert [[row.name for row in result.rows] for result in results] == [["b"], ["a"]]
    page = bench["page"].text(results, missing=["epoch"])
    assert "| before the fall | 5 samples/s | 2 | 2.5 |" in page
    assert "`benchmarks/bad.py` failed: ValueError: the disk is full" in page
    assert "Not run yet: epoch." in page
    assert str(tmp_path) not in page


def test_a_row_is_judged_by_its_pairs(bench: dict[str, Any], tmp_path: Path) -> None:
    (result,) = [bench["all"].run("good", tmp_path / "results", quick=False)]
    row = result.rows[0]
    assert (row.ratio.median, row.ratio.low, row.ratio.high, row.ratio.n) == (10, 10, 11, 3)
    assert row.share.median == 0.5
    line = next(line for line in bench["page"].table([result]).splitlines() if "reading" in line)
    assert line == "| reading [1] | 2 ms | 20 | 10 (10 … 11) | 10 met | 1: a map | 0.5 (0.25 … 1) | 0.9 **missed** |"


def test_measurements_that_are_no_pairs_are_compared_by_their_medians(bench: dict[str, Any]) -> None:
    row = bench["rows"].row("c", "what", unit="s", ours=[1, 2, 3], rslearn=[8, 10])
    assert (row.ratio.median, row.ratio.n) == (4.5, 1)


def test_a_quick_run_says_so_to_its_script(bench: dict[str, Any], tmp_path: Path) -> None:
    assert bench["all"].run("good", tmp_path / "results", quick=True).rows[0].note == "quick"
    assert bench["all"].run("good", tmp_path / "results", quick=False).rows[0].note == "whole"


def test_a_plot_is_the_same_bytes_each_time(bench: dict[str, Any], tmp_path: Path) -> None:
    (curve,) = bench["all"].run("good", tmp_path / "results", quick=False).curves
    for name in ("one.svg", "two.svg"):
        bench["page"].plot(curve, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_page_is_that_of_the_results(bench: dict[str, Any]) -> None:
    names = [name for name in bench["all"].NAMES if (bench["results"].RESULTS / f"{name}.jsonl").exists()]
    found = [bench["results"].read(name, bench["results"].RESULTS) for name in names]
    missing = [name for name in bench["all"].NAMES if name not in names]
    page = bench["page"].PAGE
    assert page.read_text(encoding="utf-8") == bench["page"].text(found, missing=missing), (
        "python benchmarks/all.py --page"
    )
    for curve in (curve for result in found for curve in result.curves):
        assert (bench["page"].PLOTS / f"{curve.name}.svg").exists()
