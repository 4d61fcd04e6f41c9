"""Evaluation rows: the one format that tables, comparisons and reports are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rslp.train.metrics import TaskResult

SCHEMA = 1
# Metrics whose name ends in one of these are errors: less is better.
_ERRORS = ("mse", "rmse", "l1", "mae", "mape", "loss")


@dataclass(frozen=True)
class Row:
    """One value of one metric.

    Attributes:
        dataset: the dataset's key.
        task: the task's name.
        metric: as logged.
        value: of the model.
        n: samples that it was computed from.
        floor: value of the best constant prediction, for the primary metric; None for others.
        higher_is_better: direction.
        primary: whether checkpoints are selected by it.
        class_name: for a value of one class alone; written as ``class``.
        low: lower end of the value's confidence interval; None while none is computed.
        high: its upper end.
    """

    dataset: str
    task: str
    metric: str
    value: float
    n: int
    floor: float | None
    higher_is_better: bool
    primary: bool
    class_name: str | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What one split says of one checkpoint.

    Attributes:
        run: ``project/experiment``.
        split: ``val`` or ``test``.
        checkpoint: its path, relative to the run directory where it lies inside.
        checkpoint_sha256: its hash.
        step: optimiser steps it was trained for.
        commit: git commit of the code, None outside a checkout.
        data_fingerprint: hash over the samples' identities.
        score: mean normalised score of the tasks.
        faults: the samples that could not be used and are in no value, with what is wrong with each.
        rows: the values.
    """

    run: str
    split: str
    checkpoint: str
    checkpoint_sha256: str
    step: int
    commit: str | None
    data_fingerprint: str
    score: float | None
    faults: tuple[str, ...]
    rows: tuple[Row, ...]

    def json(self) -> str:
        """The text of ``eval/<split>.json``."""
        content = asdict(self)
        for row in content["rows"]:
            row["class"] = row.pop("class_name")
        return json.dumps({"schema": SCHEMA, **content}, indent=1) + "\n"


def rows_of(results: Mapping[tuple[str, str], TaskResult]) -> tuple[Row, ...]:
    """Rows of all tasks; each task's primary metric comes first."""
    rows: list[Row] = []
    for (dataset, task), result in sorted(results.items()):
        names: Sequence[str] = sorted(result.values, key=lambda name: (name != result.primary, name))
        rows += [_row(dataset, task=task, metric=name, result=result) for name in names]
    return tuple(rows)


def _row(dataset: str, *, task: str, metric: str, result: TaskResult) -> Row:
    primary = metric == result.primary
    return Row(
        dataset=dataset,
        task=task,
        metric=metric,
        value=result.values[metric],
        n=result.n,
        floor=result.floor if primary else None,
        higher_is_better=not metric.lower().endswith(_ERRORS),
        primary=primary,
    )
