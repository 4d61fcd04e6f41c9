"""Evaluation rows: the one format that tables, comparisons and reports are made from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rslp.errors import RunError
from rslp.train.metrics import THRESHOLD, TaskResult

SCHEMA = 2
# Metrics whose name ends in one of these are errors: less is better.
_ERRORS = ("mse", "rmse", "l1", "mae", "mape", "loss")
# Names of schema 1.
_FORMER = {"faults": "bad_samples"}


@dataclass(frozen=True)
class MetricRow:
    """One value of one metric.

    Attributes:
        dataset: the dataset's key.
        task: the task's name.
        metric: as logged.
        value: of the model; None where the split has no label to compute it from, or it is no finite number.
        n: windows with a valid label: what it was computed from.
        floor: value of the best constant prediction, for the primary metric; None for others.
        higher_is_better: direction; None for what is no measure of quality, such as a threshold.
        primary: whether checkpoints are selected by it.
        class_name: for a value of one class alone; written as ``class``.
        low: lower end of the value's confidence interval; None while none is computed.
        high: its upper end.
        interval: what the interval was drawn over: ``window`` or ``block``; None without one.
        n_windows: windows that were evaluated, also those without a valid label.
        valid_share: share of their label pixels (for labels of whole samples, of the samples) that are valid.
        classes: the classes that the value is a mean over, of primary metrics.
    """

    dataset: str
    task: str
    metric: str
    value: float | None
    n: int
    floor: float | None
    higher_is_better: bool | None
    primary: bool
    class_name: str | None = None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    n_windows: int | None = None
    valid_share: float | None = None
    classes: tuple[str, ...] | None = None


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
        bad_samples: the samples that could not be used and are in no value, with what is wrong with each.
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
    bad_samples: tuple[str, ...]
    rows: tuple[MetricRow, ...]

    def json(self) -> str:
        """The text of ``eval/<checkpoint>/<split>.json``."""
        content = asdict(self)
        for row in content["rows"]:
            row["class"] = row.pop("class_name")
        return json.dumps({"schema": SCHEMA, **content}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> Evaluation:
        """Read what ``json`` wrote, or what a version with schema 1 did; what that lacks is None.

        Raises:
            RunError: it is damaged, or of a schema that is not known.
        """
        try:
            content = json.loads(text)
            if content["schema"] not in (1, SCHEMA):
                raise RunError(f"evaluation rows of schema {content['schema']}; this version knows 1 and {SCHEMA}")
            rows = tuple(_parsed(row) for row in content.pop("rows"))
            content = {_FORMER.get(key, key): value for key, value in content.items() if key != "schema"}
            return cls(**{**content, "bad_samples": tuple(content["bad_samples"])}, rows=rows)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise RunError(f"no evaluation rows, or damaged ones: {error!r}") from error


def _parsed(row: dict[str, Any]) -> MetricRow:
    known = {field.name for field in fields(MetricRow)}
    content = {name: value for name, value in {**row, "class_name": row["class"]}.items() if name in known}
    classes = content.get("classes")
    return MetricRow(**{**content, "classes": None if classes is None else tuple(classes)})


def rows_of(results: Mapping[tuple[str, str], TaskResult]) -> tuple[MetricRow, ...]:
    """Rows of all tasks; each task's primary metric comes first."""
    rows: list[MetricRow] = []
    for (dataset, task), result in sorted(results.items()):
        names: Sequence[str] = sorted(result.values, key=lambda name: (name != result.primary, name))
        rows += [_row(dataset, task=task, metric=name, result=result) for name in names]
    return tuple(rows)


def _row(dataset: str, *, task: str, metric: str, result: TaskResult) -> MetricRow:
    primary = metric == result.primary
    return MetricRow(
        dataset=dataset,
        task=task,
        metric=metric,
        value=_finite(result.values[metric]),
        n=result.n,
        floor=_finite(result.floor) if primary else None,
        higher_is_better=None if metric == THRESHOLD else not metric.lower().endswith(_ERRORS),
        primary=primary,
        n_windows=result.n_windows,
        valid_share=result.valid_share,
        classes=result.classes if primary else None,
    )


def _finite(value: float | None) -> float | None:
    """The value, if JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None
