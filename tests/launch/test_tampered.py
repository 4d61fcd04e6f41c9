"""What others may write below a shared prefix ends no process, and writes and shows no file, that is not the run's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rslp.cli.main import main
from rslp.io import ObjectStore
from rslp.launch.engines import slurm as slurm_engine
from rslp.launch.engines.local import LocalEngine
from rslp.launch.record import SubmissionRecord, read_record
from rslp.rundir import RunDir

SLEEP = "import time; print('up', flush=True); time.sleep(60)"


def started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path))
    run = RunDir.of(tmp_path, "helios_finetuning", "x")
    run.path.mkdir(parents=True)
    run.config.write_text("{}")
    return run


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    words = getattr(request, "param", ())
    made = subprocess.Popen([sys.executable, "-c", SLEEP, *words], stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    made.stdout.readline()
    yield made
    made.kill()
    made.communicate()


def submitted(run: RunDir, **values: Any) -> None:
    content = {"schema": 1, "engine": "local", "mode": "fit", "submitted": "2026-01-01T00:00:00+00:00", "plan": "p"}
    run.job().write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    "process", [(), ("rslp.main", "--run_dir", "/elsewhere"), ("rslp.main", "--run_dir")], indirect=True
)
def test_cancel_ends_no_process_of_anything_else(
    run: RunDir, process: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(run, id=f"{process.pid}@{socket.gethostname()}@{started(process.pid)}")
    assert main(["helios", "cancel", "--experiment_id", "x"]) == 2
    assert "is neither queued nor running: failed" in capsys.readouterr().err
    time.sleep(0.2)
    assert process.poll() is None


def test_cancel_ends_the_runs_own(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(tmp_path)
    # The same folder by another name, as a mount on this machine may have.
    named = tmp_path / "other" / "projects" / "helios_finetuning" / "x"
    words = [sys.executable, "-c", SLEEP, "rslp.main", "--run_dir", str(named)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        submitted(run, id=f"{process.pid}@{socket.gethostname()}@{started(process.pid)}")
        assert main(["helios", "cancel", "--experiment_id", "x"]) == 0
        assert process.wait() == -signal.SIGTERM


@pytest.mark.parametrize(
    "identity",
    ["", "1", "0@h@1", "-1@h@1", f"-1@{socket.gethostname()}@", "1@h@x", "1@h@1@2", "x@h@1", "1@h\n@1", "--user=me"],
)
def test_a_process_that_is_none_is_one_line(
    run: RunDir, identity: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it was sent a signal"))
    submitted(run, id=identity)
    for workflow in ("cancel", "logs"):
        assert main(["helios", workflow, "--experiment_id", "x"]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, said
    assert main(["helios", "jobs"]) == 0


@pytest.mark.parametrize("identity", ["--user=me", "-u", "1 2", "1;2", "", "1_", "abc", "1\n"])
def test_an_id_of_slurm_is_no_option(run: RunDir, identity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a command was run"))
    submitted(run, engine="slurm", id=identity)
    assert main(["helios", "cancel", "--experiment_id", "x"]) == 2


@pytest.mark.parametrize(
    ("output", "ends"),
    [("{}/logs/slurm-7.log", True), ("{}/../y/logs/z", True), ("/h/o", False), ("{project}2/x/logs/z", False)],
)
def test_cancel_ends_no_job_of_another_project(
    run: RunDir, output: str, ends: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def slurm(*words: str, **_: Any) -> str:
        asked.append(words)
        return (
            f"JobState=RUNNING StdOut={output.format(run.path, project=run.path.parent)} WorkDir=/x\n"
            if words[0] == "scontrol"
            else ""
        )

    monkeypatch.setattr(slurm_engine, "slurm", slurm)
    monkeypatch.setattr(slurm_engine, "slurm", slurm)
    submitted(run, engine="slurm", id="7")
    assert main(["helios", "cancel", "--experiment_id", "x"]) == (0 if ends else 2)
    assert ("scancel", "--signal=USR1", "7") in asked or not ends
    assert ends or "not this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [{"mode": "../../../outside"}, {"mode": "test"}, {"log": 7}, {"id": ["1"]}, {"submitted": "soon"}, {"more": 1}],
)
def test_a_record_of_something_else_is_one_line_and_nothing_is_written(
    run: RunDir, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "job-..").mkdir()
    submitted(run, **{"id": f"{os.getpid()}@{socket.gethostname()}@1", **values})
    before = sorted(tmp_path.rglob("*"))
    assert main(["helios", "cancel", "--experiment_id", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run.job()} is no record of a submission")
    assert len(said.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_logs_show_the_runs_own_files_alone(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_text("secret")
    submitted(run, id=f"1@{socket.gethostname()}@1", log=str(tmp_path / "secret"))
    assert main(["helios", "logs", "--experiment_id", "x"]) == 0
    assert "secret" not in capsys.readouterr().out
    run.logs.mkdir()
    (run.logs / "local-fit.log").write_text("said")
    # Of a prefix that was moved since.
    submitted(run, id=f"1@{socket.gethostname()}@1", log="/former/prefix/projects/p/x/logs/local-fit.log")
    assert main(["helios", "logs", "--experiment_id", "x"]) == 0
    assert capsys.readouterr().out == "said"


@pytest.mark.parametrize("kind", ["lock", "predict.lock"])
def test_a_lock_that_is_a_link_is_refused_in_one_line(run: RunDir, kind: str, tmp_path: Path) -> None:
    from rslp.errors import RunError

    (tmp_path / "mine").write_text("mine")
    (run.path / kind).symlink_to(tmp_path / "mine")
    mode = "predict" if kind == "predict.lock" else "fit"
    with pytest.raises(RunError, match=f"^{run.path / kind} is a link"), run.locked(mode):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_sweep_removes_what_this_program_began_alone(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    run.checkpoints.symlink_to(tmp_path / "elsewhere")
    theirs, ours = tmp_path / "elsewhere" / ".notes.tmp", tmp_path / "elsewhere" / f".{'0a' * 16}.tmp"
    theirs.touch()
    ours.touch()
    run.sweep()
    assert theirs.exists()
    assert not ours.exists()


def test_keys_of_an_object_store_lead_out_of_no_folder() -> None:
    keys = ["job.json", "a/b", "../x", "a/../../x", "a//b", "./a", "a\x1b[2J", "..", "a/.."]

    class System:
        def find(self, path: str, *, detail: bool) -> dict[str, Any]:
            assert detail
            return {f"{path}/{key}": {"size": 1} for key in keys}

    store = ObjectStore("memory://bucket/p", patience=0)
    store.__dict__["_system_and_path"] = (System(), "bucket/p")
    assert sorted(store.sizes()) == ["a/b", "job.json"]


def test_a_record_keeps_what_it_says(run: RunDir) -> None:
    submitted(run, id="1@h@1", log=str(run.logs / "local-fit.log"))
    assert read_record(run) == SubmissionRecord(
        engine="local", id="1@h@1", mode="fit", submitted="2026-01-01T00:00:00+00:00", plan="p",
        log=str(run.logs / "local-fit.log"),
    )  # fmt: skip
    assert LocalEngine().state(run, read_record(run)) in ("unknown", "failed")  # type: ignore[arg-type]
