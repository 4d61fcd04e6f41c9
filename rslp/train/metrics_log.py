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
    def rewind(self, step: int) -> None:
        """Drop the rows of steps that will be trained again.

        Args:
            step: optimiser steps of the checkpoint that the run goes on from.
        """
        if not self._path.exists():
            return
        with self._path.open(newline="", encoding="utf-8", errors="replace") as handle:
            rows = [row for row in csv.DictReader(handle) if _is_before(row, step)]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, _HEADER)
        writer.writeheader()
        writer.writerows(rows)
        # At once: a kill in the middle of it would lose what the run has logged so far.
        write_atomic(self._path, text.getvalue())


def _is_before(row: Mapping[str, str | None], step: int) -> bool:
    """Whether a row is of an earlier step, and whole: a kill may have cut the last one short."""
    return None not in row.values() and (row["step"] or "").isdigit() and int(row["step"] or 0) < step
