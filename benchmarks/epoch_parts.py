"""Parts of the epoch benchmark: what notes how long training epochs take, and data that cost nothing to read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L

from rslp.train import MultiDatasetDataModule

_TICKS = os.sysconf("SC_CLK_TCK")


class EpochTimes(L.Callback):
    """Notes for each training epoch its samples, wall seconds, and CPU seconds of the process and its workers.

    An epoch ends with its last optimiser step; the first begins before its workers start.

    Args:
        out: the file for the notes, JSON.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.epochs: list[dict[str, float]] = []
        self._samples = 0
        self._start = (0.0, 0.0)
        self._end = (0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ARG002
        """The first epoch begins."""
        self._start = self._now()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *args: Any) -> None:  # noqa: ARG002
        """Count, for both kinds of batches."""
        inputs = [part.inputs for part in batch] if isinstance(batch, list) else [batch[0]]
        self._samples += sum(map(len, inputs))

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ARG002
        """Note what the epoch took."""
        self._end = self._now()
        wall, cpu = (end - start for end, start in zip(self._end, self._start, strict=True))
        self.epochs.append({"samples": self._samples, "wall": wall, "cpu": cpu})
        self.out.write_text(json.dumps(self.epochs))
        self._samples = 0

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ARG002
        """A later epoch begins; between two lies the validation."""
        if self.epochs:
            self._start = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), sum(map(cpu_seconds, (os.getpid(), *children())))


class ReadyDataModule(MultiDatasetDataModule):
    """From the second epoch on, all batches are in memory, those of the first one: what is left is the model."""

    def train_dataloader(self) -> Any:
        """A loader that has read everything."""
        return Ready(super().train_dataloader())


class Ready:
    """A loader that reads another one once.

    Args:
        loader: the other one.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._steps: list[Any] = []

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """The steps, read in the first epoch."""
        self._steps = self._steps or list(self._loader)
        yield from self._steps


def children() -> list[int]:
    """The process ids of this process's children."""
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS
