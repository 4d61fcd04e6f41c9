"""A comparison as text of at most 80 columns, for a terminal; made from the content of ``comparison.json`` alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NO_EVIDENCE = "no evidence of a difference"
OF_ONE_SEED = (
    "Of one seed it is not known how much seeds differ: better or worse is said of these models, not of how they were "
    "trained."
)
_WIDTH = 80
# Longer names of arms stand on a line of their own.
_NAME = 16


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as text of at most 80 columns."""
    lines = [*_heading(comparison), ""]
    for task in comparison["tasks"]:
        lines += [*_task(task, comparison), ""]
    # What has no interval is not shown.
    if gains := {arm: gain for arm, gain in comparison["gains"].items() if gain["low"] is not None}:
        lines += [f"mean relative gain over {comparison['reference']}, all tasks (Delta-m)"]
        for arm, gain in gains.items():
            left_out = f", without {', '.join(gain['left_out'])}" if gain["left_out"] else ""
            lines += _row(
                arm, f"{gain['value']:+.1f} %{_ends(gain, '+.1f')}  of {_plural(gain['tasks'], 'task')}{left_out}"
            )
        lines.append("")
    lines += _cells("transfer: what a dataset gains from another", comparison["transfer"], "with")
    lines += _cells("influence: what a dataset gives to another", comparison["influence"], "of")
    lines += _costs(comparison["cost"])
    return "\n".join(line.rstrip() for line in lines).rstrip("\n") + "\n"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _heading(comparison: Mapping[str, Any]) -> Iterator[str]:
    seeds = {len(seeds) for seeds in comparison["seeds"].values()}
    count = f"{min(seeds)} to {max(seeds)} seeds" if len(seeds) > 1 else _plural(max(seeds, default=0), "seed")
    yield from _wrapped(
        f"{comparison['split']} split, {count}; differences are to {comparison['reference']}, paired by seed and "
        f"window; 95 % intervals over {_over(comparison)}"
    )
    if missing := comparison["missing"]:
        yield from _wrapped("missing: " + ", ".join(f"{one['arm']} seed {one['seed']}" for one in missing))
    if is_of_one_seed(comparison):
        yield from _wrapped(OF_ONE_SEED)
    for text in headline(comparison):
        yield from _wrapped(text)


def _over(comparison: Mapping[str, Any]) -> str:
    """What the intervals are over; where tasks differ, all of it."""
    found = [value["over"] for task in comparison["tasks"] for value in task["arms"].values() if value["over"]]
    return " or ".join(dict.fromkeys(found)) or "nothing: there are neither seeds nor predictions"


def is_of_one_seed(comparison: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference is over windows alone."""
    differences = [one for task in comparison["tasks"] for one in task["differences"].values()]
    return any("seeds" not in (one["over"] or "seeds") for one in differences)


def headline(comparison: Mapping[str, Any]) -> Iterator[str]:
    """For each arm a sentence: in how many tasks it is better and worse after the correction."""
    for arm in comparison["arms"]:
        rows = [(_name(task), task["differences"].get(arm)) for task in comparison["tasks"]]
        tested = [(name, row) for name, row in rows if row is not None and "p_holm" in row]
        if not tested:
            continue
        parts = []
        for word in ("better", "worse"):
            names = [name for name, row in tested if row["verdict"] == word and row["p_holm"] < 1 - comparison["level"]]
            parts.append(f"{word} in {len(names)}{' (' + ', '.join(names) + ')' if names else ''}")
        corrected = f"after Holm's correction for {_plural(comparison['comparisons'], 'comparison')}"
        yield f"{arm}: {' and '.join(parts)} of {_plural(len(tested), 'task')}, {corrected}"


def finding(task: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """What was found for one task, in one sentence: of the arm ``joint``, or else of the first that was compared."""
    name, reference = _name(task), comparison["reference"]
    known = {arm: one for arm, one in task["differences"].items() if one["low"] is not None}
    arm = "joint" if "joint" in known else next(iter(known), None)
    if arm is None or reference not in task["arms"]:
        return f"{name}: there is no difference with an interval to {reference} yet."
    one, mine, other = known[arm], task["arms"][arm]["value"], task["arms"][reference]["value"]
    sure = f"the difference is {one['value']:+.3f}, 95 % interval {one['low']:+.3f} to {one['high']:+.3f}"
    over = f"over {one['over']}, {_plural(one['seeds'], 'seed')}"
    words = in_words(one, comparison)
    if one["verdict"] == NO_EVIDENCE:
        values = f"{mine:.3f} with {arm} and {other:.3f} with {reference}"
        return f"{name}: {words}. {task['metric']} is {values}; {sure} ({over})."
    return (
        f"{name}: {arm} is {words.replace(one['verdict'], one['verdict'] + ' than ' + reference, 1)}. {task['metric']} "
        f"is {mine:.3f} against {other:.3f}; {sure} ({over})."
    )


def _task(task: Mapping[str, Any], comparison: Mapping[str, Any]) -> Iterator[str]:
    units = f"{task['units']} {task['unit']}s" if task["unit"] else "no predictions to resample"
    if not task["unit"] and task["units"]:
        units = f"{task['units']} windows, too few to resample"
    yield from _wrapped(f"{_name(task)}: {task['metric']}, {units}")
    for arm in comparison["arms"]:
        if arm not in task["arms"]:
            continue
        value, difference = task["arms"][arm], task["differences"].get(arm)
        text = f"{value['value']:.3f}{_ends(value, '.3f')}"
        if difference is not None and difference["low"] is not None:
            text = f"{text:<22}  {difference['value']:+.3f}{_ends(difference, '+.3f')}"
        yield from _row(arm, text)
        if difference is not None:
            yield from _wrapped(in_words(difference, comparison), " " * (_NAME + 4))


def in_words(difference: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """The words for a difference."""
    if difference["low"] is None:
        return "neither seeds that differ nor windows to resample: a difference without an interval is not shown"
    verdict = str(difference["verdict"])
    if verdict != NO_EVIDENCE:
        holds = difference["p_holm"] < 1 - comparison["level"]
        verdict += " on these windows, which were not resampled" * (difference["over"] == "seeds")
        return verdict if holds else f"{verdict}, but not after Holm's correction"
    if "seeds" not in difference["over"]:
        return verdict
    stated, seeds = comparison["stated_difference"], difference["seeds_to_show"]
    if seeds is None:
        return f"{verdict}; no number of seeds would show one of {stated:g}: it takes more windows"
    return f"{verdict}; {seeds} seeds would show one of {stated:g}"


def _row(name: str, text: str) -> Iterator[str]:
    if len(name) > _NAME:
        yield from _wrapped(name, "  ")
        name = ""
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"  {name:<{_NAME}}  ",
        subsequent_indent=" " * (_NAME + 4),
        drop_whitespace=True,
    )


def _ends(value: Mapping[str, Any], form: str) -> str:
    return "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"


def _cells(title: str, cells: Sequence[Mapping[str, Any]], other: str) -> Iterator[str]:
    shown = [cell for cell in cells if cell["low"] is not None]
    if shown:
        yield title
        for cell in shown:
            yield from _row("", f"{_name(cell)} {other} {cell[other]}: {cell['value']:+.3f}{_ends(cell, '+.3f')}")
        yield ""


def _costs(costs: Mapping[str, Mapping[str, float | None]]) -> Iterator[str]:
    lines = []
    for arm, cost in costs.items():
        known = [f"{_rounded(amount)} {name}" for name, amount in cost.items() if amount is not None]
        if known:
            lines += list(_row(arm, ", ".join(known)))
    if lines:
        yield "cost of one seed"
        yield from lines


def _rounded(amount: float) -> str:
    """A number of at most 5 characters, such as 12.3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= 10 * size or (amount >= size and size > 1e3):
            return f"{amount / size:.3g}{letter}"
    return f"{amount:.4g}"


def _name(task: Mapping[str, Any]) -> str:
    return " / ".join(dict.fromkeys((task["dataset"], task["task"])))


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
