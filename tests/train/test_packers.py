"""A packer that is killed leaves no process and no lock behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rslp.cli.main import main
from rslp.io.locks import Lock
from tests import children
from tests.tiny import run_config, write_dataset, write_run
from tests.train.ranks import ROOT

RECORD = ROOT / "docs" / "records" / "packers.md"


def killed(folder: Path, *words: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.train.packers", str(folder), *words]
    done = children.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)  # noqa: T201
    tally = json.loads(done.stdout.splitlines()[-1])
    assert (tally["left_over"], tally["slow_starts"], tally["failures"]) == (0, 0, []), (tally, done.stderr[-3000:])
    return dict(tally)


def test_three_kills_leave_nothing_behind(tmp_path: Path) -> None:
    assert killed(tmp_path, "--kills", "3", "--seed", "2")["of_holders"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_leave_nothing_behind(tmp_path: Path) -> None:
    assert killed(tmp_path, "--kills", "50", "--record", str(RECORD))["of_holders"] >= 15


def forked(words: list[str], log: Path) -> int:
    """A process that runs a workflow as the command line does, without the seconds of its imports."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        logging.root.handlers.clear()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code = main(words)
    finally:
        os._exit(code)


@pytest.mark.parametrize(
    ("workflow", "number", "times", "ends"),
    [
        ("run", signal.SIGTERM, 2, 143),
        ("run", signal.SIGINT, 1, 130),
        ("pack", signal.SIGINT, 1, 130),
    ],
)
def test_who_waits_for_a_lock_says_for_whom_and_ends_at_once(
    workflow: str, number: int, times: int, ends: int, tmp_path: Path
) -> None:
    data = write_dataset(tmp_path / "regress", "regress")
    run = write_run(tmp_path, run_config({"regress": (str(data), "regress")}))
    words = [f"--config_paths+={run.config}"] if workflow == "pack" else ["--run_dir", str(run.path)]
    lock, log = Lock(data / ".rslp-store" / "lock"), tmp_path / "log"
    pid = forked(["helios", workflow, *words], log)
    waited = 0, 0
    try:
        until = time.monotonic() + 60
        while f"waiting for process {os.getpid()} on " not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.02)
        for _ in range(times):
            os.kill(pid, number)
        until = time.monotonic() + 20
        while not waited[0]:
            waited = os.waitpid(pid, os.WNOHANG)
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.02)
    finally:
        lock.release()
        if not waited[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(waited[1]) == ends, log.read_text()
    assert "Traceback" not in log.read_text()
