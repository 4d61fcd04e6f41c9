"""Runs on this machine, in the background: started, followed, cancelled, and gone on with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from rslp.run import RunDir
from tests.tiny import run_config, write_dataset

ROOT = Path(__file__).parents[2]
NAME = ("--experiment_id", "x")
# Such as a surrounding job leaves in a shell; nothing of it is for this run.
MISLEADING = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "RSLP_RANKS": "slurm"}
if find_spec("rslp.train.world"):
    MISLEADING |= {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"}


class User:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.run = RunDir.of(place / "project_data", "helios_finetuning", "x")

    def says(self, workflow: str, *words: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "rslp.main", "helios", workflow, *NAME, *words]
        environment = {**os.environ, **MISLEADING, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=self.place, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-2000:]
        return done.stdout + done.stderr

    def launches(self, *words: str) -> str:
        return self.says("launch_finetune", "--config_paths+=run.yaml", "--local", "true", *words)

    def sees(self) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "rslp.main", "helios", "jobs"],
            cwd=self.place,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return run_config({"regress": (str(write_dataset(tmp_path / "regress", "regress")), "regress")}, epochs=12)


def write(place: Path, config: dict[str, Any], callbacks: list[dict[str, Any]]) -> None:
    (place / "run.yaml").write_text(
        yaml.safe_dump({**config, "trainer": {**config["trainer"], "callbacks": callbacks}})
    )


def test_in_the_background_it_is_followed_cancelled_and_gone_on_with(tmp_path: Path, config: dict[str, Any]) -> None:
    user = User(tmp_path)
    write(tmp_path, config, [{"class_path": "tests.slurm.callbacks.Slow", "init_args": {"seconds": 1.0}}])
    told = user.launches("--detach", "true")
    assert "logs --rslp_project helios_finetuning --experiment_id x --follow true" in told
    assert re.search(r"x +local +\d+ +running", user.sees())
    with pytest.raises(AssertionError, match="is running already"):
        user.launches("--detach", "true")
    end = time.monotonic() + 90
    while not user.run.last.exists():
        assert time.monotonic() < end, user.says("logs")[-2000:]
        time.sleep(0.1)
    user.says("cancel")
    followed = user.says("logs", "--follow", "true", code=1)
    assert "SIGTERM: the same command goes on from the last checkpoint" in followed
    assert re.search(r"x +local +\d+ +cancelled", user.sees())
    assert "is not at work: cancelled" in user.says("cancel", code=2)
    write(tmp_path, config, [])
    assert "going on from" in user.launches()
    assert re.search(r"x +local +\d+ +succeeded +12 ", user.sees())
    assert "its output went to the terminal" in user.says("logs", code=2)
