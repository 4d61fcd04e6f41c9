"""The job: what to execute, the same on every engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rslp.run import RunDir

Mode = Literal["fit", "validate", "test", "predict"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Job:
    """One run in one mode.

    Attributes:
        run: the run directory; everything the job needs is in it.
        mode: fit trains (or goes on training); validate and test evaluate a checkpoint.
        checkpoint: the checkpoint to evaluate; None means the best one.
    """

    run: RunDir
    mode: Mode
    checkpoint: str | None = None

    def command(self, python: str) -> tuple[str, ...]:
        """The words of the job's command line.

        Args:
            python: the interpreter to start.
        """
        words = (python, "-m", "rslp.main", "helios", "run", "--run_dir", str(self.run.path), "--mode", self.mode)
        return words if self.checkpoint is None else (*words, "--checkpoint", self.checkpoint)
