"""The page of results is what the program makes of the committed studies, whose finished runs are taken as done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_results import PAGE, results

from rslp.launch.runs import runs_prefix
from rslp.study.comparison import compare
from rslp.study.config import read_study
from rslp.study.plan import StudyPlan
from rslp.study.study import ArmsFile

FOLDER = Path(__file__).parents[2] / "examples" / "real_study"


def test_the_page_is_made_by_the_program() -> None:
    assert PAGE.read_text(encoding="utf-8") == results(), "run: python docs/make_results.py"


@pytest.mark.parametrize("encoder", ["galileo", "presto"])
def test_finished_runs_are_done_here_too(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSLP_PREFIX", str(FOLDER))
    plan = StudyPlan.of(read_study(FOLDER / f"study_{encoder}.yaml"), runs_prefix(remote=False))
    arms = ArmsFile.read(plan)
    committed = {path.name for path in (plan.folder / "rows").iterdir()}
    assert committed == {run.experiment for run in plan.runs if arms.rows(run) is not None}
    found, missing = arms.results()
    comparison = compare(found, reference=plan.reference, missing=missing)
    assert json.loads(json.dumps(comparison)) == json.loads((plan.folder / "comparison.json").read_text())
