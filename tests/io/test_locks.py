"""Lock files: who holds them, who waits, and what is no lock file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from rslp.errors import RunError
from rslp.io import locks
from rslp.io.locks import Lock, holder, no_links

HOLD = "import sys, time; from pathlib import Path; from rslp.io.locks import Lock\n"
HOLD += "lock = Lock(Path(sys.argv[1])); print('held', flush=True); "
LEAVE = "import subprocess, os; os.set_inheritable(lock._handle, True); "
LEAVE += "print(subprocess.Popen(['sleep', '60'], close_fds=False, stdout=2).pid, flush=True); "


def holding(path: Path, then: str = "time.sleep(60)") -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD + then, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_who_waits_learns_for_whom_and_a_killed_holder_holds_nobody_up(tmp_path: Path) -> None:
    process = holding(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        Lock(tmp_path / "lock")
    assert holder(tmp_path / "lock") == (tmp_path / "lock").read_text().strip()
    assert holder(tmp_path / "lock").startswith(f"process {process.pid} on ")
    end(process)
    Lock(tmp_path / "lock").release()


def test_a_dead_holder_and_what_it_left_behind_are_named(tmp_path: Path) -> None:
    process = holding(tmp_path / "lock", LEAVE + "time.sleep(60)")
    assert process.stdout is not None
    child = process.stdout.readline().strip()
    end(process)
    try:
        with pytest.raises(BlockingIOError):
            Lock(tmp_path / "lock")
        said = holder(tmp_path / "lock")
        assert said.startswith(f"process {child} on ")
        assert f"left behind by process {process.pid}, which has ended" in said
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_lock_that_was_let_go_is_free_though_a_child_has_its_descriptor(tmp_path: Path) -> None:
    process = holding(tmp_path / "lock", LEAVE + "lock.release(); time.sleep(60)")
    assert process.stdout is not None
    child = process.stdout.readline().strip()
    try:
        until = time.monotonic() + 10
        while True:
            try:
                Lock(tmp_path / "lock").release()
                break
            except BlockingIOError:
                assert time.monotonic() < until
                time.sleep(0.02)
    finally:
        end(process)
        os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("content", ["", "process 12 on elsewhere", "process 1 on \x1b[2J since 2", "\x00" * 500])
def test_a_record_that_is_none_names_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(content)
    assert holder(tmp_path / "lock") == "another process"


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_what_is_no_plain_file_is_refused(kind: str, tmp_path: Path) -> None:
    mine, lock = tmp_path / "mine", tmp_path / "lock"
    mine.write_text("mine")
    made = {
        "link": lambda: lock.symlink_to(mine),
        "dangling": lambda: lock.symlink_to(tmp_path / "new"),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }
    made[kind]()
    for attempt in (lambda: Lock(lock), lambda: no_links(str(lock), os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        with pytest.raises(RunError, match=f"^{lock} is a link, a folder or a pipe where a plain file belongs: remove"):
            attempt()
    assert mine.read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_a_file_with_another_name_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", tmp_path / "lock")
    Lock(tmp_path / "lock").release()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_lock_file_that_was_removed_meanwhile_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = locks.fcntl.flock

    def removed(handle: int, kind: int) -> None:
        monkeypatch.setattr(locks.fcntl, "flock", real)
        (tmp_path / "lock").unlink()
        real(handle, kind)

    monkeypatch.setattr(locks.fcntl, "flock", removed)
    lock = Lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        Lock(tmp_path / "lock")
    lock.release()


def test_it_is_said_again_and_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [0.0]

    def sleep(seconds: float) -> None:
        passed[0] += 100 * seconds

    monkeypatch.setattr(locks.time, "monotonic", lambda: passed[0])
    monkeypatch.setattr(locks.time, "sleep", sleep)

    def leave() -> None:
        if passed[0] > 1000:
            raise TimeoutError

    wait = locks.waiting("is packing it", leave=leave)
    lock = Lock(tmp_path / "lock")
    with pytest.raises(TimeoutError), locks.locked(tmp_path / "lock", busy=wait):
        pass
    lock.release()
    lines = [record.message for record in caplog.records]
    assert len(lines) == 4
    assert lines[0].startswith(f"waiting for process {os.getpid()} on ")
    assert lines[0].endswith(" UTC, which is packing it")
    assert lines[-1].endswith("(15 min)")


def test_a_block_that_raises_lets_go(tmp_path: Path) -> None:
    def refuse(path: Path) -> NoReturn:
        raise RunError(str(path))

    with pytest.raises(KeyError), locks.locked(tmp_path / "lock", busy=refuse):
        with pytest.raises(RunError), locks.locked(tmp_path / "lock", busy=refuse):
            pass
        raise KeyError
    with locks.locked(tmp_path / "lock", busy=refuse):
        pass
