"""A joint run killed again and again: ``python -m tests.train.kills FOLDER --kills 100 --seed 0``.

Each attempt is a process of its own that runs ``rslp.main helios run`` as any job does, and is ended by a real SIGKILL,
at a random time or at a random write to the disk. Attempts are forked from this process, which has imported the
training stack once: importing it a hundred times over would take longer than everything else. A run is started again
until it is done, then compared with one that was never interrupted, then the next run begins, until there have been
enough kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rslp.main import main as rslp_main
from rslp.run import RunDir
from rslp.train.checkpoints import read_checkpoint
from rslp.train.cli import build
from tests.tiny import run_config, write_dataset, write_run

_POLL = 0.001
_PATIENCE = 120.0


@dataclass
class Tally:
    """What came of the kills.

    Attributes:
        at_times: kills at a random time.
        in_writes: kills before or after a random write to the disk: a flush or a rename of a checkpoint or of its like.
        runs: runs that were killed, went on, and ended.
        differences: what in them was otherwise than in the run that was never killed.
    """

    at_times: int = 0
    in_writes: int = 0
    runs: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.at_times + self.in_writes


@dataclass(frozen=True)
class Kill:
    """When a process is killed: after seconds, from outside; or by itself at its n-th write, before it or after it."""

    seconds: float | None = None
    write: int | None = None
    after: bool = False

    @classmethod
    def drawn(cls, rng: random.Random, *, longest: float) -> Kill:
        if rng.random() < 0.4:
            return cls(seconds=rng.uniform(0.0, longest))
        return cls(write=rng.randint(1, 30), after=rng.random() < 0.5)


def config(data: Path) -> dict[str, Any]:
    """Three datasets, two workers, two batches a step, dropout, kept features, a thaw, a checkpoint at each step."""
    kinds = ("classify", "detect", "regress")
    for kind in kinds:
        if not (data / kind).exists():
            write_dataset(data / kind, kind, train=4, val=2, test=1)
    # Each attempt at a run has features of its own to compute: they go with the thaw.
    made = run_config(
        {kind: (str(data / kind), kind) for kind in kinds}, epochs=3, dropout=0.2, num_workers=2, frozen_views=1
    )
    made["model"]["init_args"]["scheduler"] = {
        "class_path": "rslearn.train.scheduler.CosineAnnealingScheduler",
        "init_args": {"T_max": 3},
    }
    made["trainer"]["accumulate_grad_batches"] = 2
    made["trainer"]["enable_progress_bar"] = False
    return made


def prepared(folder: Path, data: Path) -> RunDir:
    """A run directory, ready to be started."""
    made = config(data)
    run = RunDir(folder / "projects" / "tests" / "tiny")
    made["trainer"]["callbacks"] = [
        {
            "class_path": "rslearn.train.callbacks.freeze_unfreeze.FreezeUnfreeze",
            "init_args": {"module_selector": ["model", "encoder", 0], "unfreeze_at_epoch": 2, "unfreeze_lr_factor": 2},
        },
        {
            "class_path": "rslp.train.checkpoints.RunCheckpoints",
            "init_args": {"run_dir": str(run.path), "every_n_steps": 1},
        },
    ]
    return write_run(folder, made)


def attempt(run: RunDir, kill: Kill) -> int:
    """Start the run in a process of its own; how it ended: an exit code, or a signal's number, negative."""
    child = os.fork()
    if child == 0:
        _be_the_run(run, kill)
    start = time.monotonic()
    limit = _PATIENCE if kill.seconds is None else kill.seconds
    while time.monotonic() - start < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if kill.seconds is None:
        raise TimeoutError(f"{run.path} hangs: {log_of(run)}")
    return os.waitstatus_to_exitcode(status)


def log_of(run: RunDir) -> str:
    return (run.path.parent / "log").read_text()[-3000:]


def _be_the_run(run: RunDir, kill: Kill) -> None:
    """Become the run; never returns."""
    log = os.open(run.path.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if kill.write is not None:
        _die_at_write(kill)
    code = 1
    try:
        code = rslp_main(["helios", "run", "--run_dir", str(run.path)])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_at_write(kill: Kill) -> None:
    """Make this process kill itself at one of its writes."""
    left, me = kill.write or 0, os.getpid()

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= os.getpid() == me
            if left == 0 and not kill.after:
                os.kill(me, signal.SIGKILL)
            result = call(*args, **kwargs)
            if left == 0:
                os.kill(me, signal.SIGKILL)
            return result

        return called

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


def differences(run: RunDir, reference: RunDir) -> list[str]:
    """How a run that was killed ended otherwise than one that was not."""
    found = []
    for path in (reference.last, reference.best()):
        a, b = (read_checkpoint(of / path.name)["state_dict"] for of in (reference.checkpoints, run.checkpoints))
        odd = [name for name in a if not torch.equal(a[name], b[name])]
        found += [f"{path.name}: {', '.join(odd)}"] if odd or a.keys() != b.keys() else []
    if run.metrics.read_text() != reference.metrics.read_text():
        found.append("metrics.csv")
    names = [{str(p.relative_to(of.path)) for p in of.path.rglob("*")} for of in (run, reference)]
    found += [f"file {name}" for name in sorted(names[0] ^ names[1])]
    return [f"{run.path}: {what}" for what in found]


def torture(folder: Path, *, kills: int, seed: int) -> Tally:
    """Kill runs so many times.

    Raises:
        RuntimeError: a run ended by itself, and not well.
    """
    data, tally, rng = folder / "data", Tally(), random.Random(seed)
    reference = prepared(folder / "reference", data)
    build(reference, training=True)  # imports what the config names, once for all attempts
    begin = time.monotonic()
    if attempt(reference, Kill()) != 0:
        raise RuntimeError(log_of(reference))
    longest = time.monotonic() - begin
    while tally.kills < kills:
        run = prepared(folder / f"run{tally.runs}", data)
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            kill = Kill.drawn(rng, longest=longest) if tally.kills < kills else Kill()
            code = attempt(run, kill)
            tally.at_times += code == -signal.SIGKILL and kill.seconds is not None
            tally.in_writes += code == -signal.SIGKILL and kill.write is not None
        if code != 0:
            raise RuntimeError(f"exit code {code}: {log_of(run)}")
        tally.runs += 1
        tally.differences += differences(run, reference)
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.stdout.write(json.dumps(vars(torture(given.folder, kills=given.kills, seed=given.seed))) + "\n")
