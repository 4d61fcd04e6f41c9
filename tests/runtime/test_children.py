"""Nothing of ours outlives the process that it works for; every lock and every child is listed here."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from rslp.errors import MachineError
from rslp.runtime.children import pool

ROOT = Path(__file__).parents[2]
# What starts a process or takes a lock: by its own name, and as a part of a module.
NAMES = {"Popen", "ProcessPoolExecutor", "Pool", "Process", "get_context", "DataLoader", "pool_of", "Lock"}
PARTS = NAMES | {
    *("run", "call", "check_call", "check_output", "getoutput", "getstatusoutput", "start_processes"),
    *("create_subprocess_exec", "create_subprocess_shell", "fork", "forkpty", "posix_spawn", "posix_spawnp", "system"),
    *("popen", "execv", "execve", "execvp", "execvpe", "spawnv", "spawnve", "spawnl", "flock", "lockf"),
    "register_at_fork",
}
MODULES = {"subprocess", "os", "multiprocessing", "mp", "asyncio", "fcntl", "data", "locks", "children", "process"}
DIES = "preexec_fn=die_with_parent()"
WORKER = "multiprocessing_context=FORKED"
POOL = "pool_of"
READS = "asks something and ends by itself: its output is read"
# File, function, what is called -> how it ends with its parent, or why it need not.
COVERED = {
    ("evaluate/evaluation.py", "git_commit", "subprocess.run"): READS,
    ("example/windows.py", "write", "pool_of"): POOL,
    ("io/locks.py", "", "os.register_at_fork"): "the locks themselves",
    ("io/locks.py", "Lock.__init__", "fcntl.flock"): "the locks themselves",
    ("io/locks.py", "Lock.release", "fcntl.flock"): "the locks themselves",
    ("io/locks.py", "locked", "Lock"): "the locks themselves",
    ("launch/check_gate.py", "_run_check", "subprocess.run"): DIES,
    ("launch/bootstrap.py", "install", "subprocess.run"): "in a container, which ends with its first process",
    ("launch/bootstrap.py", "suitable_python", "subprocess.run"): "in a container, which ends with its first process",
    ("launch/bootstrap.py", "main", "os.execve"): "becomes the program, and starts none",
    ("launch/processes.py", "Supervisor.start", "subprocess.Popen"): DIES,
    ("launch/engines/slurm.py", "slurm", "subprocess.run"): "asks something, within two minutes",
    ("launch/engines/local.py", "LocalEngine.submit", "os.execve"): "becomes the program, and starts none",
    ("launch/engines/local.py", "LocalEngine.submit", "subprocess.Popen"): "--detach: is to outlive the terminal",
    ("launch/snapshot.py", "_git", "subprocess.run"): READS,
    ("runtime/children.py", "pool", "ProcessPoolExecutor"): "the pool itself: its processes are of a context of ours",
    ("data/datamodule.py", "MultiDatasetDataModule._stage_loader", "DataLoader"): WORKER,
    ("data/features/cache.py", "FeatureCache.__init__", "Lock"): "a lock of io/locks.py",
    ("data/features/cache.py", "delete_if_unused", "Lock"): "a lock of io/locks.py",
    ("data/features/encoding.py", "Encoding._read", "DataLoader"): WORKER,
    (
        "runtime/slow_reads.py",
        "SlowReadWatch.__init__",
        "os.register_at_fork",
    ): "no child: forked processes start its thread again",
    ("data/cache/refresh.py", "_map_in_processes", "pool_of"): POOL,
    ("data/cache/pack.py", "pack_all", "pool_of"): POOL,
}


def calls(path: Path) -> Iterator[tuple[str, str, str]]:
    """Function, name and source of each call that starts a process or takes a lock."""
    source = path.read_text()

    def visit(node: ast.AST, inside: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            deeper = inside
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                deeper = f"{inside}.{child.name}".strip(".")
            if isinstance(child, ast.Call):
                name = ast.unparse(child.func)
                home, _, last = name.rpartition(".")
                if name in NAMES or (last in PARTS and home.rpartition(".")[2] in MODULES):
                    yield inside, name, ast.get_source_segment(source, child) or ""
            if isinstance(child, ast.ImportFrom) and child.module in MODULES:
                yield from ((inside, name.name, "") for name in child.names if name.name in PARTS - NAMES)
            yield from visit(child, deeper)

    yield from visit(ast.parse(source), "")


def test_every_lock_and_every_child_is_covered() -> None:
    found = {}
    for path in sorted((ROOT / "rslp").rglob("*.py")):
        for function, name, text in calls(path):
            # A function inside of a function belongs to it.
            found.setdefault((path.relative_to(ROOT / "rslp").as_posix(), function, name), []).append(text)
    assert set(found) == set(COVERED)
    for place, texts in found.items():
        if COVERED[place] in (DIES, WORKER):
            assert all(COVERED[place] in " ".join(text.split()) for text in texts), place


def test_a_new_child_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(
        "from os import fork\ndef f():\n    os.fork()\n    torch.utils.data.DataLoader(x)\n"
    )
    assert [name for _, name, _ in calls(tmp_path / "new.py")] == ["fork", "os.fork", "torch.utils.data.DataLoader"]


PARENT = """
import os, subprocess, sys, time
from pathlib import Path
from rslp.runtime.children import FORKED, die_with_parent, pool
from rslp.io.locks import Lock

def say(path): Path(path, str(os.getpid())).touch(); time.sleep(60)

if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    lock = Lock(Path(folder, "lock"))
    if kind == "program":
        code = "import os, sys, time; open(os.path.join(sys.argv[1], str(os.getpid())), 'w'); time.sleep(60)"
        subprocess.run([sys.executable, "-c", code, folder], preexec_fn=die_with_parent())
    elif kind == "loader":
        import torch
        class Slow(torch.utils.data.Dataset):
            def __len__(self): return 2
            def __getitem__(self, index): say(folder)
        list(torch.utils.data.DataLoader(Slow(), num_workers=2, multiprocessing_context=FORKED))
    else:
        with pool(2, kind, what="waits") as workers: list(workers.map(say, [folder] * 2))
"""


@pytest.mark.parametrize(("kind", "count"), [("fork", 2), ("spawn", 2), ("program", 1), ("loader", 2)])
def test_children_end_with_their_parent(kind: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), kind, str(tmp_path)], env=environment)
    while len(pids := [path.name for path in tmp_path.glob("[0-9]*")]) < count:
        assert parent.poll() is None
        time.sleep(0.02)
    lock = (tmp_path / "lock").stat()
    for pid in pids:
        # At work, and not with the parent's lock.
        held = [path.stat() for path in Path("/proc", pid, "fd").iterdir() if path.exists()]
        assert not any(os.path.samestat(one, lock) for one in held)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 5
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < until, f"{kind}: still there"
        time.sleep(0.02)


def lives(pid: str) -> bool:
    """Whether a process is there, and no zombie that nobody has asked after."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end_by(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_process_of_a_pool_that_is_killed_is_one_line_and_worth_trying_again(start: Literal["fork", "spawn"]) -> None:
    killed = pytest.raises(MachineError, match="a process that lists windows was killed")
    with killed as caught, pool(2, start, what="lists windows") as workers:
        list(workers.map(end_by, [signal.SIGKILL] * 4))
    assert caught.value.exit_code == 1 and "GiB" in str(caught.value)
