"""A signal to a whole process group, as systemd, SLURM and a terminal send it: the run saves, nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rslp.rundir import RunDir
from rslp.runtime.children import FORKED, SPAWNED
from tests.forks import ROOT, Forks, group_is_gone
from tests.hold import holding, until
from tests.tiny import run_config, write_dataset, write_run
from tests.train.starts import left_by_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("data")
    return {kind: (str(write_dataset(folder / kind, kind)), kind) for kind in ("classify", "regress")}


def config_of(data: dict[str, tuple[str, str]], workers: int) -> dict[str, Any]:
    config = run_config(data, epochs=3, dropout=0.2, num_workers=workers)
    config["trainer"]["enable_progress_bar"] = False
    return config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, forks: Forks, data: dict[str, tuple[str, str]]) -> RunDir:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = write_run(folder, config_of(data, 0))
    assert forks.run("run", "--run_dir", str(run.path), output=folder / "said") == 0, (folder / "said").read_text()
    return run


def reached(run: RunDir, step: int) -> bool:
    return run.read_state().get("step", -1) >= step


@pytest.mark.parametrize(
    ("number", "workers", "code", "state"),
    [
        (signal.SIGTERM, 2, 143, "preempted"),
        pytest.param(signal.SIGTERM, 0, 143, "preempted", marks=pytest.mark.slow),
        (signal.SIGHUP, 0, 143, "preempted"),
        pytest.param(signal.SIGUSR1, 2, 143, "preempted", marks=pytest.mark.slow),
        (signal.SIGINT, 2, 130, "interrupted"),
    ],
)
def test_the_run_saves_and_goes_on_to_the_same_weights(
    tmp_path: Path,
    forks: Forks,
    data: dict[str, tuple[str, str]],
    undisturbed: RunDir,
    number: signal.Signals,
    workers: int,
    code: int,
    state: str,
) -> None:
    config, said = config_of(data, workers), tmp_path / "said"
    run = write_run(tmp_path, holding(config, tmp_path / "hold"))
    pid = forks.start("run", "--run_dir", str(run.path), output=said)
    until(lambda: reached(run, 6), lives=lambda: Path(f"/proc/{pid}").exists(), what="it ended before")
    os.killpg(pid, number)
    assert forks.wait(pid) == code, said.read_text()
    assert "Traceback" not in said.read_text() and "memory" not in said.read_text()
    assert run.read_state()["state"] == state and run.read_state()["step"] > 6
    assert group_is_gone(pid)
    (tmp_path / "hold").unlink()
    assert forks.run("run", "--run_dir", str(run.path), output=said) == 0
    assert left_by_run(run) == left_by_run(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("everybody", [False, True])
def test_two_processes_save_whether_their_starter_alone_is_told_or_everybody(
    tmp_path: Path, data: dict[str, tuple[str, str]], number: signal.Signals, workers: int, everybody: bool
) -> None:
    folders = {name: tmp_path / name for name in ("told", "calm")}
    config = config_of(data, workers)
    run, calm = write_run(folders["told"], holding(config, tmp_path / "hold")), write_run(folders["calm"], config)
    words = [sys.executable, "-m", "rslp.main", "helios", "run_ranks", "--ranks", "2", "--run_dir"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*words, str(run.path)], env=environment, start_new_session=True)
    until(lambda: reached(run, 4), lives=lambda: process.poll() is None, what="it ended before")
    # SLURM and systemd send the signal to every process, whatever its group: the ranks get it twice.
    told = [process.pid, *_below(process.pid)] if everybody else [process.pid]
    for pid in told:
        os.kill(pid, number)
    assert process.wait(120) == (130 if number == signal.SIGINT else 143)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in told[1:]), lives=lambda: True, what="")
    (tmp_path / "hold").unlink()
    for one in (run, calm):
        subprocess.run([*words, str(one.path)], env=environment, check=True)
    assert left_by_run(run) == left_by_run(calm)


def _below(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *_below(child))]


@pytest.mark.slow
def test_under_nohup_a_run_goes_on(tmp_path: Path, forks: Forks, data: dict[str, tuple[str, str]]) -> None:
    run, said = write_run(tmp_path, holding(config_of(data, 2), tmp_path / "hold")), tmp_path / "said"
    nohup = ("signal:signal", int(signal.SIGHUP), int(signal.SIG_IGN))
    pid = forks.start("run", "--run_dir", str(run.path), output=said, first=nohup)
    until(lambda: reached(run, 6), lives=lambda: Path(f"/proc/{pid}").exists(), what="it ended before")
    os.killpg(pid, signal.SIGHUP)
    (tmp_path / "hold").unlink()
    assert forks.wait(pid) == 0, said.read_text()
    assert json.loads(run.state.read_text())["state"] == "done"


@pytest.mark.parametrize("context", [FORKED, SPAWNED])
def test_children_leave_signals_to_their_parent_and_end_when_it_ends_them(context: Any) -> None:
    child = context.Process(target=signal.pause, daemon=True)
    child.start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(child.pid, number)
    child.join(0.3)
    assert child.is_alive()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    child.terminate()
    child.join(10)
    assert child.exitcode == -signal.SIGKILL
