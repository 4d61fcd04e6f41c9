"""A study through the real command: killed twice and continued, with runs that fail, and from its rows alone."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from tests.hold import until
from tests.study.forked import start
from tests.study.small import done, folder_of, runs_of, write_study

ARMS = {"study.joint", "study.single.classes", "study.single.numbers", "study.constant"}


def make(root: Path) -> int:
    return start("study", "--cfg", "study.yaml", cwd=root, log=root / "log").wait()


def test_a_study_that_is_killed_twice_goes_on_and_ends_with_its_rows_alone(tmp_path: Path) -> None:
    keys = {"arms": ["joint", "single"], "seeds": [0, 1], "baselines": ["constant"], "keep": "none"}
    write_study(tmp_path, **keys, reference="joint")
    for number, sent in ((1, signal.SIGKILL), (3, signal.SIGINT)):
        process = start("study", "--cfg", "study.yaml", cwd=tmp_path, log=tmp_path / "log")
        until(
            lambda number=number: len(done(tmp_path)) >= number,
            lives=lambda process=process: process.poll() is None,
            what=f"{number} finished runs",
        )
        before = {name: _stamp(tmp_path, name) for name in done(tmp_path)}
        process.send_signal(sent)
        assert process.wait() == (130 if sent == signal.SIGINT else -signal.SIGKILL), (tmp_path / "log").read_text()
        assert len(done(tmp_path)) < 7
    assert {one["arm"] for one in json.loads((folder_of(tmp_path) / "comparison.json").read_text())["missing"]} > {
        "single"
    }
    assert make(tmp_path) == 0, (tmp_path / "log").read_text()
    runs = runs_of(tmp_path)
    assert {name.rpartition(".s")[0] for name in runs} == ARMS and len(runs) == 7 and len(done(tmp_path)) == 7
    assert {name: _stamp(tmp_path, name) for name in before} == before, "a finished run was run again"
    # Equal samples for each dataset: two single models together as many as the joint one.
    costs = {name: entry["cost"] for name, entry in runs.items() if "constant" not in name}
    for seed in (0, 1):
        joint, *single = (costs[f"study.{arm}.s{seed}"] for arm in ("joint", "single.classes", "single.numbers"))
        assert joint["samples"] == sum(cost["samples"] for cost in single) == 12
        assert joint["steps"] == sum(cost["steps"] for cost in single) == 6
        assert joint["parameters"] < sum(cost["parameters"] for cost in single)
    assert not list(tmp_path.glob("runs/projects/*/*/checkpoints/*.ckpt"))
    comparison = (folder_of(tmp_path) / "comparison.json").read_text()
    assert json.loads(comparison)["missing"] == []

    # Another run's damaged rows are no failure of the one that has ended.
    rows = folder_of(tmp_path) / "rows"
    joint = (rows / "study.joint.s0" / "test.json").read_text()
    (rows / "study.joint.s0" / "test.json").write_text("{")
    shutil.rmtree(rows / "study.constant.s0")
    assert make(tmp_path) != 0
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert "study.joint.s0/test.json" in last and "damaged" in last
    assert runs_of(tmp_path)["study.constant.s0"]["state"] == "done"
    (rows / "study.joint.s0" / "test.json").write_text(joint)

    for name in ("runs/projects", "classes", "numbers"):
        shutil.rmtree(tmp_path / name)
    assert make(tmp_path) == 0, (tmp_path / "log").read_text()
    assert (folder_of(tmp_path) / "comparison.json").read_text() == comparison


def _stamp(root: Path, name: str) -> int:
    return (folder_of(root) / "rows" / name / "test.json").stat().st_mtime_ns


def test_a_run_that_fails_does_not_end_the_others_and_is_tried_again(tmp_path: Path) -> None:
    broken = {"global_overrides": {"trainer": {"precision": "16-true"}}}
    arms = ["joint", {"name": "broken", "overrides": broken}, "single"]
    write_study(tmp_path, arms=arms, seeds=[0], reference="joint")
    assert make(tmp_path) != 0
    runs = runs_of(tmp_path)
    assert {name for name, entry in runs.items() if entry["state"] == "failed"} == {"study.broken.s0"}
    log = (tmp_path / "log").read_text()
    assert "failed: study.broken.s0: " in log and "precision" in runs["study.broken.s0"]["reason"]
    comparison = json.loads((folder_of(tmp_path) / "comparison.json").read_text())
    assert comparison["missing"] == [{"arm": "broken", "seed": 0}]
    before = {name: _stamp(tmp_path, name) for name in done(tmp_path)}
    assert make(tmp_path) != 0
    assert (tmp_path / "log").read_text().count("[1/1] study.broken.s0") == 1
    assert {name: _stamp(tmp_path, name) for name in before} == before


def test_another_config_and_a_foreign_run_are_refused(tmp_path: Path) -> None:
    write_study(tmp_path, arms=["joint"], seeds=[0])
    assert make(tmp_path) == 0, (tmp_path / "log").read_text()
    multi = tmp_path / "multi.yaml"
    text = multi.read_text()
    multi.write_text(text + "batch_size: 3\n")
    assert make(tmp_path) == 2
    assert "study.joint.s0: made with another config than study.yaml gives now" in (tmp_path / "log").read_text()
    multi.write_text(text)
    shutil.rmtree(folder_of(tmp_path))
    assert make(tmp_path) == 2
    assert "is there already, and no run of this study" in (tmp_path / "log").read_text()


def test_half_of_the_windows_are_drawn_as_often(tmp_path: Path) -> None:
    write_study(tmp_path, arms=["joint", "fractions"], fractions=[0.5], seeds=[0], reference="joint")
    assert make(tmp_path) == 0, (tmp_path / "log").read_text()
    runs = {name.removeprefix("study."): entry["cost"] for name, entry in runs_of(tmp_path).items()}
    parts = ("single.0.5.classes.s0", "single.0.5.numbers.s0")
    assert set(runs) == {"joint.s0", "joint.0.5.s0", *parts}
    assert runs["joint.s0"]["samples"] == 12 and runs["joint.s0"]["steps"] == 6
    # Three windows in batches of two: a pass has one batch of two and one of a single window.
    assert runs["joint.0.5.s0"]["steps"] == 8 == sum(runs[name]["steps"] for name in parts)
    assert runs["joint.0.5.s0"]["samples"] == 12 == sum(runs[name]["samples"] for name in parts)
