"""The run directory: names, the lock, the marker of success."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rslp.errors import RunError
from rslp.launch.runs import best_score
from rslp.rundir import RunDir


def test_a_run_lies_where_the_original_puts_it() -> None:
    run = RunDir.of("project_data", "demo", "first")
    assert run.path == Path("project_data/projects/demo/first")
    assert run.last == run.path / "checkpoints" / "last.ckpt"
    assert run.best("crop_type").name == "best-crop_type.ckpt"


ODD = [
    *(
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        " a",
        "a ",
        "../up",
        ".hidden",
        "-x",
        "a\0b",
        "a\nb",
        "a\udcff",
        "x" * 101,
        "ü" * 128,
    ),
    *("with space", "ünï", "it's", "a\x1b[2Jb", "a\u202eb", "--help", "$(x)", "a;b", "*"),
]


@pytest.mark.parametrize("name", ODD)
def test_names_that_are_long_or_odd_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^(project|experiment) name [ -~…üï]{1,60} can't be used: it takes [^\n]+$"):
        RunDir.of(tmp_path, "demo", name)
    (tmp_path / "projects" / "demo").mkdir(parents=True)
    with pytest.raises(RunError):
        RunDir.of(tmp_path, name, "demo")


@pytest.mark.parametrize("name", ["with space", "ünï", "it's", "x" * 255])
def test_a_run_that_an_earlier_version_so_named_goes_on(name: str, tmp_path: Path) -> None:
    (tmp_path / "projects" / name / name).mkdir(parents=True)
    assert RunDir.of(tmp_path, name, name).experiment == name
    with pytest.raises(RunError):
        RunDir.of(tmp_path, name, f"{name[:200]} new")


def test_the_done_marker_holds_the_checkpoints_hash(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.done() is None
    run.checkpoints.mkdir()
    run.last.write_bytes(b"weights")
    run.mark_done(step=7, epoch=2, checkpoint=run.last)
    written = json.loads(run.done_marker.read_text())
    assert written.pop("crc32")
    assert run.done() == written
    assert run.done()["checkpoint_sha256"].startswith("9a12")  # type: ignore[index]


def test_the_lock_is_exclusive_and_dies_with_its_holder(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from rslp.rundir import RunDir\n"
    code += f"with RunDir(Path({str(tmp_path)!r})).locked(): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    run = RunDir(tmp_path)
    with pytest.raises(RunError, match=f"process {holder.pid} on .* is already training"), run.locked():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with run.locked():
        assert (tmp_path / "lock").exists()


def test_the_lock_dies_with_its_holder_though_a_worker_of_it_lives_on(tmp_path: Path) -> None:
    code = "import os, time; from pathlib import Path; from rslp.rundir import RunDir\n"
    code += f"r, w = os.pipe()\nwith RunDir(Path({str(tmp_path)!r})).locked():\n    child = os.fork()\n"
    code += "    if child: os.read(r, 1); print(child, flush=True)\n    else: os.write(w, b'.')\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    try:
        with RunDir(tmp_path).locked():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_the_state_carries_a_heartbeat(tmp_path: Path) -> None:
    RunDir(tmp_path).write_state(state="running", epoch=1)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["state"] == "running"
    assert abs(state["heartbeat"] - time.time()) < 60


@pytest.mark.parametrize("name", ["2024", "a.b-c_d", "_x", "X", "x" * 100])
def test_other_names_are_taken(name: str, tmp_path: Path) -> None:
    run = RunDir.of(tmp_path, name, name)
    run.path.mkdir(parents=True)
    assert run.project == run.experiment == name


@pytest.mark.parametrize("content", [None, b"", b'{"state": "run', b"[1]", b"\xff\x00"])
def test_a_state_that_cannot_be_read_is_none(tmp_path: Path, content: bytes | None) -> None:
    run = RunDir(tmp_path)
    if content is not None:
        run.state.write_bytes(content)
    assert run.read_state() == {}
    run.write_state(state="running", step=3)
    assert run.read_state()["step"] == 3


def test_a_log_that_was_cut_short_has_a_best_score(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    notes: list[str] = []
    assert (best_score(run, notes), notes) == (None, [])
    run.metrics.write_bytes(
        b"step,epoch,name,value\n1,0,val/score,0.25\n2,1,val/score,0.5\n3,2,val/score,\n4,3,val/score\n\xff\x00"
    )
    assert best_score(run, notes) == 0.5
    assert notes == [f"{run.metrics} is damaged: 2 rows of it can be read"]


def test_a_last_row_that_a_kill_cut_short_is_no_damage(tmp_path: Path) -> None:
    run, notes = RunDir(tmp_path), list[str]()
    run.metrics.write_bytes(b"step,epoch,name,value\r\n1,0,val/score,0.25\r\n")
    run.write_state(state="running")
    with run.metrics.open("ab") as log:
        log.write(b"2,1,val/sc")
    assert (best_score(run, notes), notes) == (0.25, [])


@pytest.mark.parametrize("damaged", [b"", b"step,epoch,name,value\r\n1,0,val/score,0.25\r\n", None])
def test_a_log_that_lost_rows_which_the_state_knows_of_is_damaged(tmp_path: Path, damaged: bytes | None) -> None:
    run, notes = RunDir(tmp_path), list[str]()
    run.metrics.write_bytes(b"step,epoch,name,value\r\n1,0,val/score,0.25\r\n2,1,val/score,0.5\r\n")
    run.write_state(state="running")
    run.metrics.unlink() if damaged is None else run.metrics.write_bytes(damaged)
    best_score(run, notes)
    assert len(notes) == 1 and str(run.metrics) in notes[0]


def test_one_changed_digit_of_the_log_is_noticed(tmp_path: Path) -> None:
    run, notes = RunDir(tmp_path), list[str]()
    run.metrics.write_bytes(b"step,epoch,name,value\r\n1,0,val/score,0.25\r\n")
    run.write_state(state="running")
    sound = run.metrics.read_bytes()
    run.metrics.write_bytes(sound.replace(b"0.25", b"0.95"))
    assert (best_score(run, notes), len(notes)) == (0.95, 1)
    for damaged in (sound.replace(b"1,0,", b"1\r0,"), sound.replace(b"1,0,", b'"' * 140_000), b"\xff{"):
        run.metrics.write_bytes(damaged)
        best_score(run, notes := [])
        assert len(notes) == 1


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"state": 3}', '{"state": "done", "heartbeat": "now"}', '{"epoch": [1]}', '{"step": "2"}'],
)
def test_a_damaged_state_is_a_note_and_as_if_there_were_none(tmp_path: Path, content: str) -> None:
    run, notes = RunDir(tmp_path), list[str]()
    run.state.write_text(content)
    assert run.read_state(notes) == {}
    assert len(notes) == 1 and notes[0].startswith(f"{run.state} is damaged")


def test_a_folder_where_a_run_has_a_file_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / ".sending").mkdir()
    run.checkpoints.mkdir()
    run.refuse_folders()
    for path in (run.lock, run.state, run.metrics, run.last, run.job("test"), run.prediction_config):
        path.mkdir()
        with pytest.raises(RunError, match=f"{path.name} is a folder"):
            run.refuse_folders()
        path.rmdir()
