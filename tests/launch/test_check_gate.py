"""The check before a run: once for each state of config and data, and never in the way of what goes on."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rslp.errors import RunError
from rslp.io import dump_yaml, read_json, write_atomic
from rslp.launch import check_gate
from rslp.launch.check_gate import check_fingerprint, ensure_checked
from rslp.rundir import RunDir


@dataclass(frozen=True)
class Place:
    """A config over a dataset and a checkpoint, and in place of the interpreter a script that notes its words."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        module = {"init_args": {"path": str(self.path / "crops")}}
        encoder = {"init_args": {"checkpoint_path": str(self.path / "weights")}}
        return {"data": {"init_args": {"data_modules": {"crops": module}}}, "model": {"init_args": {"model": encoder}}}

    @property
    def run(self) -> RunDir:
        return RunDir.of(self.path / "runs", "p", "e")

    @property
    def calls(self) -> list[list[str]]:
        log = self.path / "calls"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    def ensure(self, config: dict[str, Any] | None = None, *, here: bool = True) -> None:
        constants = {"CHECKPOINT_PATH": "weights", "PATCH_SIZE": 8}
        ensure_checked(["OUT.yaml"], config=config or self.config, run=self.run, constants=constants, here=here)

    def ends_with(self, code: int) -> None:
        script = self.path / "python"
        script.write_text(f'#!/bin/sh\necho "$@" >> {self.path}/calls\nexit {code}\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "crops" / "windows" / "default" / "w0").mkdir(parents=True)
    (tmp_path / "crops" / "config.json").write_text("{}")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "weights.pth").write_bytes(b"weights")
    place = Place(tmp_path)
    place.ends_with(0)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return place


def test_what_passed_is_checked_once(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.ensure()
    place.ensure()
    words = "-m rslp.main helios check --config_paths+=OUT.yaml --helios_checkpoint_path=weights --patch_size=8"
    assert place.calls == [words.split()]
    assert capfd.readouterr().err == "checking config and data\n"
    assert sorted(path.name for path in place.run.path.iterdir()) == ["check.json"]
    place.ensure(place.config | {"seed": 1})
    assert len(place.calls) == 2


@pytest.mark.parametrize("record", ["", "{", "[]", '{"passed": null}'])
def test_a_record_that_says_nothing_is_no_pass(place: Place, record: str) -> None:
    write_atomic(place.run.check, record)
    place.ensure()
    assert len(place.calls) == 1


@pytest.mark.parametrize(
    ("code", "message"), [(2, "found errors, so nothing was started"), (1, "itself failed"), (-9, "code -9")]
)
def test_a_check_that_did_not_pass_stops_and_leaves_nothing(place: Place, code: int, message: str) -> None:
    if code < 0:
        (place.path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    else:
        place.ends_with(code)
    with pytest.raises(RunError, match=message):
        place.ensure()
    assert not place.run.path.exists()


def test_ctrl_c_during_the_check_is_ctrl_c(place: Place) -> None:
    place.ends_with(130)
    with pytest.raises(KeyboardInterrupt):
        place.ensure()


def test_a_run_that_goes_on_is_not_checked_until_its_config_changes(place: Place) -> None:
    write_atomic(place.run.config, dump_yaml(place.config))
    place.ends_with(2)
    with pytest.raises(RunError):
        place.ensure()  # no checkpoint: nothing goes on
    write_atomic(place.run.last, b"")
    place.ensure()
    with pytest.raises(RunError):
        place.ensure(place.config | {"seed": 1})


def test_without_the_training_stack_it_is_skipped_in_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_gate, "_TRAINING_STACK", ("json", "no_such_package"))
    place.ensure()
    assert place.calls == []
    assert capfd.readouterr().err == "the check is skipped: no_such_package not installed here\n"
    assert not place.run.path.exists()


@pytest.mark.parametrize(
    ("gone", "words", "said"),
    [
        ("crops", ["--data", "false"], "leaves out the data: {path}/crops is not on this machine"),
        ("weights", None, "is skipped: {path}/weights is not on this machine"),
    ],
)
def test_for_another_machine_what_is_not_here_is_no_fault(
    place: Place, gone: str, words: list[str] | None, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (place.path / gone).rename(place.path / "elsewhere")
    place.ensure(here=False)
    assert [call[-2:] for call in place.calls] == ([words] if words else [])
    assert said.format(path=place.path) in capfd.readouterr().err
    place.ensure()  # here, the check itself will tell of it
    assert place.calls[-1][-1] == "--patch_size=8"


def test_a_run_that_has_no_place_is_not_checked_first(place: Place) -> None:
    (place.path / "runs").touch()
    with pytest.raises(RunError, match=r"can't be written: .*/runs: no folder; RSLP_PREFIX says"):
        place.ensure()
    assert place.calls == []


def _age(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda path: (path / "crops/windows/default/w1").mkdir(), True),
        (lambda path: (path / "crops/windows/default/w0").rmdir(), True),
        (lambda path: (path / "crops/windows/other").mkdir(), True),
        (lambda path: (path / "crops/config.json").write_text('{"layers": {}}'), True),
        (lambda path: (path / "weights/weights.pth").write_bytes(b"others"), True),
        (lambda path: (path / "weights").rename(path / "gone"), True),
        (lambda path: _age(path / "crops/config.json"), True),
        (lambda path: (path / "crops/.rslearn_dataset_index").mkdir(), False),
        (lambda path: (path / "crops/windows.db-wal").touch(), False),
        (lambda path: (path / "notes.txt").touch(), False),
    ],
)
def test_a_change_of_what_the_config_names_is_seen(place: Place, change: Callable[[Path], Any], seen: bool) -> None:
    for path in (place.path / "crops").rglob("*"):
        _age(path) if path.name != "config.json" else None
    before = check_fingerprint(place.config)
    assert check_fingerprint(place.config) == before
    change(place.path)
    assert (check_fingerprint(place.config) != before) is seen


def test_the_record_is_plain_json(place: Place) -> None:
    place.ensure()
    assert json.loads(place.run.check.read_text())["passed"] == check_fingerprint(place.config)
    assert read_json(place.run.check) == {"passed": check_fingerprint(place.config)}
