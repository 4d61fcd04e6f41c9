"""Parts of the start benchmark: what ends a run after its first step, and a repair of rslearn 0.1.19.

The repair is the smallest with which it trains on several datasets.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
from rslearn.models.component import FeatureExtractor, IntermediateComponent, Predictor
from rslearn.models.multitask import MultiTaskModel

_TICKS = os.sysconf("SC_CLK_TCK")


class FirstStep(L.Callback):
    """Notes time and CPU seconds of the process and its workers after the first optimiser step, and ends them all.

    Args:
        out: the file for the note.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ARG002
        """Write and leave."""
        own, workers = os.getpid(), _children()
        cpu = sum(_cpu(pid) for pid in (own, *workers))
        self.out.write_text(json.dumps({"time": time.time(), "cpu": cpu}))
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def _children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def _cpu(pid: int) -> float:
    """User and system seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


class RepairedMultiTaskModel(MultiTaskModel):
    """Lazy decoding reads a mapping that only a subclass of another purpose sets."""

    def __init__(
        self,
        encoder: list[FeatureExtractor | IntermediateComponent],
        decoders: dict[str, list[IntermediateComponent | Predictor]],
        lazy_decode: bool = True,
    ) -> None:
        super().__init__(encoder, decoders, lazy_decode)
        self.target_to_decoder: dict[str, str] = {}
