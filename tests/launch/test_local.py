"""Runs on this machine, in the background: started, followed, cancelled, and gone on with."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from rslp.rundir import RunDir
from tests import children
from tests.hold import holding, until
from tests.tiny import run_config, write_dataset

ROOT = Path(__file__).parents[2]
NAME = ("--experiment_id", "x")
# Such as a surrounding job leaves in a shell; nothing of it is for this run.
MISLEADING = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "RSLP_RANKS": "slurm"}
if find_spec("rslp.runtime.world"):
    MISLEADING |= {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"}


class User:
    """Somebody at a terminal; what runs in the background is an interpreter of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.run = RunDir.of(place / "project_data", "helios_finetuning", "x")

    def says(self, workflow: str, *words: str, code: int = 0) -> str:
        environment = {**MISLEADING, "PYTHONPATH": str(ROOT)}
        done = children.rslp("helios", workflow, *NAME, *words, cwd=self.place, environment=environment)
        assert done.returncode == code, done.stderr[-2000:]
        return done.stdout + done.stderr

    def launches(self, *words: str) -> str:
        return self.says("launch_finetune", "--config_paths+=run.yaml", "--local", "true", *words)

    def lives(self) -> bool:
        """Whether the process in the background is there."""
        return Path("/proc", json.loads(self.run.job().read_text())["id"].partition("@")[0]).exists()

    def sees(self) -> str:
        done = children.rslp("helios", "jobs", cwd=self.place)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return run_config({"regress": (str(write_dataset(tmp_path / "regress", "regress")), "regress")}, epochs=3)


def test_in_the_background_it_is_followed_cancelled_and_gone_on_with(tmp_path: Path, config: dict[str, Any]) -> None:
    user = User(tmp_path)
    # It waits in its second epoch until it is asked to leave: no machine is too slow, or too fast, for what follows.
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(holding(config, tmp_path / "hold")))
    told = user.launches("--detach", "true")
    assert "logs --rslp_project helios_finetuning --experiment_id x --follow true" in told
    assert re.search(r"x +local +\d+ +running", user.sees())
    with pytest.raises(AssertionError, match="is running already"):
        user.launches("--detach", "true")
    until(user.run.last.exists, lives=user.lives, what="it ended without a checkpoint")
    user.says("cancel")
    followed = user.says("logs", "--follow", "true", code=1)
    assert "SIGTERM: the same command goes on from epoch 1, step " in followed
    assert re.search(r"x +local +\d+ +cancelled", user.sees())
    assert "is neither queued nor running: cancelled" in user.says("cancel", code=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert "going on from" in user.launches()
    assert re.search(r"x +local +\d+ +succeeded +3 ", user.sees())
    assert "done: 3 epochs" in user.says("logs")
