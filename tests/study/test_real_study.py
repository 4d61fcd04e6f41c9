"""The study on real labels: its files are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from rslp.datasets.config import parse_spec
from rslp.io import read_yaml
from rslp.study.config import arms_of, read_study

FOLDER = Path(__file__).parents[2] / "examples" / "real_study"


@pytest.mark.parametrize("encoder", ["galileo", "presto"])
def test_its_files_are_valid(encoder: str) -> None:
    study = read_study(FOLDER / f"study_{encoder}.yaml")
    arms = arms_of(study, ["fuel_moisture", "crop_type", "fields"])
    runs = sum(len(arm.runs) for arm in arms) * len(study.config.seeds)
    assert runs == 20 and f"= {2 * runs} runs" in (FOLDER / "PLAN.md").read_text()
    assert parse_spec(read_yaml(FOLDER / "fields.yaml")).task == "classification"
