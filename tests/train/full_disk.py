"""A disk that is full, over its quota or failing at any write of a run: ``python -m tests.train.full_disk FOLDER``.

Every command of a run (stage 1, launches into a queue and into the background, pack, fit, test, predict) is given a
disk with too little room: a small file system of its own with so many free pages, a limit on the size of files, or an
error at its n-th opening, renaming, linking or syncing of a file. It has to end with exit code 1 and one line that
names a file and the room, or to go on without what it does not need; nothing it leaves may be torn, and no job may be
at work that it says it could not start. Given room, the same command ends as one that never lacked any.
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
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from rslp.io import read_json
from rslp.rundir import RunDir
from rslp.train.checkpoints import read_checkpoint
from tests.forks import Forks
from tests.tiny import run_config, write_dataset
from tests.train.starts import digest_of, left_by_run

PAGE = 4096
_ENOUGH = 20
HERE = "tests.train.full_disk"
SAYS = re.compile(
    r"^error: (/.* can't be (read or )?written: .* bytes free in /.*\)"
    r"|.* would take .* more, .* are free, and half .*)$",
    re.MULTILINE,
)
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


# A scheduler that takes every job, and a Python that does nothing for a while: folders say what was asked of them.
PROGRAMS = {
    "sbatch": '[ "$1" = --parsable ] && mkdir "$ASIDE/jobs/submitted" && echo 42',
    "scancel": 'rmdir "$ASIDE/jobs/submitted"',
    "python": 'mkdir "$ASIDE/jobs/$$"; exec sleep 60',
}


def begin(fault: Mapping[str, Any], python: str | None) -> None:
    """What a command calls first: from now on the disk has a fault, and jobs in the background are another program."""
    sys.executable = python or sys.executable
    if fault["kind"] == "size":
        limit_files(fault["number"])
    if fault["kind"] == "call":
        fail_at(fault["number"], fault["error"])


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
        self._programs, self._jobs = aside / "programs", aside / "jobs"
        self.tallies = {name: Tally() for name in self.commands()}

    def commands(self) -> dict[str, tuple[str, ...]]:
        """The commands of a run, in their order."""
        job = ("run", "--run_dir", str(self.run.path), "--mode")
        config = f"--config_paths+={self.run.config}"
        launch = ("launch_finetune", "--rslp_project", "tests", config, "--check", "false", "--experiment_id")
        return {
            "compose": ("make_multidataset_config", "--cfg", str(self._home / "multi.yaml")),
            "launch": (*launch, "queued", "--engine", "slurm"),
            "detach": (*launch, "away", "--local", "true", "--detach", "true"),
            "pack": ("pack", config),
            **{mode: (*job, mode) for mode in ("fit", "test", "predict")},
        }

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
        self._make_stage_1(data)
        self._programs.mkdir()
        self._jobs.mkdir()
        for name, text in PROGRAMS.items():
            (self._programs / name).write_text(f"#!/bin/sh\n{text}\nexit 0\n")
            (self._programs / name).chmod(0o755)
        for name in self.commands():
            shutil.copytree(self._home, self._aside / f"before {name}")
            code, text = self._said(name, None)
            assert code == 0, text
            assert self._at_work() or name not in ("launch", "detach")
            shutil.copytree(self._home, self._aside / f"after {name}")

    def _make_stage_1(self, data: Mapping[str, tuple[str, str]]) -> None:
        """The configs that stage 1 would make such a run of."""
        base = run_config({})
        del base["model"]["init_args"]["task"]
        multi = {"base_cfg": "base.yaml", "output_path": "OUT.yaml", "dataset_cfgs": [f"{name}.yaml" for name in data]}
        configs = {"base": base, "multi": multi}
        for name, place in data.items():
            one = run_config({name: place})
            configs[name] = {"model": one["model"], "data": one["data"]["init_args"]["data_modules"][name]}
        for name, config in configs.items():
            (self._home / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

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
            fill(filler, free=fault.number)
        code, text = self._said(name, fault)
        filler.unlink(missing_ok=True)
        if self._at_work() != (code == 0 and name in ("launch", "detach")):
            tally.wrong.append(f"{what}: exit code {code}, and the job is {'' if code else 'not '}at work")
        if code not in (0, 1) or "Traceback" in text or (code == 1) != (len(SAYS.findall(text)) == 1):
            tally.wrong.append(f"{what}: exit code {code}: {text[-600:]}")
        tally.wrong += [f"{what}: {path}" for path in torn(self._home)]
        tally.ended, tally.went_on = tally.ended + (code == 1), tally.went_on + (code == 0)
        self._go_on(name, what, through=code == 0)
        return code == 1 or "can't be written" in text or "No space" in text

    def train_into(self, log: Path) -> None:
        """Train with an output that is a file, which may be on a full disk: it must not matter."""
        self._put_back("fit")
        assert self._forks.run(*self.commands()["fit"], output=log) == 0
        assert left(self._home) == left(self._aside / "after fit")

    def _at_work(self) -> bool:
        """Whether a job was left to a scheduler, or in the background; it is ended."""
        # A program that was told to end does so a moment later.
        time.sleep(0.3 * any(self._jobs.iterdir()))
        lives = False
        for job in self._jobs.iterdir():
            job.rmdir()
            with suppress(ProcessLookupError):
                if job.name.isdigit():
                    os.kill(int(job.name), signal.SIGKILL)
                lives = True
        return lives

    def _said(self, name: str, fault: Fault | None) -> tuple[int, str]:
        """Run a command; its exit code and what it said. Into a pipe: a limit on files would cut a file short."""
        pipe, read = self._aside / "pipe", list[str]()
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
        reader.start()
        path = f"{self._programs}:{os.environ['PATH']}"
        variables = {"DISK": str(self._home), "ASIDE": str(self._aside), "PATH": path, "RSLP_PREFIX": str(self._home)}
        python = str(self._programs / "python") if name == "detach" else None
        first = [f"{HERE}:begin", asdict(fault or Fault("none", 0)), python]
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
        code, text = (0, "") if through else self._said(name, None)
        if code:
            tally.wrong.append(f"{what}: again: exit code {code}: {text[-600:]}")
            return
        self._at_work()
        if left(self._home) != left(self._aside / f"after {name}"):
            tally.wrong.append(f"{what}: it ended otherwise than a run that lacked nothing")


def frozen() -> dict[str, Any]:
    """Features of the frozen encoder are kept in the first epoch."""
    return {"class_path": "rslp.train.Freeze", "init_args": {"thaw_at_epoch": 1}}


def often(run: RunDir) -> dict[str, Any]:
    return {
        "class_path": "rslp.train.checkpoints.RunCheckpoints",
        "init_args": {"run_dir": str(run.path), "every_n_steps": 2},
    }


def left(home: Path) -> dict[str, str]:
    """What the commands have left, as far as they have come."""
    run = RunDir(home / "projects" / "tests" / "tiny")
    found = left_by_run(run) if run.metrics.exists() else {}
    found |= {path.name: digest_of(path.read_bytes()) for path in home.glob("OUT.*")}
    for other in sorted(run.path.parent.glob("[!t]*")):
        config, job = other / "config.yaml", read_json(other / "job.json") or {}
        found[f"{other.name}/config"] = digest_of(config.read_bytes()) if config.exists() else ""
        found[f"{other.name}/job"] = f"{job.get('engine')} {job.get('plan')}"
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


def fill(path: Path, *, free: int) -> None:
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
        "again with room, and compared with a run that never lacked any: configs, records of jobs, weights, optimiser,",
        f"metrics, evaluations and predictions. One in {every} of the faults that there are. `compose` is stage 1;",
        "`launch` submits to a scheduler, `detach` starts a run in the background: a job that could not be noted must",
        "not be at work.",
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
