"""Several processes as one job: what they are told, how they end, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rslp.launch.processes import RankGroup, run_group

RANK = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
LEAVES = """
got = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, f: got.append(int(n)))
print("up", flush=True)
while not got:
    time.sleep(0.01)
time.sleep(0.5 * (rank == 0))
print("saved", got)
sys.exit(143)
"""
FOR_EVER = "print('up', flush=True); time.sleep(100)"


def run(code: str, folder: Path, *, ranks: int = 2, grace: float = 10) -> int:
    group = RankGroup(per_node=ranks, port=1234)
    command = [sys.executable, "-c", RANK + code]
    return run_group(command, group, logs=folder, environment=os.environ, after_failure=grace)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("sys.exit(143)", 143),
        ("sys.exit(130)", 130),
        ("sys.exit(2)", 2),
        ("sys.exit(rank and 2)", 2),
        ("sys.exit(rank * 3)", 3),
        ("sys.exit(143 * rank)", 143),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        # It came before the handlers were there.
        ("os.kill(os.getpid(), signal.SIGUSR1)", 143),
    ],
)
def test_the_code_is_theirs(tmp_path: Path, code: str, expected: int) -> None:
    assert run(code, tmp_path) == expected


def test_they_are_told_where_they_stand(tmp_path: Path) -> None:
    names = (
        "RSLP_RANKS",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    code = f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names!r}))"
    group = RankGroup(per_node=2, nodes=2, node=1, address="10.0.0.1", port=1234)
    command = [sys.executable, "-c", RANK + code]
    # What a surrounding job says of ranks is overruled.
    assert run_group(command, group, logs=tmp_path, environment={**os.environ, "WORLD_SIZE": "99", "RANK": "7"}) == 0
    assert (tmp_path / "2").read_text() == "torchrun 2 0 4 2 1 10.0.0.1 1234"
    assert (tmp_path / "3").read_text() == "torchrun 3 1 4 2 1 10.0.0.1 1234"


def test_one_that_fails_alone_is_heard_and_the_waiting_are_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "print('a cause', file=sys.stderr) or sys.exit(5) if rank else time.sleep(100)"
    begin = time.monotonic()
    assert run(code, tmp_path, grace=0.5) == 5
    assert time.monotonic() - begin < 20
    assert f"{tmp_path}/rank1.log ends with:\n  a cause\n" in capfd.readouterr().err


def test_a_mistake_that_all_meet_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("print('error: x', file=sys.stderr); sys.exit(2)", tmp_path, ranks=3) == 2
    assert capfd.readouterr().err == "error: x\n"


@contextmanager
def supervisor(code: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs two ranks, both of which are up."""
    program = (
        "import os, sys; from pathlib import Path; from rslp.launch.processes import RankGroup, run_group\n"
        f"command = [sys.executable, '-c', {RANK + code!r}]\n"
        f"group, logs = RankGroup(per_node=2, port=1), Path({str(folder)!r})\n"
        "sys.exit(run_group(command, group, logs=logs, environment=os.environ))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        log = folder / "rank1.log"
        wait_until(lambda: log.exists() and "up" in log.read_text())
        yield process


def wait_until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_reaches_each_once_and_all_may_save(tmp_path: Path, number: signal.Signals) -> None:
    with supervisor(LEAVES, tmp_path) as process:
        process.send_signal(number)
        assert process.wait(20) == 143
        assert process.stdout is not None
        assert process.stdout.read() == f"saved [{int(number)}]\n"
    assert f"saved [{int(number)}]" in (tmp_path / "rank1.log").read_text()


def test_ctrl_c_twice_ends_what_does_not_listen(tmp_path: Path) -> None:
    with supervisor("signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + FOR_EVER, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        # As after one Ctrl-C: it was no failure that could be tried again.
        assert process.wait(20) == 130


def test_they_die_with_their_parent(tmp_path: Path) -> None:
    with supervisor(FOR_EVER, tmp_path) as process:
        ranks = children(process.pid)
        assert len(ranks) == 2
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
