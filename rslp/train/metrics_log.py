"""The logger that needs no account: every value in one CSV file, ``step,epoch,name,value``."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from rslp.files import append, write_atomic
from rslp.run import RunDir

_HEADER = ("step", "epoch", "name", "value")


class MetricsLog(Logger):
    """Appends logged values to ``metrics.csv``.

    One value a row: new names need no new columns, so a resumed run only appends, after dropping the rows that lie
    beyond the checkpoint it goes on from.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)
        self._epoch = 0.0

    @property
    def name(self) -> str:
        """Of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """One file a run, so no versions."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append values.

        Args:
            metrics: values by name; Lightning adds ``epoch``.
            step: optimiser steps so far.
        """
        self._epoch = metrics.get("epoch", self._epoch)
        rows = [(step, int(self._epoch), name, value) for name, value in metrics.items() if name != "epoch"]
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        if not self._path.exists() or not self._path.stat().st_size:
            writer.writerow(_HEADER)
        writer.writerows(rows)
        append(self._path, text.getvalue().encode())

    @rank_zero_only
    def rewind(self, step: int) -> str:
        """Drop the rows of steps that will be trained again; a damaged file is set aside, and its sound rows are kept.

        Args:
            step: optimiser steps of the checkpoint that the run goes on from.

        Returns:
            what was damaged, in a line; empty if nothing was.
        """
        run, notes = RunDir(self._path.parent), list[str]()
        rows, state = run.logged(notes), run.read_state()
        if not self._path.exists():
            return "".join(notes)
        if state:
            # After a kill right below, what it says of the log would be wrong.
            run.write_state(**state | {"log_bytes": None, "log_crc32": None})
        aside = self._path.with_name(f"{self._path.name}.damaged")
        if notes:
            self._path.replace(aside)
        text = io.StringIO(newline="")
        csv.writer(text).writerows([_HEADER, *(row for row in rows if int(row[0]) < step)])
        # At once: a kill in the middle of it would lose what the run has logged so far.
        write_atomic(self._path, text.getvalue())
        return f"{notes[0]}; they stay, and the file as it was is {aside.name}" if notes else ""
