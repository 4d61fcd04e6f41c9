"""What a run directory has for a report, each file read once; damage becomes a note."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rslp.errors import RunError, UserError
from rslp.evaluate.details import TaskDetails, read_details
from rslp.evaluate.rows import Evaluation, MetricRow
from rslp.evaluate.samples import ShownSample, read_samples
from rslp.io import read_json, read_yaml
from rslp.rundir import RunDir
from rslp.study.results import read_evaluation

Content = TypeVar("Content")
Key = tuple[str, str]
Series = tuple[list[int], list[float]]
# Splits in the order in which one of them is taken for the details.
SPLITS = ("test", "val")


@dataclass(frozen=True)
class EvaluatedSplit:
    """One evaluation with its predictions and samples.

    Attributes:
        evaluation: its rows of metrics.
        details: its predictions by (dataset, task); none where the file is missing.
        samples: the samples that are shown.
    """

    evaluation: Evaluation
    details: dict[Key, TaskDetails]
    samples: list[ShownSample]

    @property
    def primary(self) -> list[MetricRow]:
        """The rows of the primary metrics."""
        return [row for row in self.evaluation.rows if row.primary]


@dataclass
class RunContents:
    """The files of a run.

    Attributes:
        run: the run directory.
        notes: a line for each damaged file.
        config: the run config; empty without one.
        state: ``state.json``.
        done: ``DONE.json``; None while the run is unfinished.
        series: steps and values of each name in ``metrics.csv``.
        splits: the evaluations of one checkpoint by split.
        windows: rows of ``windows.parquet``.
    """

    run: RunDir
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] | None = None
    series: dict[str, Series] = field(default_factory=dict)
    splits: dict[str, EvaluatedSplit] = field(default_factory=dict)
    windows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, run: RunDir) -> RunContents:
        """Read the files."""
        found = cls(run)
        found.config = found.tried(lambda: dict(read_yaml(run.config).data), {})
        found.state = run.read_state(found.notes)
        found.done = found.tried(lambda: dict(run.done() or {}) or None, None)
        for step, _, name, value in run.logged(found.notes):
            steps, values = found.series.setdefault(name, ([], []))
            steps.append(int(step))
            values.append(float(value))
        found.splits = {split: one for split in SPLITS if (one := found._split(split)) is not None}
        if run.windows.is_file():
            found.windows = found.tried(partial(_read_rows, run.windows), found.windows)
        return found

    def tried(self, read: Callable[[], Content], otherwise: Content) -> Content:
        """What a function reads; damage, which must not hide the rest of the report, becomes a note."""
        try:
            return read()
        except (UserError, OSError, ValueError) as error:
            self.notes.append(" ".join(str(error).split()))
            return otherwise

    def json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the directory; empty where it is missing."""
        path = self.run.path / name
        return self.tried(lambda: dict(read_json(path) or {}), {}) if path.is_file() else {}

    def text(self, name: str) -> str:
        """The content of a text file of the directory; empty where it is missing."""
        path = self.run.path / name
        return self.tried(lambda: path.read_text(errors="replace"), "") if path.is_file() else ""

    def _split(self, split: str) -> EvaluatedSplit | None:
        """The evaluation of the best checkpoint, or else of the one that was evaluated last."""
        others = sorted(self.run.evaluations(split), key=lambda path: path.stat().st_mtime)
        best = [self.run.evaluation(split, self.run.best().stem), self.run.evaluation(split), *others[::-1]]
        path = next((path for path in best if path.is_file()), None)
        if path is None:
            return None
        evaluation = self.tried(partial(read_evaluation, path), None)
        if evaluation is None:
            return None
        details: dict[Key, TaskDetails] = {}
        if (table := path.with_suffix(".parquet")).is_file():
            details = self.tried(partial(read_details, table, checkpoint_sha256=evaluation.checkpoint_sha256), {})
        samples: list[ShownSample] = []
        if (file := path.with_suffix(".npz")).is_file():
            samples = self.tried(partial(read_samples, file), [])
        return EvaluatedSplit(evaluation, details, samples)

    @property
    def shown(self) -> EvaluatedSplit | None:
        """The evaluation whose details are shown: of the test split, or else of the validation split."""
        return next(iter(self.splits.values()), None)

    def datasets(self) -> list[str]:
        """The names of the datasets that take part."""
        init = (self.config.get("data") or {}).get("init_args") or {}
        disabled = set(init.get("disabled_datasets") or ())
        return [name for name in sorted(init.get("data_modules") or {}) if name not in disabled]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(path.read_bytes())).to_pylist()
        return rows
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path} is damaged, or can't be read: {error}") from error


def name_of(dataset: str, task: str) -> str:
    """A task's name in the report."""
    return dataset if dataset == task else f"{dataset} / {task}"
