"""Several processes of a job on this machine, without a starter: what torchrun would set is set here."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tests.children import Python

ROOT = Path(__file__).parents[2]
TIMEOUT = 500


def rank_variables(rank: int, *, world: int, port: int) -> dict[str, str]:
    """What torchrun would set for one of the processes of a job on this machine."""
    shared = {"RSLP_RANKS": "torchrun", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return {**shared, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def start_ranks(
    command: Sequence[str], *, world: int, environment: Callable[[int], Mapping[str, str]] | None = None
) -> list[subprocess.Popen[str]]:
    """Start ``python command…`` once per rank; forked from this process unless variables of a rank's own are given.

    Those may be what only an interpreter of its own takes notice of.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words, pipes = [sys.executable, *command], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    variables = [{**shared, **rank_variables(rank, world=world, port=port)} for rank in range(world)]
    if environment is None:
        return [Python(words, env=of_rank, **pipes) for of_rank in variables]
    of_its_own = [{**of_rank, **environment(rank)} for rank, of_rank in enumerate(variables)]
    return [subprocess.Popen(words, env=of_rank, text=True, **pipes) for of_rank in of_its_own]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for all; exit code and output of each. None may hang."""
    end = time.monotonic() + TIMEOUT
    try:
        outputs = [p.communicate(timeout=max(1, end - time.monotonic()))[0] for p in processes]
        return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train_on(world: int, runs: Sequence[Path]) -> None:
    """Train in several processes, one run after the other, and evaluate the last one's last checkpoint."""
    ended = finish(start_ranks(["-m", "tests.train.ranks", *map(str, runs)], world=world))
    assert [code for code, _ in ended] == [0] * world, "\n".join(output[-3000:] for _, output in ended)


class Drawn(Callback):
    """Writes down which windows each step of each rank is made of."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = [(part.dataset, [m.window_name for m in part.metadatas]) for part in batch]
        with self.path.with_suffix(f".{trainer.world_size}-{trainer.global_rank}").open("a") as handle:
            handle.write(json.dumps(step) + "\n")


class Terminate(Callback):
    """A scheduler warns one process alone, in the middle of a step or of a validation."""

    def __init__(self, rank: int, step: int, validating: bool = False) -> None:
        self.rank, self.step, self.validating = rank, step, validating

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.validating:
            self._warn(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.validating:
            self._warn(trainer)

    def _warn(self, trainer: Trainer) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    from rslp.evaluate.evaluation import evaluate
    from rslp.rundir import RunDir
    from rslp.train.fit import fit
    from tests.train.starts import SHUFFLED, shuffle_listings

    if SHUFFLED in os.environ:
        shuffle_listings(os.environ[SHUFFLED])
    for path in sys.argv[1:]:
        run = RunDir(Path(path))
        if code := fit(run):
            sys.exit(code)
    evaluate(run, splits=("val",), checkpoint=str(run.last))
