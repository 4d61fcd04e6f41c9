"""Values of others' models, given as a CSV: evaluation rows like those of an arm."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rslp.errors import ConfigError, Problem
from rslp.evaluate.rows import Evaluation, MetricRow
from rslp.io import write_atomic
from rslp.study.plan import StudyPlan
from rslp.study.results import ArmResult, read_evaluation

_NEEDED = ("arm", "dataset", "task", "value")
_NUMBERS = ("value", "low", "high", "n")


@dataclass(frozen=True)
class OtherValue:
    """A line of the CSV.

    Attributes:
        line: its number.
        arm: the arm that it belongs to.
        seed: its seed; 0 where none is given.
        key: dataset and task.
        metric: name of the metric; None for the primary one.
        numbers: ``value``, ``low``, ``high`` and ``n``; None where a cell is empty.
    """

    line: int
    arm: str
    seed: int
    key: tuple[str, str]
    metric: str | None
    numbers: Mapping[str, float | None]


def others_of(plan: StudyPlan) -> list[OtherValue]:
    """The lines of a study's CSV; none without one.

    Raises:
        ConfigError: all problems: the file can't be read or lacks a column; a value that is no finite number, a value
            given twice, a seed that is no whole number, an arm of the study itself.
    """
    if plan.file.config.others is None:
        return []
    path = plan.file.path(plan.file.config.others)
    problems: list[Problem] = []
    values: dict[tuple[str, int, tuple[str, str], str | None], OtherValue] = {}
    for line, cells in _cells(Path(path)):
        value = _value(line, cells, path, problems)
        if value.arm in plan.names:
            problems.append(Problem(f"the arm {value.arm!r} is the study's own", path, line))
        former = values.setdefault((value.arm, value.seed, value.key, value.metric), value)
        if former is not value:
            problems.append(Problem(f"is of the arm, seed, task and metric of line {former.line}", path, line))
    if problems:
        raise ConfigError(problems)
    return list(values.values())


def _cells(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines of a CSV, each with its number, as texts by column."""
    try:
        # With or without the mark that spreadsheets put before UTF-8.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if lacking := [name for name in _NEEDED if name not in (reader.fieldnames or ())]:
                raise ConfigError(Problem(f"has no column {lacking[0]!r}; needed: {', '.join(_NEEDED)}", str(path), 1))
            return [(reader.line_num, {n: (text or "").strip() for n, text in row.items() if n}) for row in reader]
    except OSError as error:
        raise ConfigError(Problem(f"can't be read: {error.strerror}", str(path))) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(Problem(f"is no CSV in UTF-8: {error}", str(path))) from error


def _value(line: int, cells: Mapping[str, str], path: str, problems: list[Problem]) -> OtherValue:
    """A line; what is wrong in it is noted."""
    numbers = {name: _number(cells, name, path, line, problems) for name in (*_NUMBERS, "seed")}
    seed = numbers.pop("seed") or 0
    if seed != int(seed):
        problems.append(Problem(f"seed is {cells['seed']!r}, no whole number", path, line))
    problems += [Problem(f"has no {name}", path, line) for name in _NEEDED if not cells[name]]
    key = (cells["dataset"], cells["task"])
    return OtherValue(line, cells["arm"], int(seed), key, cells.get("metric") or None, numbers)


def read_others(plan: StudyPlan) -> list[ArmResult]:
    """The arms of a study's CSV; their rows are written to ``rows/`` of its directory.

    The metric is the primary one of the study's own rows, unless a column says another.

    Raises:
        ConfigError: as ``others_of``; or a line is of a task that the study does not have.
    """
    if not (lines := others_of(plan)):
        return []
    path, own = Path(plan.file.path(str(plan.file.config.others))), _own_rows(plan)
    if unknown := [each for each in lines if each.key not in own]:
        raise ConfigError([Problem(f"the study has no task {'/'.join(e.key)}", str(path), e.line) for e in unknown])
    by_arm: dict[tuple[str, int], list[MetricRow]] = {}
    for each in lines:
        by_arm.setdefault((each.arm, each.seed), []).append(_row(each, own[each.key]))
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
    for run in plan.runs:
        path = plan.folder / "rows" / run.experiment / f"{plan.file.config.split}.json"
        for row in read_evaluation(path).rows if path.exists() else ():
            if row.primary:
                rows.setdefault((row.dataset, row.task), row)
    return rows


def _row(given: OtherValue, known: MetricRow) -> MetricRow:
    metric = given.metric or known.metric
    return replace(
        known,
        metric=metric,
        value=given.numbers["value"],
        low=given.numbers["low"],
        high=given.numbers["high"],
        interval=None,
        n=int(given.numbers["n"] or known.n),
        floor=None,
        primary=metric == known.metric,
    )


def _number(cells: Mapping[str, str], name: str, path: str, line: int, problems: list[Problem]) -> float | None:
    """A cell as a finite number; None for an empty one, and for one with a problem, which is noted."""
    if not (text := cells.get(name, "")):
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        problems.append(Problem(f"{name} is {text!r}, no number", path, line))
        return None
    return number
