"""Compare arms of a study: values, differences to a reference arm and gains, each with its interval, and cost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from rslp.errors import RunError
from rslp.evaluate.resampling import LEVEL
from rslp.study.intervals import Estimate, Floats, estimate, holm
from rslp.study.results import ArmResult as ArmResult
from rslp.study.results import Cost as Cost
from rslp.study.results import SeedValue, TaskValues, read_results
from rslp.study.table import NO_EVIDENCE
from rslp.study.table import comparison_table as comparison_table
from rslp.train.metrics import PRIMARY

SCHEMA = 1
# The difference, in units of the metric, for which a comparison says how many seeds would show it.
STATED_DIFFERENCE = 0.01
_PAIR, _WITHOUT = re.compile(r"pair:(.+)\+(.+)"), re.compile(r"without:(.+)")


@dataclass(frozen=True)
class _Sample:
    """Values of one task by seed, of one arm or of the difference of two.

    Attributes:
        by_seed: the values, ``S``.
        resampled: the values on resamples, ``R S``; None if a seed has no predictions.
        unit: what was resampled.
        units: their number.
    """

    by_seed: Floats
    resampled: Floats | None
    unit: str
    units: int

    @classmethod
    def of(cls, values: Sequence[SeedValue]) -> _Sample:
        parts = [value.resampled for value in values]
        there = [part for part in parts if part is not None]
        resampled = np.stack(there, axis=1) if len(there) == len(parts) else None
        return cls(np.array([v.value for v in values]), resampled, values[0].unit, min(v.units for v in values))

    def minus(self, other: _Sample) -> _Sample:
        return self._with(other, self.by_seed - other.by_seed, lambda mine, theirs: mine - theirs)

    def relative_to(self, other: _Sample) -> _Sample:
        """Divided by the mean of another over seeds, on each resample by that of the resample."""
        by_seed = self.by_seed / other.by_seed.mean()
        # A resample whose mean is 0 has no value.
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._with(other, by_seed, lambda mine, theirs: mine / theirs.mean(axis=1, keepdims=True))

    def scaled(self, factor: float) -> _Sample:
        return self._with(self, self.by_seed * factor, lambda mine, _: mine * factor)

    def _with(self, other: _Sample, by_seed: Floats, combine: Callable[[Floats, Floats], Floats]) -> _Sample:
        mine, theirs = self.resampled, other.resampled
        resampled = None if mine is None or theirs is None else combine(mine, theirs)
        return _Sample(by_seed, resampled, self.unit, min(self.units, other.units))

    def estimate(self) -> Estimate | None:
        """The mean with its interval; None where a value is undefined."""
        if not len(self.by_seed) or not np.isfinite(self.by_seed).all():
            return None
        resampled = self.resampled
        if resampled is not None:
            # A resample may have no value, such as one without an object.
            defined = np.isfinite(resampled).all(axis=1)
            resampled = resampled[defined] if defined.mean() >= LEVEL else None
        return estimate(self.by_seed, resampled, units=self.units, unit=self.unit)


class _Comparer:
    """Values of all tasks, and the pairing of seeds.

    Args:
        tasks: the values.
        missing: the arms that are not complete.
    """

    def __init__(self, tasks: Sequence[TaskValues], missing: Sequence[str]) -> None:
        self.tasks = tasks
        self._missing = set(missing)

    def value(self, task: TaskValues, arm: str) -> Estimate | None:
        seeds = task.by_arm.get(arm)
        return _Sample.of([seeds[seed] for seed in sorted(seeds)]).estimate() if seeds else None

    def pair(self, task: TaskValues, arm: str, base: str) -> tuple[_Sample, _Sample] | None:
        """The values of two arms for the same seeds; None if they share no seed.

        An arm that is complete with one seed, such as a best constant, stands beside each seed of the other.
        """
        by_arm: Mapping[str, Mapping[int, SeedValue]] = task.by_arm
        if arm not in by_arm or base not in by_arm:
            return None
        mine = self._repeated(by_arm[arm], by_arm[base], arm)
        other = self._repeated(by_arm[base], mine, base)
        seeds = sorted(mine.keys() & other.keys())
        return (_Sample.of([mine[s] for s in seeds]), _Sample.of([other[s] for s in seeds])) if seeds else None

    def _repeated(
        self, values: Mapping[int, SeedValue], like: Mapping[int, SeedValue], arm: str
    ) -> Mapping[int, SeedValue]:
        if len(values) != 1 or arm in self._missing:
            return values
        return dict.fromkeys(like, next(iter(values.values())))

    def difference(self, task: TaskValues, arm: str, base: str) -> Estimate | None:
        """The mean difference of two arms, paired by seed and window."""
        pair = self.pair(task, arm, base)
        return pair[0].minus(pair[1]).estimate() if pair else None

    def gain(self, arm: str, base: str) -> dict[str, Any] | None:
        """Mean relative gain over all tasks, Delta-m of Maninis et al. 2019, in percent.

        Tasks whose mean value in the base is not above 0 are left out: a ratio to it says nothing.
        """
        parts, left_out = [], []
        for task in self.tasks:
            if (pair := self.pair(task, arm, base)) is None:
                continue
            if not pair[1].by_seed.mean() > 0 or not np.isfinite(pair[0].by_seed).all():
                left_out.append("/".join(task.key))
                continue
            parts.append(pair[0].minus(pair[1]).relative_to(pair[1]).scaled(100 * _sign(task)))
        if not parts:
            return None
        smallest = min(len(part.by_seed) for part in parts)
        mean = _mean([part for part in parts if len(part.by_seed) == smallest])
        found = mean.estimate()
        return None if found is None else {**_json(found), "tasks": len(parts), "left_out": left_out}


def _mean(parts: Sequence[_Sample]) -> _Sample:
    resampled = [part.resampled for part in parts]
    there = [part for part in resampled if part is not None]
    by_seed = np.mean([part.by_seed for part in parts], axis=0)
    unit = "window" if any(part.unit == "window" for part in parts) else "block"
    return _Sample(
        by_seed, np.mean(there, axis=0) if len(there) == len(parts) else None, unit, min(part.units for part in parts)
    )


def _sign(task: TaskValues) -> int:
    """1 if higher values of the task's metric are better, otherwise -1."""
    row = next(value.row for seeds in task.by_arm.values() for value in seeds.values())
    return 1 if row.higher_is_better else -1


def _json(found: Estimate) -> dict[str, Any]:
    names = ("value", "low", "high", "over", "seeds")
    return {name: getattr(found, name) for name in names}


def compare(
    results: Sequence[ArmResult],
    *,
    reference: str,
    missing: Sequence[tuple[str, int]] = (),
    difference: float = STATED_DIFFERENCE,
) -> dict[str, Any]:
    """Compare arms with a reference arm; the content of ``comparison.json``.

    Args:
        results: the results, one for each arm and seed that is finished.
        reference: the arm that the others are compared with.
        missing: arm and seed of those that are not finished.
        difference: a difference, in units of the metrics: where there is no evidence of one, it is said how many seeds
            would show one of this size.

    Raises:
        RunError: an evaluation is damaged, or arms were evaluated on different data.
    """
    arms = list(dict.fromkeys(result.arm for result in results))
    if reference not in arms and arms:
        raise RunError(f"the reference arm {reference!r} has no finished run; there are: {', '.join(arms)}")
    tasks, split = read_results(results)
    comparer = _Comparer(list(tasks.values()), [arm for arm, _ in missing])
    entries = [_task_entry(task, comparer, arms, reference) for task in comparer.tasks]
    _correct(entries, difference)
    gains = {arm: comparer.gain(arm, reference) for arm in arms if arm != reference}
    return {
        "schema": SCHEMA,
        "split": split,
        "level": LEVEL,
        "reference": reference,
        "arms": arms,
        "seeds": {arm: sorted(result.seed for result in results if result.arm == arm) for arm in arms},
        "missing": [{"arm": arm, "seed": seed} for arm, seed in missing],
        "stated_difference": difference,
        "correction": "holm",
        "comparisons": sum(len(entry["differences"]) for entry in entries),
        "tasks": [{k: v for k, v in entry.items() if k != "estimates"} for entry in entries],
        "gains": {arm: gain for arm, gain in gains.items() if gain is not None},
        "transfer": _pairs(comparer, arms, base="single" if "single" in arms else reference),
        "influence": _influence(comparer, arms, base="joint" if "joint" in arms else reference),
        "cost": {arm: _cost([result.cost for result in results if result.arm == arm]) for arm in arms},
    }


def _task_entry(task: TaskValues, comparer: _Comparer, arms: Sequence[str], reference: str) -> dict[str, Any]:
    """Values and differences of a task; ``estimates`` has the differences' estimates."""
    all_values = [value for seeds in task.by_arm.values() for value in seeds.values()]
    first = next((value for value in all_values if value.units), all_values[0])
    values: dict[str, Any] = {}
    differences: dict[str, Estimate] = {}
    for arm in arms:
        if (value := comparer.value(task, arm)) is not None:
            by_seed = {str(seed): one.row.value for seed, one in sorted(task.by_arm[arm].items())}
            values[arm] = {**_bounded(_json(value), task.by_arm[arm]), "by_seed": by_seed}
        if arm != reference and (found := comparer.difference(task, arm, reference)) is not None:
            differences[arm] = found
    return {
        "dataset": task.key[0],
        "task": task.key[1],
        "metric": first.row.metric,
        "higher_is_better": first.row.higher_is_better,
        "floor": first.row.floor,
        "n": first.row.n,
        "unit": first.unit if first.resampled is not None else None,
        "units": first.units,
        "arms": values,
        "differences": {arm: _json(found) for arm, found in differences.items()},
        "estimates": differences,
    }


def _bounded(value: dict[str, Any], seeds: Mapping[int, SeedValue]) -> dict[str, Any]:
    """A value whose interval ends at what is possible; of one seed without predictions with its row's."""
    row = next(iter(seeds.values())).row
    if value["low"] is None and len(seeds) == 1 and row.low is not None:
        return {**value, "low": row.low, "high": row.high, "over": f"{row.interval}s" if row.interval else "as given"}
    primary = {primary.name: primary for primary, _ in PRIMARY.values()}.get(row.metric)
    if primary is None or value["low"] is None:
        return value
    worst = (-math.inf if primary.higher_is_better else math.inf) if primary.worst is None else primary.worst
    low, high = sorted((worst, primary.best))
    return {**value, "low": max(value["low"], low), "high": min(value["high"], high)}


def _correct(entries: Sequence[dict[str, Any]], difference: float) -> None:
    """Add p-values, corrected for the number of all differences together, and what is to be said of each difference."""
    found = [(entry, arm, one) for entry in entries for arm, one in entry["estimates"].items() if one.p is not None]
    corrected = iter(holm([one.p for _, _, one in found]))
    for entry, arm, one in found:
        row = entry["differences"][arm]
        row["p"], row["p_holm"] = one.p, next(corrected)
        row["verdict"] = verdict(one, better=bool(entry["higher_is_better"]))
        if row["verdict"] == NO_EVIDENCE:
            row["seeds_to_show"] = one.seeds_to_show(difference) if "seeds" in str(one.over) else None


def verdict(found: Estimate, *, better: bool) -> str:
    """What an interval says of a difference: better, worse, or that there is no evidence of one.

    Args:
        found: the estimate of the difference.
        better: whether higher values are better.
    """
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        return NO_EVIDENCE
    return "better" if (found.value > 0) == better else "worse"


def _pairs(comparer: _Comparer, arms: Sequence[str], *, base: str) -> list[dict[str, Any]]:
    """Transfer matrix: the difference that each other dataset makes when it is trained together with one."""
    cells = []
    for arm in arms:
        if (names := _PAIR.fullmatch(arm)) is None:
            continue
        for task in comparer.tasks:
            if task.key[0] in names.groups() and (found := comparer.difference(task, arm, base)) is not None:
                other = names[2] if task.key[0] == names[1] else names[1]
                cells.append({"dataset": task.key[0], "task": task.key[1], "with": other, "to": base, **_json(found)})
    return cells


def _influence(comparer: _Comparer, arms: Sequence[str], *, base: str) -> list[dict[str, Any]]:
    """Influence: the difference that each dataset makes for the others by being part of the base arm."""
    cells = []
    for arm in arms:
        if (name := _WITHOUT.fullmatch(arm)) is None:
            continue
        for task in comparer.tasks:
            if task.key[0] != name[1] and (found := comparer.difference(task, base, arm)) is not None:
                cells.append({"dataset": task.key[0], "task": task.key[1], "of": name[1], "in": base, **_json(found)})
    return cells


def _cost(costs: Sequence[Cost]) -> dict[str, float | None]:
    """The mean cost of a seed; None where it is not known for all seeds."""
    means = {}
    for field in fields(Cost):
        known = [getattr(cost, field.name) for cost in costs]
        means[field.name] = None if None in known or not known else math.fsum(known) / len(known)
    return means
