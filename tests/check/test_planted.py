"""Each planted fault is found, at the line of the file that a person wrote; and nothing else is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.check.copies import Copy
from tests.check.planted import FAULTS, GROUPS, Fault, pattern


@dataclass(frozen=True)
class Outcome:
    copy: Copy
    problems: list[str]


_known: dict[str, Outcome] = {}


@pytest.fixture
def outcome(example: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Outcome:
    group = request.getfixturevalue("group")
    if group not in _known:
        copy = Copy.of(example, tmp_path_factory.mktemp(group))
        planted = [fault for fault in FAULTS if fault.group == group]
        for fault in (f for f in planted if not f.after):
            fault.plant(copy)
        copy.compose()
        for fault in (f for f in planted if f.after):
            fault.plant(copy)
        _known[group] = Outcome(copy, copy.check())
    return _known[group]


@pytest.mark.parametrize(("group", "fault"), [(f.group, f) for f in FAULTS], ids=[f.name for f in FAULTS])
def test_a_planted_fault_is_found_at_its_line(group: str, fault: Fault, outcome: Outcome) -> None:
    wanted = pattern(outcome.copy, fault)
    assert any(wanted.match(problem) for problem in outcome.problems), "\n".join([wanted.pattern, *outcome.problems])


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_else_is_found(group: str, outcome: Outcome) -> None:
    wanted = [pattern(outcome.copy, fault) for fault in FAULTS if fault.group == group]
    strange = [problem for problem in outcome.problems if not any(one.match(problem) for one in wanted)]
    assert strange == []


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 25
