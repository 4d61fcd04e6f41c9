"""A disk that is full, over its quota or failing at any write of a run: ``python -m tests.train.full_disk FOLDER``.

Every command of a run (pack, fit, test, predict) is given a disk with too little room: a small file system of its own
with so many free pages, a limit on the size of files, or an error at its n-th opening, renaming, linking or syncing of
a file. It has to end with exit code 1 and one line that names a file and the room, or to go on without what it does not
need; nothing it leaves may be torn. Given room, the same command ends as one that never lacked any.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from rslp.run import RunDir
from rslp.train.checkpoints import read_checkpoint
from tests.forks import Forks
from tests.tiny import run_config, write_dataset
from tests.train.starts import digest_of, left_by_run

PAGE = 4096
_ENOUGH = 20
HERE = "tests.train.full_disk"
SAYS = re.compile(r"^error: /.* can't be written: .* bytes free in /.*\)$", re.MULTILINE)
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Of these, what a write needs: opened for writing, made, renamed, linked.
_EVENTS = {"open", "os.rename", "os.mkdir", "os.link"}


@dataclass(frozen=True)
class Fault:
    """What is wrong with the disk.

    Attributes:
        kind: ``pages``: so many are free; ``size``: no file may be larger; ``call``: the n-th call fails.
        number: how many.
        error: of a call.
    """

    kind: str
    number: int
    error: int = 0

    @property
    def first(self) -> list[Any]:
        """What the process calls first."""
        if self.kind == "size":
            return [f"{HERE}:limit_files", self.number]
        return [f"{HERE}:fail_at", self.number, self.error] if self.kind == "call" else []


def limit_files(size: int) -> None:
    """Let no file of this process become larger; Python ignores the signal that comes with it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fail_at(number: int, error: int) -> None:
    """Have the n-th call of this process that begins or ends a file below ``DISK`` fail."""
    root, calls, me, fsync = os.environ["DISK"], 0, os.getpid(), os.fsync

    def call(path: Any) -> None:
        nonlocal calls
        if os.getpid() != me or isinstance(path, int) or not os.fsdecode(path).startswith(root):
            return
        calls += 1
        if calls == number:
            raise OSError(error, os.strerror(error), os.fsdecode(path))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if event in _EVENTS and writes:
            call(arguments[0])

    def failing_fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if str(path).startswith(root):
            nonlocal calls
            calls += 1
            if calls == number:
                # Without a name, as the system has it.
                raise OSError(error, os.strerror(error))
        fsync(handle)

    sys.addaudithook(hook)
    os.fsync = failing_fsync


@contextmanager
def small_disk(folder: Path, *, size: int) -> Iterator[Path]:
    """A file system of its own.

    Raises:
        PermissionError: this machine lets nobody mount one.
    """
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        raise PermissionError("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@dataclass
class Tally:
    """What came of the faults of a command.

    Attributes:
        ended: commands that ended with one line.
        went_on: commands that ended well in spite of the fault, or were through before it.
        wrong: what was otherwise than it has to be.
    """

    ended: int = 0
    went_on: int = 0
    wrong: list[str] = field(default_factory=list)


class Harness:
    """One run with all that belongs to it, below one folder."""

    def __init__(self, disk: Path, aside: Path, forks: Forks) -> None:
        self._disk, self._aside, self._forks = disk, aside, forks
        self._home = disk / "home"
        self.run = RunDir(self._home / "projects" / "tests" / "tiny")
        self._config = self._home / "run.yaml"
        self.tallies = {name: Tally() for name in self.commands()}

    def commands(self) -> dict[str, tuple[str, ...]]:
        """The commands of a run, in their order."""
        job = ("run", "--run_dir", str(self.run.path), "--mode")
        pack = ("pack", f"--config_paths+={self.run.config}")
        return {"pack": pack, "fit": (*job, "fit"), "test": (*job, "test"), "predict": (*job, "predict")}

    def prepare(self) -> None:
        """Make a run directory, and what each command leaves if nothing is wrong."""
        kinds = ("classify", "segment")
        data = {
            kind: (str(write_dataset(self._aside / "data" / kind, kind, train=4, val=2, test=1)), kind)
            for kind in kinds
        }
        made = run_config(data, epochs=2, dropout=0.2)
        made["trainer"] |= {"enable_progress_bar": False, "callbacks": [frozen(), often(self.run)]}
        made["data"]["init_args"]["store"] = str(self._home / "stores")
        self.run.path.mkdir(parents=True)
        self.run.config.write_text(yaml.safe_dump(made, sort_keys=False))
        for name, words in self.commands().items():
            shutil.copytree(self._home, self._aside / f"before {name}")
            said = self._aside / f"said {name}"
            code = self._forks.run(*words, output=said)
            assert code == 0, said.read_text()
            shutil.copytree(self._home, self._aside / f"after {name}")

    def most(self, name: str, kind: str) -> int:
        """Beyond which number a fault of a kind is none to a command."""
        paths = [path for path in (self._aside / f"after {name}").rglob("*") if path.is_file()]
        largest = max(path.stat().st_size for path in paths)
        pages = sum(-(-path.stat().st_size // PAGE) for path in paths) + 2 * largest // PAGE
        return {"pages": pages, "size": largest, "call": 150}[kind]

    @property
    def own_disk(self) -> bool:
        """Whether the run lies on a file system of its own."""
        return self._disk.is_mount()

    def attempt(self, name: str, fault: Fault) -> bool:
        """Run a command on a disk with a fault, then on a sound one; whether it met the fault."""
        tally = self.tallies[name]
        what = f"{name}, {fault}"
        self._put_back(name)
        filler = self._disk / "filler"
        if fault.kind == "pages":
            _fill(filler, free=fault.number)
        code, text = self._said(name, fault.first)
        filler.unlink(missing_ok=True)
        if code not in (0, 1) or "Traceback" in text or (code == 1) != (len(SAYS.findall(text)) == 1):
            tally.wrong.append(f"{what}: exit code {code}: {text[-600:]}")
        tally.wrong += [f"{what}: {path}" for path in torn(self._home)]
        tally.ended, tally.went_on = tally.ended + (code == 1), tally.went_on + (code == 0)
        self._go_on(name, what, through=code == 0)
        return code == 1 or "can't be written" in text or "No space" in text

    def _said(self, name: str, first: Sequence[Any]) -> tuple[int, str]:
        """Run a command; its exit code and what it said. Into a pipe: a limit on files would cut a file short."""
        pipe, read = self._aside / "pipe", list[str]()
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
        reader.start()
        variables = {"DISK": str(self._home)}
        pid = self._forks.start(*self.commands()[name], output=pipe, first=first, variables=variables)
        code = self._forks.wait(pid)
        reader.join()
        pipe.unlink()
        return code, read[0]

    def _put_back(self, name: str) -> None:
        shutil.rmtree(self._home, ignore_errors=True)
        shutil.copytree(self._aside / f"before {name}", self._home)

    def _go_on(self, name: str, what: str, *, through: bool) -> None:
        tally = self.tallies[name]
        code, text = (0, "") if through else self._said(name, ())
        if code:
            tally.wrong.append(f"{what}: again: exit code {code}: {text[-600:]}")
            return
        after = RunDir(self._aside / f"after {name}" / self.run.path.relative_to(self._home))
        if left(self.run) != left(after):
            tally.wrong.append(f"{what}: it ended otherwise than a run that lacked nothing")


def frozen() -> dict[str, Any]:
    """Features of the frozen encoder are kept in the first epoch."""
    return {"class_path": "rslp.train.Freeze", "init_args": {"thaw_at_epoch": 1}}


def often(run: RunDir) -> dict[str, Any]:
    return {
        "class_path": "rslp.train.checkpoints.RunCheckpoints",
        "init_args": {"run_dir": str(run.path), "every_n_steps": 2},
    }


def left(run: RunDir) -> dict[str, str]:
    """What a run has left, as far as it has come."""
    found = left_by_run(run) if run.metrics.exists() else {}
    return found | {
        str(path.relative_to(run.path)): digest_of(path.read_bytes()) for path in run.predictions.rglob("*.*")
    }


def torn(home: Path) -> list[str]:
    """Files below a folder that nobody can use."""
    return [
        f"{path.relative_to(home)} is left over or torn"
        for path in sorted(home.rglob("*"))
        if path.is_file() and _torn(path)
    ]


def _torn(path: Path) -> bool:
    if ".tmp" in path.name or ".begun" in str(path):
        return True
    try:
        if path.suffix in (".json", ".geojson"):
            json.loads(path.read_bytes())
        elif path.suffix == ".ckpt":
            read_checkpoint(path)
        elif path.suffix in (".csv", ".jsonl", ".yaml"):
            text = path.read_text()
            return bool(text) and not text.endswith("\n")
        elif path.suffix == ".tif":
            import rasterio

            with rasterio.open(path) as raster:
                raster.read()
    except Exception:  # noqa: BLE001
        return True
    return False


def _fill(path: Path, *, free: int) -> None:
    """Take all pages of a file system but so many."""
    status = os.statvfs(path.parent)
    taken = status.f_bavail * status.f_frsize // PAGE - free
    with path.open("wb") as handle:
        if taken > 0:
            os.posix_fallocate(handle.fileno(), 0, taken * PAGE)


def sweep(harness: Harness, *, kinds: Sequence[str], every: int, rng: random.Random) -> None:
    """Try faults of some kinds at all commands: one in so many of those that there are."""
    for name in harness.commands():
        for kind in kinds:
            step = every * (512 if kind == "size" else 1)
            missed = 0
            for number in range(rng.randrange(step), harness.most(name, kind), step):
                missed = 0 if harness.attempt(name, Fault(kind, number, rng.choice(ERRORS))) else missed + 1
                if missed == _ENOUGH:
                    # The command needs no more room, or makes no more calls.
                    break
            tally = harness.tallies[name]
            sys.stderr.write(
                f"{name}, {kind}: {tally.ended} ended, {tally.went_on} went on, {len(tally.wrong)} wrong\n"
            )


def record(tallies: Mapping[str, Tally], *, every: int) -> str:
    """A page that says what came of the faults."""
    lines = [
        "# Disks that were full",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}. Written by `make test-long` (`tests/train/full_disk.py`).",
        "",
        "A small file system with so many free pages, a limit on the size of files, or an error (full, quota,",
        "read-only, failing) at the n-th call that opens, renames, links or syncs a file. Each command was then run",
        "again with room, and compared with a run that never lacked any: weights, optimiser, metrics, evaluations and",
        f"predictions. One in {every} of the faults that there are.",
        "",
        "| command | ended with one line, exit code 1 | went on without | torn, left over, or different in the end |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {t.ended} | {t.went_on} | {len(t.wrong)} |" for name, t in tallies.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=["pages", "size", "call"])
    words = parser.parse_args()
    with small_disk(words.folder / "disk", size=16 << 20) as disk, Forks() as forks:
        harness = Harness(disk, words.folder / "aside", forks)
        harness.prepare()
        sweep(harness, kinds=words.kinds, every=words.every, rng=random.Random(words.seed))
    wrong = [what for tally in harness.tallies.values() for what in tally.wrong]
    sys.stdout.write("\n".join([*wrong, record(harness.tallies, every=words.every)]))


if __name__ == "__main__":
    main()
