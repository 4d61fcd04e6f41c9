"""A run with a damaged file: each command that reads it says so, or does what it would have done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from rslearn.models.galileo.galileo import GalileoSize, pretrained_weights
from rslearn.train.lightning_module import RestoreConfig

from rslp.errors import CheckpointError, ConfigError, RunError
from rslp.helios.galileo import Galileo
from rslp.models.restoring import weights_of
from tests.damage import DAMAGES, damaged, make, readers, run_command, write_twin
from tests.train.ranks import ROOT

RECORD = ROOT / "docs" / "records" / "damage-runs.md"
# Written for people and their tools: no command opens them. Locks are held, and only named in messages (test_tampered).
# A new kind of file is read by a command, or named here.
UNREAD = {"lock", "predict.lock", "code.json", "environment.txt", "eval", "predictions.json", "predictions/classify"}
# What the report alone reads is damaged in its own tests.
UNREAD |= {"windows.parquet", "usage.csv", "provenance.json"}


def test_what_reads_a_damaged_file_says_so_or_does_what_it_would_have_done(tmp_path: Path) -> None:
    place = make(tmp_path / "place")
    (tmp_path / "work").mkdir()
    _, found = readers(place, tmp_path / "work")
    unread = [name for name, commands in found.items() if not commands]
    assert [name for name in unread if not name.startswith(tuple(UNREAD))] == []
    tally = damaged(place, tmp_path / "work", cases=60, seed=1, costly=0.1)
    assert tally.faults == []
    assert set(tally.cases) == {name for name, commands in found.items() if commands and not name.startswith("logs")}

    # One run with a torn file hides no other.
    write_twin(place)
    for name in ("job.json", "state.json", "metrics.csv", "DONE.json"):
        (place.run.path / name).write_bytes(b"\xff{")
    jobs = run_command("jobs", place)
    assert jobs.code == 0 and "twin" in jobs.out and "tiny" in jobs.out
    for name in ("job.json", "state.json", "metrics.csv", "DONE.json"):
        assert (
            sum(line.startswith(f"warning: {place.run.path / name} is damaged") for line in jobs.said.splitlines()) == 1
        )


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_three_hundred_damages(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.damage", str(tmp_path), "--cases", "300"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tally = json.loads(done.stdout.splitlines()[-1])
    assert tally["faults"] == []
    assert sum(tally["cases"].values()) >= 250
    RECORD.write_text(record(tally))


def record(tally: dict[str, Any]) -> str:
    """The counts as a page."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    kinds = ", ".join(damage.__name__.replace("_", " ") for damage in DAMAGES)
    rows = [
        f"| {name} | {count} | {said['noticed']} | {said['no effect']} | {said['silent']} | {said['traceback']} |"
        for name, count in sorted(tally["cases"].items())
        for said in [Counter(tally["verdicts"][name])]
    ]
    total = sum(map(Counter, tally["verdicts"].values()), Counter[str]())
    rows.append(
        f"| all | {sum(tally['cases'].values())} | {total['noticed']} | {total['no effect']} | {total['silent']} "
        f"| {total['traceback']} |"
    )
    today, version = datetime.now(UTC).date(), torch.__version__.partition("+")[0]
    return TEXT.format(today=today, commit=commit.strip(), version=version, kinds=kinds, rows="\n".join(rows))


TEXT = """# Damaged files of runs

{today}, commit {commit}, seed 0; torch {version}. Written by `make test-long` (`tests/test_damage.py`).

A case damages one file of a small run ({kinds}; half of all cases are
flips of one bit), and every command that reads the file is run: the training that goes on (also without `last.ckpt`),
the evaluation of two checkpoints, the prediction, the launcher, `jobs`, `logs`, `cancel`. Noticed: a line names the
file. No effect: code, output and what is left behind are those of the undamaged run. Silent: they are not, and nothing
is said. Files that no command reads (`eval/`, `predictions/`, `code.json`, `environment.txt`) and what `logs` shows as
it stands are left out.

| file | cases | noticed | no effect | silent | tracebacks |
|---|---|---|---|---|---|
{rows}
"""


def flipped(content: Any, path: Path) -> None:
    """Save weights, and flip a bit of the only tensor."""
    torch.save(content, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(torch.arange(64.0).numpy().tobytes()) + 100] ^= 4
    path.write_bytes(raw)


def test_damaged_weights_of_restore_config(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 1, bias=False)
    flipped({"weight": torch.arange(64.0)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"w\.pt can't be read as weights: it is damaged"):
        weights_of(RestoreConfig(restore_path=str(tmp_path / "w.pt"), selector=[]), model)


def test_damaged_weights_and_config_of_galileo(tmp_path: Path) -> None:
    folder = tmp_path / pretrained_weights[GalileoSize.NANO]
    folder.mkdir(parents=True)
    flipped({"weight": torch.arange(64.0)}, folder / "encoder.pt")
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"encoder\.pt can't be read as weights: it is damaged"):
        Galileo(GalileoSize.NANO, pretrained_path=str(tmp_path))
    (folder / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        Galileo(GalileoSize.NANO, pretrained_path=str(tmp_path))
