"""Memory that runs out: one line that names the limit, and exit code 1, after which a starter may try again."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rslearn.models.component import FeatureMaps
from rslearn.train.model_context import ModelContext

from rslp.runtime import memory
from tests.forks import ROOT, Forks
from tests.tiny import TinyEncoder, run_config, write_dataset, write_run

GROUPS = Path("/sys/fs/cgroup/memory")
HERE = "tests.runtime.test_memory"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("can't start new thread"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (RuntimeError("mat1 and mat2 must have the same dtype"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, told: bool) -> None:
    assert memory.is_out_of_memory(error) is told
    outer = KeyError("while handling it")
    outer.__context__ = error
    # Chains of exceptions may lead back to themselves.
    error.__cause__ = outer
    assert memory.is_out_of_memory(outer) is told


def test_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GiB" in memory.limits()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert "SLURM_MEM_PER_NODE 2.0 GiB" in memory.limits()
    code = "from rslp.runtime import memory; print(memory.limits())"
    line = f"ulimit -v 4194304; {sys.executable} -c '{code}'"
    done = subprocess.run(
        ["bash", "-c", line], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "ulimit -v 4.0 GiB" in done.stdout


class Hungry(TinyEncoder):
    """Takes more memory than there is, at the first step."""

    def forward(self, context: ModelContext) -> FeatureMaps:
        self.eaten = bytearray(8 << 30)
        return super().forward(context)


def limit_space(size: int) -> None:
    """As `ulimit -v` does, in this process."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + size, used + size))


def test_a_run_that_needs_more_than_ulimit_allows_ends_in_one_line(tmp_path: Path, forks: Forks) -> None:
    config = run_config({"classify": (str(write_dataset(tmp_path / "data", "classify")), "classify")}, epochs=1)
    config["model"]["init_args"]["model"]["init_args"]["encoder"] = [{"class_path": f"{HERE}.Hungry"}]
    config["trainer"]["enable_progress_bar"] = False
    run, said = write_run(tmp_path, config), tmp_path / "said"
    assert forks.run("run", "--run_dir", str(run.path), output=said, first=(f"{HERE}:limit_space", 1 << 30)) == 1
    errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "memory ran out (limit: " in errors[0] and "ulimit -v" in errors[0]
    assert "Traceback" not in said.read_text()


@contextmanager
def memory_group(size: int) -> Iterator[Path]:
    folder = GROUPS / f"rslp-tests-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(size))
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        yield folder
    finally:
        folder.rmdir()


def join(folder: str) -> None:
    """Have the processes that this one starts counted in a group, not itself."""
    from rslp.runtime.children import FORKED

    start = FORKED.Process.start

    def started(process: Any) -> None:
        start(process)
        Path(folder, "cgroup.procs").write_text(str(process.pid))

    FORKED.Process.start = started  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_worker_that_the_kernel_kills_for_memory(tmp_path: Path, forks: Forks) -> None:
    config = run_config(
        {
            "classify": (
                str(write_dataset(tmp_path / "data", "classify", size=4096, train=2, val=1, test=0)),
                "classify",
            )
        },
        epochs=1,
        num_workers=1,
    )
    run, said = write_run(tmp_path, config), tmp_path / "said"
    with memory_group(150 << 20) as folder:
        assert forks.run("run", "--run_dir", str(run.path), output=said, first=(f"{HERE}:join", str(folder))) == 1
    text = said.read_text()
    assert "a process that reads samples was killed (SIGKILL), as the kernel does when memory runs out (limit: " in text
    assert "Traceback" not in text


def test_a_worker_that_was_ended_from_outside_is_no_lack_of_memory() -> None:
    from rslp.data.batches import explain_worker_death
    from rslp.errors import MachineError

    for number, says in (
        (signal.SIGTERM, "was ended from outside"),
        (signal.SIGKILL, "memory"),
        (signal.SIGBUS, "/dev/shm"),
    ):
        death = f"DataLoader worker (pid 7) is killed by signal: {signal.strsignal(number)}. "
        with pytest.raises(MachineError, match=says), explain_worker_death():
            raise RuntimeError(death)
        # As it arrives when it interrupts torch's wait for a batch.
        with pytest.raises(MachineError, match=says), explain_worker_death():
            try:
                raise RuntimeError(death)
            except RuntimeError as error:
                raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from error
