"""One of two packers of a dataset killed, again and again: ``python -m tests.train.packers FOLDER --kills 50``.

The packers are forked from a process that has imported everything, so that a kill at a random time hits the packing
(or the waiting for it) and not the imports. Each is a session of its own, by which all that it leaves behind is found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rslp.data.cache import pack as cache_pack
from rslp.data.samples import SampleSource
from tests.data.cache.places import assert_same, direct, stored, write_places
from tests.train.kills import versions

# Enough for a pool of processes.
WINDOWS, WORKERS = 34, 2
ALLOWED = 10.0
# On a busy machine, the packer that was not killed may take long for its own work.
PATIENCE = 120.0


@dataclass
class Tally:
    """What came of the kills.

    Attributes:
        kills: how many there were.
        of_holders: packers that had the lock, and mostly a pool, when they were killed; the others waited, or began.
        left_over: processes of killed packers that were there 10 s later.
        slow_starts: next packers that did not come to their end within 10 s.
        failures: packers that failed, or gave arrays that differ from rslearn's.
        longest_end: s, until the last process of a killed packer was gone.
        longest_start: s, that a next packer took at most.
    """

    kills: int = 0
    of_holders: int = 0
    left_over: int = 0
    slow_starts: int = 0
    failures: list[str] = field(default_factory=list)
    longest_end: float = 0.0
    longest_start: float = 0.0


class Packer:
    """A process that does something with a dataset, in a session of its own."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                work()
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                os._exit(code)

    def session(self) -> list[int]:
        """The living processes of its session, pool and all."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == self.pid and fields[0] != "Z":
                found.append(int(path.parts[2]))
        return found

    def ended(self, patience: float) -> int | None:
        """Its exit code; None if it has not ended in time."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None

    def clear(self) -> None:
        """End all that is left of it."""
        for pid in self.session():
            os.kill(pid, signal.SIGKILL)


def pack(dataset: Path) -> None:
    """Pack slowly enough for kills to hit."""
    cache_pack.CHUNK, quick = 1, cache_pack.Packer.pack

    def slow(self: cache_pack.Packer, tasks: object) -> cache_pack.Packed:
        time.sleep(0.02)
        return quick(self, tasks)  # type: ignore[arg-type]

    cache_pack.Packer.pack = slow  # type: ignore[assignment,method-assign]
    stored(dataset, workers=WORKERS)


def samples(source: SampleSource) -> list[Any]:
    """All samples and targets of a dataset."""
    return [(source.identity(i), source.sample(i, draw=0), source.targets(i)) for i in range(len(source))]


def kill_one(dataset: Path, rng: random.Random, tally: Tally, *, longest: float, wanted: list[Any]) -> None:
    """Start two packers at once, kill one, and see what it leaves behind; ``wanted`` is what rslearn reads."""
    shutil.rmtree(dataset / ".rslp-store", ignore_errors=True)
    packers = [Packer(lambda: pack(dataset)) for _ in range(2)]
    # The first mostly comes first, and has a pool.
    victim, other = packers if rng.random() < 0.8 else reversed(packers)
    time.sleep(rng.uniform(0.05, longest))
    packed = len(victim.session()) > 1
    os.kill(victim.pid, signal.SIGKILL)
    began = time.monotonic()
    # One that was done by then was not killed.
    hit = os.waitpid(victim.pid, 0)[1] == signal.SIGKILL
    tally.kills += hit
    tally.of_holders += hit and packed
    try:
        while victim.session() and time.monotonic() - began < ALLOWED:
            time.sleep(0.01)
        tally.longest_end = max(tally.longest_end, time.monotonic() - began)
        tally.left_over += len(victim.session())
        if (code := other.ended(PATIENCE)) != 0:
            tally.failures.append(f"kill {tally.kills}: the other packer ended with {code}")
        again, began = Packer(lambda: stored(dataset, workers=WORKERS)), time.monotonic()
        if again.ended(ALLOWED) is None:
            tally.slow_starts += 1
            again.clear()
        tally.longest_start = max(tally.longest_start, time.monotonic() - began)
        compared = Packer(lambda: assert_same(samples(stored(dataset, workers=WORKERS)), wanted))
        if (code := compared.ended(PATIENCE)) != 0:
            tally.failures.append(f"kill {tally.kills}: arrays differ from rslearn's ({code})")
    finally:
        for packer in packers:
            packer.clear()


def torture(folder: Path, *, kills: int, seed: int) -> Tally:
    """Kill so many packers."""
    dataset, rng, tally = folder / "places", random.Random(seed), Tally()
    Packer(lambda: write_places(dataset, windows=WINDOWS)).ended(PATIENCE)
    began = time.monotonic()
    assert Packer(lambda: pack(dataset)).ended(PATIENCE) == 0
    longest, wanted = time.monotonic() - began, samples(direct(dataset))
    while tally.kills < kills:
        kill_one(dataset, rng, tally, longest=longest, wanted=wanted)
    return tally


def record(tally: Tally, *, seed: int) -> str:
    """A page that says what came of the kills, when, and of which code."""
    return f"""# Packers killed

{versions(seed, "tests/train/packers.py")}

Two packers of one dataset ({WINDOWS} windows, {WORKERS} processes each) at a time; one of them, drawn, ends by SIGKILL
at a random moment, while it packs, waits, or begins. "Left over": its processes that are there {ALLOWED:.0f} s later.
Then a next packer starts, and every sample is compared with what rslearn reads.

| kills | of which packed | left over | next starts over {ALLOWED:.0f} s | failures, or other arrays |
|---|---|---|---|---|
| {tally.kills} | {tally.of_holders} | {tally.left_over} | {tally.slow_starts} | {len(tally.failures)} |

The last process of a killed packer was gone after {tally.longest_end:.2f} s at most; a next packer took at most
{tally.longest_start:.1f} s.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="the page to write")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    outcome = torture(given.folder, kills=given.kills, seed=given.seed)
    sys.stdout.write(json.dumps(vars(outcome)) + "\n")
    if given.record:
        given.record.write_text(record(outcome, seed=given.seed))
