"""Killed at any moment and started again, a joint run ends as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_kills_change_nothing(kills: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.train.kills", str(tmp_path), "--kills", str(kills), "--seed", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tally = json.loads(done.stdout.splitlines()[-1])
    print(f"{tally['at_times']} kills at random times and {tally['in_writes']} in writes, {tally['runs']} runs")  # noqa: T201
    assert tally["differences"] == []
    assert tally["at_times"] + tally["in_writes"] >= kills
