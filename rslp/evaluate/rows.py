"""Evaluation rows: the JSON format of metrics from which tables, comparisons and reports are made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rslp.errors import RunError
from rslp.train.metrics import PRIMARY, THRESHOLD, TaskResult

SCHEMA = 2
# Ends of the names of metrics of which lower values are better; a primary metric says it itself.
_LOWER_IS_BETTER = ("mse", "rmse", "l1", "mae", "mape", "loss")
# Keys of schema 1 with another name in schema 2.
_RENAMED = {"faults": "bad_samples"}


@dataclass(frozen=True)
class MetricRow:
    """One value of one metric.

    Attributes:
        dataset: the dataset's key.
        task: the task's name.
        metric: the metric's name, as logged.
        value: the metric; None if the split has no label to compute it from, or if it is not finite.
        n: windows with a valid label, from which the value was computed.
        floor: for the primary metric its value for the best constant prediction; None for others.
        higher_is_better: direction; None for values that do not measure quality, such as a threshold.
        primary: whether it is the task's primary metric, which selects checkpoints.
        class_name: the class of a metric of one class; ``class`` in the file.
        low: lower end of the value's 95 % bootstrap interval; None without one (``evaluate/resampling.py``).
        high: its upper end.
        interval: unit of resampling of the interval: ``window`` or ``block`` (of ground); None without one.
        n_windows: evaluated windows, including those without a valid label.
        valid_share: share of their label pixels (for labels of whole samples, of the samples) that are valid.
        classes: for primary metrics the classes over which the value is a mean.
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
    """Metrics of one checkpoint on one split.

    Attributes:
        run: ``project/experiment``.
        split: ``val`` or ``test``.
        checkpoint: path of the checkpoint, relative to the run directory if it lies inside.
        checkpoint_sha256: its hash.
        step: optimiser steps it was trained for.
        commit: git commit of the code, None outside a checkout.
        data_fingerprint: hash over the samples' identities.
        score: mean normalised score of the tasks.
        bad_samples: a message for each sample that could not be used and is left out of all values.
        rows: the metrics.
        data_fingerprints: such a hash for each dataset alone; empty in files of earlier versions.
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
    data_fingerprints: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> str:
        """The text of ``eval/<checkpoint>/<split>.json``."""
        content = asdict(self)
        for row in content["rows"]:
            row["class"] = row.pop("class_name")
        return json.dumps({"schema": SCHEMA, **content}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> Evaluation:
        """Read the text of an evaluation file of schema 2 or 1; fields that schema 1 lacks are None.

        Raises:
            RunError: the text is damaged, or has another schema.
        """
        try:
            content = json.loads(text)
            if content["schema"] not in (1, SCHEMA):
                raise RunError(f"evaluation rows of schema {content['schema']}; this version knows 1 and {SCHEMA}")
            rows = tuple(_parse_row(row) for row in content.pop("rows"))
            content = {_RENAMED.get(key, key): value for key, value in content.items() if key != "schema"}
            return cls(**{**content, "bad_samples": tuple(content["bad_samples"])}, rows=rows)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise RunError(f"not a file of evaluation rows, or a damaged one: {error!r}") from error


def _parse_row(row: dict[str, Any]) -> MetricRow:
    known = {one.name for one in fields(MetricRow)}
    content = {name: value for name, value in {**row, "class_name": row["class"]}.items() if name in known}
    classes = content.get("classes")
    return MetricRow(**{**content, "classes": None if classes is None else tuple(classes)})


@dataclass(frozen=True)
class Intervals:
    """The intervals of a task's values.

    Attributes:
        unit: unit of resampling, ``window`` or ``block``.
        ends: lower and upper end by the value's name.
    """

    unit: str
    ends: Mapping[str, tuple[float, float]]


def rows_of(
    results: Mapping[tuple[str, str], TaskResult], intervals: Mapping[tuple[str, str], Intervals] | None = None
) -> tuple[MetricRow, ...]:
    """Make the rows of all tasks from results by (dataset, task); each task's primary metric comes first."""
    rows: list[MetricRow] = []
    for key, result in sorted(results.items()):
        names: Sequence[str] = sorted(result.values, key=lambda name: (name != result.primary, name))
        rows += [_row(key, metric=name, result=result, intervals=(intervals or {}).get(key)) for name in names]
    return tuple(rows)


def _row(key: tuple[str, str], *, metric: str, result: TaskResult, intervals: Intervals | None) -> MetricRow:
    primary = metric == result.primary
    dataset, task = key
    low, high = intervals.ends.get(metric, (None, None)) if intervals else (None, None)
    return MetricRow(
        dataset=dataset,
        task=task,
        metric=metric,
        value=_finite(result.values[metric]),
        n=result.n,
        floor=_finite(result.floor) if primary else None,
        higher_is_better=_higher_is_better(metric),
        primary=primary,
        class_name=result.class_of.get(metric),
        low=low,
        high=high,
        interval=intervals.unit if intervals and low is not None else None,
        n_windows=result.n_windows,
        valid_share=result.valid_share,
        classes=result.classes if primary else None,
    )


def _higher_is_better(metric: str) -> bool | None:
    """Whether higher values of a metric are better; None for a detector's threshold."""
    if metric == THRESHOLD:
        return None
    stated = {primary.name: primary.higher_is_better for primary, _ in PRIMARY.values()}
    return stated.get(metric, not metric.lower().endswith(_LOWER_IS_BETTER))


def _finite(value: float | None) -> float | None:
    """The value, or None if it is not finite, which JSON can't express."""
    return value if value is not None and math.isfinite(value) else None
