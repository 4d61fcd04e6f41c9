"""Joint runs killed again and again: ``python -m tests.train.kills FOLDER --kills 100 --seed 0``.

Each start is a process (or two) of its own that runs ``rslp.main helios run`` as any job does, with a
``PYTHONHASHSEED`` drawn anew (or one of a few, by turns), and is ended by a real SIGKILL, at a random time or at a
random write to the disk. A run is started again until it is done, then compared with one that was never interrupted,
then a run of the next set-up begins, until there have been enough kills. ``FOLDER/starts.jsonl`` lists every start, so
that one can be repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rslp.cli.main import main as rslp_main
from rslp.launch.processes import free_port
from rslp.rundir import RunDir
from rslp.train.checkpoints import read_checkpoint
from tests.tiny import run_config, write_dataset
from tests.train import two_sensors
from tests.train.ranks import ROOT, rank_variables
from tests.train.starts import digest_of

_POLL = 0.005
# Beside other work, a start may take long; longer than this it hangs.
_PATIENCE = 300.0
FREEZE = {
    "class_path": "rslearn.train.callbacks.freeze_unfreeze.FreezeUnfreeze",
    "init_args": {"module_selector": ["model", "encoder", 0], "unfreeze_at_epoch": 2, "unfreeze_lr_factor": 2},
}


@dataclass(frozen=True)
class SetUp:
    """What is trained: how the run config is made from a folder of data, in how many processes, how it anneals."""

    config: Callable[[Path], dict[str, Any]]
    world: int = 1
    scheduler: tuple[str, dict[str, Any]] = ("PlateauScheduler", {"patience": 0})


@dataclass
class Tally:
    """What came of the kills of one set-up.

    Attributes:
        at_times: kills at a random time.
        in_writes: kills before or after a random write to the disk: a flush or a rename of a checkpoint or of its like.
        runs: runs that were killed, went on, and ended.
        starts: processes that were started, each under a hash seed of its own.
        differences: what in them was otherwise than in the run that was never killed.
    """

    at_times: int = 0
    in_writes: int = 0
    runs: int = 0
    starts: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Kill:
    """When a process is killed: after seconds, from outside; or by itself at its n-th write, before it or after it."""

    rank: int = 0
    seconds: float | None = None
    write: int | None = None
    after: bool = False

    @classmethod
    def drawn(cls, rng: random.Random, *, longest: float, world: int) -> Kill:
        if rng.random() < 0.4:
            return cls(rank=rng.randrange(world), seconds=rng.uniform(0.0, longest))
        # The first process writes checkpoints and samples, the others features alone.
        rank = int(rng.random() < 0.2) % world
        return cls(rank=rank, write=rng.randint(1, 4 if rank else 30), after=rng.random() < 0.5)


def of_one_sensor(data: Path) -> dict[str, Any]:
    """Three tiny datasets, two workers, two batches a step, dropout, kept features, a thaw."""
    kinds = ("classify", "detect", "regress")
    for kind in kinds:
        if not (data / kind).exists():
            write_dataset(data / kind, kind, train=4, val=2, test=1)
    made = run_config({kind: (str(data / kind), kind) for kind in kinds}, epochs=3, dropout=0.2, num_workers=2)
    made["trainer"]["accumulate_grad_batches"] = 2
    made["trainer"]["enable_progress_bar"] = False
    return made


def of_two_sensors(data: Path) -> dict[str, Any]:
    """The example's datasets with Sentinel-2 and Sentinel-1, Helios, kept features, a thaw."""
    place = data / "two_sensors"
    if not place.exists():
        two_sensors.write_place(place)
    return two_sensors.run_config(place, "helios", workers=1, epochs=3)


SET_UPS = {
    "two sensors": SetUp(of_two_sensors),
    "one sensor": SetUp(of_one_sensor, scheduler=("CosineAnnealingScheduler", {"T_max": 3})),
    "two sensors, two ranks": SetUp(of_two_sensors, world=2),
}


def prepared(folder: Path, data: Path, set_up: SetUp) -> RunDir:
    """A run directory, ready to be started; a checkpoint at each step."""
    made = set_up.config(data)
    run = RunDir(folder / "projects" / "tests" / "killed")
    name, arguments = set_up.scheduler
    made["model"]["init_args"]["scheduler"] = {
        "class_path": f"rslearn.train.scheduler.{name}",
        "init_args": arguments,
    }
    # Each run has features of its own to compute: they go with the thaw.
    checkpoints = {"run_dir": str(run.path), "every_n_steps": 1}
    made["trainer"]["callbacks"] = [
        FREEZE,
        {"class_path": "rslp.train.checkpoints.RunCheckpoints", "init_args": checkpoints},
    ]
    run.path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(made, sort_keys=False))
    return run


class Interpreter:
    """A process that has imported everything and forks a run when it is told to: kills at random times hit the run.

    Attributes:
        returncode: of the run that was started last, when it has ended; negative: the signal that ended it.
    """

    def __init__(self, hash_seed: int) -> None:
        self.hash_seed = hash_seed
        self.returncode: int | None = 0
        self._pid = 0
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.train.kills", "--wait", "true"]
        # Without buffers: a line that is there is seen by `select`.
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def start(self, run: RunDir, kill: Kill | None, variables: Mapping[str, str]) -> None:
        """Start a run; ``kill``: at which write it is to kill itself."""
        write, after = (kill.write or 0, kill.after) if kill else (0, False)
        order = {"run": str(run.path), "write": write, "after": after, "variables": dict(variables)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._pid, self.returncode = self._said(), None

    def poll(self) -> int | None:
        """The exit code of the run, if it has ended."""
        if self.returncode is None and select.select([self._process.stdout], [], [], 0)[0]:
            self.returncode = self._said()
        return self.returncode

    def kill(self) -> int:
        """Kill the run; its exit code."""
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)
            self.returncode = self._said()
        return self.returncode or 0

    def end(self) -> None:
        """End it; its run, if there is one, has been killed before."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _said(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def start_runs() -> None:
    """Be an interpreter: for each line of orders say the run's process id, and its exit code when it has ended."""
    import rslp.cli.run
    import rslp.helios.model
    import rslp.train.fit  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _be(json.loads(line))
        print(pid, flush=True)  # noqa: T201
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201


def _be(order: Mapping[str, Any]) -> None:
    """Be a run; never returns."""
    run = RunDir(Path(order["run"]))
    os.environ.update(order["variables"])
    log = os.open(run.path.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["write"]:
        _die_at_write(order["write"], after=order["after"])
    code = 1
    try:
        code = rslp_main(["helios", "run", "--run_dir", str(run.path)])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_at_write(number: int, *, after: bool) -> None:
    """Make this process kill itself at one of its writes."""
    left, me = number, os.getpid()

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= os.getpid() == me
            if left == 0 and not after:
                os.kill(me, signal.SIGKILL)
            result = call(*args, **kwargs)
            if left == 0:
                os.kill(me, signal.SIGKILL)
            return result

        return called

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


class Starter:
    """Starts runs; the interpreters of the next start get ready while one is at work."""

    def __init__(self, folder: Path, rng: random.Random, *, hash_seeds: int | None = None) -> None:
        """``hash_seeds``: how many there are, by turns; each process has one of its own unless given."""
        self._log = folder / "starts.jsonl"
        self._rng = rng
        self._hash_seeds = hash_seeds
        self._ready: list[Interpreter] = []

    def attempt(self, run: RunDir, kill: Kill, world: int) -> int:
        """Start a run: 0 when it is done, -9 when it was killed.

        Raises:
            RuntimeError: it ended by itself, and not well.
        """
        self._more(self._hash_seeds or 2 * world)
        ranks, self._ready = self._ready[:world], self._ready[world:]
        port = free_port()
        try:
            for rank, interpreter in enumerate(ranks):
                variables = rank_variables(rank, world=world, port=port) if world > 1 else {}
                interpreter.start(run, kill if rank == kill.rank else None, variables)
            code = _ended(ranks, kill)
        finally:
            for interpreter in ranks:
                interpreter.kill()
                if self._hash_seeds is None:
                    interpreter.end()
        if self._hash_seeds is not None:
            self._ready += ranks
        seeds = [interpreter.hash_seed for interpreter in ranks]
        with self._log.open("a") as handle:
            handle.write(json.dumps({"run": str(run.path), "hash_seeds": seeds, **vars(kill), "code": code}) + "\n")
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{run.path} ended with {code}: {log_of(run)}")
        return code

    def _more(self, count: int) -> None:
        while len(self._ready) < count:
            self._ready.append(Interpreter(self._rng.randrange(2**32)))

    def close(self) -> None:
        """End those that wait."""
        for interpreter in self._ready:
            interpreter.end()


def _ended(ranks: Sequence[Interpreter], kill: Kill) -> int:
    """Wait for the end, and see to the kill: 0 when all ended well, -9 when the one to be killed was.

    Raises:
        TimeoutError: they hang.
    """
    victim, start = ranks[kill.rank], time.monotonic()
    while time.monotonic() - start < _PATIENCE:
        if kill.seconds is not None and time.monotonic() - start >= kill.seconds:
            return victim.kill()
        codes = [interpreter.poll() for interpreter in ranks]
        # Others fail when one of them dies.
        if victim.returncode == -signal.SIGKILL or None not in codes:
            return next((code for code in (victim.returncode, *codes) if code), 0)
        time.sleep(_POLL)
    raise TimeoutError("processes hang")


def log_of(run: RunDir) -> str:
    """The end of what a run said."""
    return (run.path.parent / "log").read_text()[-3000:]


def differences(run: RunDir, reference: RunDir) -> list[str]:
    """How a run that was killed ended otherwise than one that was not."""
    found = []
    for path in (reference.last, reference.best()):
        wanted, got = (read_checkpoint(of / path.name) for of in (reference.checkpoints, run.checkpoints))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            if digest_of(wanted.get(part)) != digest_of(got.get(part)):
                found.append(f"{path.name}: {part}")
    if run.metrics.read_text() != reference.metrics.read_text():
        found.append("metrics.csv")
    names = [{str(p.relative_to(of.path)) for p in of.path.rglob("*")} for of in (run, reference)]
    found += [f"file {name}" for name in sorted(names[0] ^ names[1])]
    return [f"{run.path}: {what}" for what in found]


class Torture:
    """Kills runs of several set-ups in turn, each compared with one of its set-up that is never killed."""

    def __init__(self, folder: Path, *, seed: int, starter: Starter) -> None:
        self._folder = folder
        self._rng = random.Random(seed)
        self._starter = starter
        self._references: dict[str, RunDir] = {}
        self._longest: dict[str, float] = {}
        self.tallies: dict[str, Tally] = {}

    def kills(self) -> int:
        """How many there were."""
        return sum(tally.at_times + tally.in_writes for tally in self.tallies.values())

    def run(self, name: str, *, kills: int) -> None:
        """Kill one run again and again, until it is done or there were so many kills in all; then let it end."""
        set_up, tally = SET_UPS[name], self.tallies.setdefault(name, Tally())
        reference = self._reference(name)
        run = prepared(self._folder / f"{name.replace(' ', '_')}-{tally.runs}", self._folder / "data", set_up)
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            more = self.kills() < kills
            kill = Kill.drawn(self._rng, longest=self._longest[name], world=set_up.world) if more else Kill()
            code = self._starter.attempt(run, kill, set_up.world)
            tally.starts += set_up.world
            tally.at_times += code != 0 and kill.seconds is not None
            tally.in_writes += code != 0 and kill.write is not None
            if code == 0 and kill.seconds is not None:
                # It came too late: on a busy machine, the run that was measured may have been a slow one.
                self._longest[name] = max(0.7 * self._longest[name], 2.0)
        tally.runs += 1
        tally.differences += differences(run, reference)

    def _reference(self, name: str) -> RunDir:
        """A run that nobody kills."""
        if name not in self._references:
            run = prepared(self._folder / f"{name.replace(' ', '_')}-reference", self._folder / "data", SET_UPS[name])
            begin = time.monotonic()
            self._starter.attempt(run, Kill(), SET_UPS[name].world)
            # The others find samples in the cache, and are faster.
            self._references[name], self._longest[name] = run, 0.7 * (time.monotonic() - begin)
        return self._references[name]


def torture(
    folder: Path, *, kills: int, seed: int, set_ups: Sequence[str], hash_seeds: int | None = None
) -> Iterator[dict[str, Tally]]:
    """Kill runs so many times in all; what came of it so far, by set-up, after each run.

    Raises:
        RuntimeError: a run ended by itself, and not well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starter = Starter(folder, random.Random(f"{seed} hashes"), hash_seeds=hash_seeds)
    torture = Torture(folder, seed=seed, starter=starter)
    try:
        for name in itertools.cycle(set_ups):
            torture.run(name, kills=kills)
            yield torture.tallies
            if torture.kills() >= kills:
                return
    finally:
        starter.close()


def versions(seed: int, script: str) -> str:
    """When, on which code and with what something was measured."""
    commit = subprocess.run(["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    # The page itself may have been written already, after the set-up before.
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "rslp", "tests"], cwd=ROOT).returncode
    names = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "rslearn", "olmoearth-pretrain-minimal")
    )
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit or 'unknown'}{'-dirty' if changed else ''}, seed {seed}; Python "
        f"{platform.python_version()}, {names}. Written by `make test-long` (`{script}`)."
    )


def record(tallies: Mapping[str, Tally], *, seed: int) -> str:
    """A page that says what came of the kills, when, and of which code."""
    lines = [
        "# Runs killed again and again",
        "",
        versions(seed, "tests/train/kills.py"),
        "",
        "Every start is a process of its own under a `PYTHONHASHSEED` drawn anew. Runs that were killed are compared",
        "with one that was not: weights and optimiser in `last.ckpt` and `best.ckpt`, `metrics.csv`, file names.",
        "",
        "| set-up | kills at random times | in writes | runs that ended | processes started | differences |",
        "|---|---|---|---|---|---|",
    ]
    rows = {**tallies, "all": _sum(tallies.values())}
    lines += [
        f"| {name} | {t.at_times} | {t.in_writes} | {t.runs} | {t.starts} | {len(t.differences)} |"
        for name, t in rows.items()
    ]
    return "\n".join(lines) + "\n"


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for one in tallies:
        for name, value in vars(one).items():
            setattr(total, name, getattr(total, name) + value)
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set_ups", nargs="+", default=list(SET_UPS), choices=list(SET_UPS))
    parser.add_argument("--record", type=Path, help="the page to write")
    parser.add_argument("--hash_seeds", type=int, help="so many, by turns; a new one for each start unless given")
    parser.add_argument("--wait", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.wait:
        start_runs()
        sys.exit()
    options = {"kills": given.kills, "seed": given.seed, "set_ups": given.set_ups, "hash_seeds": given.hash_seeds}
    for tallies in torture(given.folder, **options):
        sys.stdout.write(json.dumps({name: vars(tally) for name, tally in tallies.items()}) + "\n")
        sys.stdout.flush()
        if given.record:
            given.record.parent.mkdir(parents=True, exist_ok=True)
            given.record.write_text(record(tallies, seed=given.seed))
