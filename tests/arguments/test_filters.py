"""``filters`` of a task: features that do not match are left out wherever labels are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rslp.check.check import CheckOptions
from rslp.check.check import check as check_all
from rslp.data.samples import SampleSource
from rslp.train import baselines
from rslp.train.build import build
from tests.tiny import run_config, write_dataset, write_run

pytestmark = pytest.mark.filterwarnings("ignore")
# By kind: the value that the filter leaves out, and what a target says of the one that it lets through.
KINDS: dict[str, tuple[Any, str]] = {
    "classify": ("wrong", "class"),
    "regress": (999.0, "value"),
    "detect": ("wrong", "boxes"),
}
FILTERS = [["checked", "yes"]]


def _dataset(folder: Path, kind: str) -> Path:
    """Windows whose first feature is not checked, whose second has no such property, and whose third is right."""
    path = write_dataset(folder / kind, kind, train=4, val=2, test=1)
    for label in path.glob("windows/default/*/layers/label/data.geojson"):
        content = json.loads(label.read_text())
        (right,) = content["features"]
        right["properties"]["checked"] = "yes"
        others = [{**right, "properties": {"value": KINDS[kind][0], "checked": "no"}}]
        others.append({**right, "properties": {"value": KINDS[kind][0]}})
        label.write_text(json.dumps({**content, "features": [*others, right]}))
    return path


def _config(path: Path, kind: str, filters: list[list[str]]) -> dict[str, Any]:
    config = run_config({kind: (str(path), kind)}, store="off")
    for task in (
        config["model"]["init_args"]["task"],
        config["data"]["init_args"]["data_modules"][kind]["init_args"]["task"],
    ):
        task["init_args"]["tasks"][kind]["init_args"]["filters"] = filters
    return config


def _source(folder: Path, config: dict[str, Any], split: str) -> SampleSource:
    data = build(write_run(folder, config), training=False).datamodule
    (source,) = data.sources(split).values()
    return source


@pytest.mark.parametrize("kind", KINDS)
def test_samples_baselines_and_the_check_see_what_filters_let_through(kind: str, tmp_path: Path) -> None:
    path = _dataset(tmp_path, kind)
    config = _config(path, kind, FILTERS)
    source = _source(tmp_path, config, "train")
    key = KINDS[kind][1]
    targets = [source.sample(i)[1][kind] for i in range(len(source))]
    assert [len(t["boxes"]) if key == "boxes" else float(t[key]) < 2 for t in targets] == [1] * len(source)
    assert all(float(t["valid"]) == 1 for t in targets)
    assert baselines.fit_baselines({kind: source})[kind][kind] < 2
    checked = check_all(config, effort=CheckOptions(forward=False), console=_silent())
    assert [str(finding) for finding in checked.findings if finding.error] == []
    (report,) = checked.reports
    summary = report.labels[kind]["train"]
    assert sum(summary.classes.values()) == len(source) if kind != "regress" else summary.high < 2


@pytest.mark.parametrize("kind", KINDS)
def test_filters_that_no_feature_matches_leave_no_label(kind: str, tmp_path: Path) -> None:
    config = _config(_dataset(tmp_path, kind), kind, [["checked", "yes"], ["by", "somebody"]])
    findings = check_all(config, effort=CheckOptions(forward=False), console=_silent()).findings
    assert any("property 'value'" in finding.what for finding in findings if finding.error)


def test_two_tasks_over_one_input_have_filters_of_their_own(tmp_path: Path) -> None:
    path = _dataset(tmp_path, "classify")
    config = _config(path, "classify", FILTERS)
    module = config["data"]["init_args"]["data_modules"]["classify"]["init_args"]["task"]["init_args"]
    for task in (module, config["model"]["init_args"]["task"]["init_args"]):
        other = json.loads(json.dumps(task["tasks"]["classify"]))
        other["init_args"] |= {"filters": [["checked", "no"]], "classes": ["wrong", "other"]}
        task["tasks"]["second"] = other
        task["input_mapping"]["second"] = {"label_classify": "targets"}
    model = config["model"]["init_args"]["model"]["init_args"]
    model["decoders"]["second"] = json.loads(json.dumps(model["decoders"]["classify"]))
    _, targets, _ = _source(tmp_path, config, "train").sample(0)
    assert {name: float(target["valid"]) for name, target in targets.items()} == {"classify": 1, "second": 1}


def _silent() -> Any:
    from rich.console import Console

    return Console(quiet=True)
