"""Killed at any moment and started again, a joint run ends as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import children
from tests.train.kills import SET_UPS
from tests.train.ranks import ROOT

RECORD = ROOT / "docs" / "records" / "kills.md"


def killed(folder: Path, *words: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.train.kills", str(folder), *words]
    done = children.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout.splitlines()[-1])  # noqa: T201
    tallies: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert [tally["differences"] for tally in tallies.values()] == [[]] * len(tallies)
    return tallies


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    tally = killed(tmp_path, "--kills", "3", "--seed", "3", "--set_ups", "two sensors", "--hash_seeds", "2")[
        "two sensors"
    ]
    assert tally["at_times"] + tally["in_writes"] >= 3
    seeds = [json.loads(line)["hash_seeds"][0] for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    # Each start goes on from what one under the other seed has left.
    assert len(seeds) >= 5 and len(set(seeds)) == 2
    assert all(one != other for one, other in itertools.pairwise(seeds))


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_a_hundred_kills_change_nothing(tmp_path: Path) -> None:
    tallies = killed(tmp_path, "--kills", "100", "--record", str(RECORD))
    assert list(tallies) == list(SET_UPS)
    assert sum(tally["at_times"] + tally["in_writes"] for tally in tallies.values()) >= 100
