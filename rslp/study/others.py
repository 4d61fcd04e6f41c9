"""Values of others' models, given as a CSV: evaluation rows like those of an arm."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rslp.errors import ConfigError, Problem
from rslp.evaluate.rows import Evaluation, MetricRow
from rslp.io import write_atomic
from rslp.study.comparison import ArmResult
from rslp.study.plan import StudyPlan

_NEEDED = ("arm", "dataset", "task", "value")


def read_others(plan: StudyPlan) -> list[ArmResult]:
    """The arms of a study's CSV; their rows are written to ``rows/`` of its directory.

    The metric is the primary one of the study's own rows, unless a column says another.

    Raises:
        ConfigError: the file is missing, lacks a column, or has a value that is no number.
    """
    if plan.file.config.others is None:
        return []
    path = Path(plan.file.path(plan.file.config.others))
    own = _own_rows(plan)
    by_arm: dict[tuple[str, int], list[MetricRow]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if lacking := [name for name in _NEEDED if name not in (reader.fieldnames or ())]:
                raise ConfigError(Problem(f"has no column {lacking[0]!r}; needed: {', '.join(_NEEDED)}", str(path), 1))
            for line, values in enumerate(reader, 2):
                key = (values["arm"], _number(values, "seed", path, line) or 0)
                by_arm.setdefault((key[0], int(key[1])), []).append(_row(values, own, path, line))
    except OSError as error:
        raise ConfigError(Problem(f"can't be read: {error.strerror}", str(path))) from error
    results: list[ArmResult] = []
    for (arm, seed), rows in sorted(by_arm.items()):
        target = plan.folder / "rows" / f"others.{len(results)}" / f"{plan.file.config.split}.json"
        evaluation = Evaluation(arm, plan.file.config.split, path.name, "", 0, None, "", None, (), tuple(rows))
        write_atomic(target, evaluation.json())
        results.append(ArmResult(arm, seed, (target,)))
    return results


def _own_rows(plan: StudyPlan) -> dict[tuple[str, str], MetricRow]:
    """The primary rows of the study's own runs, by dataset and task."""
    rows: dict[tuple[str, str], MetricRow] = {}
    for path in sorted(plan.folder.glob(f"rows/*/{plan.file.config.split}.json")):
        for row in Evaluation.parse(path.read_text()).rows:
            if row.primary:
                rows.setdefault((row.dataset, row.task), row)
    return rows


def _row(values: Mapping[str, str], own: Mapping[tuple[str, str], MetricRow], path: Path, line: int) -> MetricRow:
    key = (values["dataset"], values["task"])
    if (known := own.get(key)) is None:
        raise ConfigError(Problem(f"the study has no task {'/'.join(key)}", str(path), line))
    numbers = {name: _number(values, name, path, line) for name in ("value", "low", "high", "n")}
    metric = values.get("metric") or known.metric
    return replace(
        known,
        metric=metric,
        value=numbers["value"],
        low=numbers["low"],
        high=numbers["high"],
        interval=None,
        n=int(numbers["n"] or known.n),
        floor=None,
        primary=metric == known.metric,
    )


def _number(values: Mapping[str, str], name: str, path: Path, line: int) -> float | None:
    text = (values.get(name) or "").strip()
    try:
        return float(text) if text else None
    except ValueError:
        raise ConfigError(Problem(f"{name} is {text!r}, no number", str(path), line)) from None
