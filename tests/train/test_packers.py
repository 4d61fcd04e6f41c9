"""A packer that is killed leaves no process and no lock behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.ranks import ROOT

RECORD = ROOT / "docs" / "records" / "packers.md"


def killed(folder: Path, *words: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.train.packers", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)  # noqa: T201
    tally = json.loads(done.stdout.splitlines()[-1])
    assert (tally["left_over"], tally["slow_starts"], tally["failures"]) == (0, 0, []), (tally, done.stderr[-3000:])
    return dict(tally)


def test_three_kills_leave_nothing_behind(tmp_path: Path) -> None:
    assert killed(tmp_path, "--kills", "3", "--seed", "2")["of_holders"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_leave_nothing_behind(tmp_path: Path) -> None:
    assert killed(tmp_path, "--kills", "50", "--record", str(RECORD))["of_holders"] >= 15
