"""Runs on this machine, in the background: started, followed, cancelled, and gone on with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rslp.run import RunDir
from tests.tiny import run_config, write_dataset

ROOT = Path(__file__).parents[2]
NAME = ("--experiment_id", "x")


class User:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.run = RunDir.of(place / "project_data", "helios_finetuning", "x")

    def says(self, workflow: str, *words: str, code: int = 0) -> str:
        # Such as an allocation of SLURM leaves in a shell; nothing of it is for this run.
        misleading = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "RANK": "3", "WORLD_SIZE": "4", "RSLP_RANKS": "slurm"}
        command = [sys.executable, "-m", "rslp.main", "helios", workflow, *NAME, *words]
        environment = {**os.environ, **misleading, "PYTHONPATH": str(ROOT)}
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
def user(tmp_path: Path) -> User:
    config = run_config({"regress": (str(write_dataset(tmp_path / "regress", "regress")), "regress")}, epochs=4)
    callback = {"class_path": "tests.slurm.callbacks.Slow", "init_args": {"seconds": 0.3}}
    config["trainer"]["callbacks"] = [callback]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return User(tmp_path)


def test_in_the_background_it_is_followed_cancelled_and_gone_on_with(user: User) -> None:
    told = user.launches("--detach", "true")
    assert "logs --rslp_project helios_finetuning --experiment_id x --follow true" in told
    assert re.search(r"x +local +\d+ +running", user.sees())
    end = time.monotonic() + 90
    while not user.run.state.exists() or json.loads(user.run.state.read_text())["step"] < 3:
        assert time.monotonic() < end
        time.sleep(0.1)
    with pytest.raises(AssertionError, match="is running already"):
        user.launches("--detach", "true")
    user.says("cancel")
    followed = user.says("logs", "--follow", "true", code=1)
    assert "SIGTERM: the same command goes on from the last checkpoint" in followed
    assert re.search(r"x +local +\d+ +cancelled", user.sees())
    assert "is not at work: cancelled" in user.says("cancel", code=2)
    assert "going on from" in user.launches()
    assert re.search(r"x +local +\d+ +succeeded +4 ", user.sees())
    assert "its output went to the terminal" in user.says("logs", code=2)
