"""The original's command line, sent to a Beaker that runs it, with everything of the run in an object store."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rslp.cli.main import main
from rslp.io import ObjectStore
from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests import tiny
from tests.beaker.loopback import Loopback
from tests.beaker.tasks import Status
from tests.stores import Server

ROOT = Path(__file__).parents[2]
COMMAND = (
    "python -m rslp.main helios launch_finetune --config_paths+=OUT.yaml --rslp_project tests --experiment_id first "
    "--cluster+=ai2/jupiter --image_name henryh/rslp_multidataset_stable"
)
UNCHECKED = (*shlex.split(COMMAND)[3:], "--check", "false")
RUN = "s3://bucket/projects/tests/first"
NAMED = ("--rslp_project", "tests", "--experiment_id", "first")


def test_the_command_is_the_readmes() -> None:
    shown = COMMAND.replace("OUT.yaml", "[CONFIG]").replace(" tests ", " [PROJECT] ").replace("first", "[ID]")
    shown = shown.replace("ai2/jupiter", "[CLUSTER]").replace("henryh/rslp_multidataset_stable", "[IMAGE_NAME]")
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def settings(place: Path, beaker: Loopback, store: Server) -> None:
    """Settings that lead the job to the store; its key is a secret."""
    key = store.environment["AWS_SECRET_ACCESS_KEY"]
    beaker.secrets["STORE_KEY"] = key
    env = {name: value for name, value in store.environment.items() if value != key}
    own = {"env": env, "secrets": {"AWS_SECRET_ACCESS_KEY": "STORE_KEY"}, "files": {}, "weka": {}}
    (place / ".rslp.yaml").write_text(yaml.safe_dump({"beaker": own}))


def wait_for(name: str, beaker: Loopback, *, seconds: float = 200) -> None:
    store, end = ObjectStore(RUN, patience=10), time.monotonic() + seconds
    while store.read(name) is None:
        assert time.monotonic() < end, beaker.only.output()
        time.sleep(0.1)


@pytest.mark.slow  # as tests/launch/test_remote_run.py does, without Beaker
def test_it_trains_to_the_end_though_the_machine_is_taken_away(
    beaker: Loopback, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(UNCHECKED) == 0
    run = ObjectStore(RUN, patience=10)
    wait_for("checkpoints/last.ckpt", beaker)
    assert main(["helios", "jobs"]) == 0
    assert f"beaker  {beaker.only.id}  running" in capsys.readouterr().out
    first = beaker.only
    first.preempt()
    (place.parent / "hold").unlink()
    # Follows over both starts, to the end.
    assert main(["helios", "logs", *NAMED, "--follow", "true"]) == 0
    said = capsys.readouterr()
    assert "going on from" in said.out and f"{RUN}: succeeded" in said.err
    assert beaker.wait_for_end(beaker.only, seconds=200) == Status.STATUS_SUCCEEDED
    assert [each.job.status.exit_code for each in beaker.only.replicas] == [143, 0]
    assert json.loads(run.read("DONE.json") or b"")["epoch"] == 3
    code = json.loads(run.read("code.json") or b"")
    assert f"code {code['snapshot'][:12]} on " in said.out
    assert f"code/{code['snapshot']}.zip" in run.sizes() and "lease.json" not in run.sizes()
    assert b"torch==" in (run.read("environment.txt") or b"")
    everything = [said.out, str(beaker.only.spec), *((run.read(name) or b"").decode("latin-1") for name in run.sizes())]
    assert not [text[:80] for text in everything for secret in beaker.secrets.values() if secret in text]
    # The same run on this machine, undisturbed, is the same to the last bit; so it is on SLURM (tests/slurm).
    here = tiny.write_run(place.parent / "here", yaml.safe_load(Path("OUT.yaml").read_text()))
    assert fit(here) == 0
    (sent := place.parent / "sent.ckpt").write_bytes(run.read("checkpoints/last.ckpt") or b"")
    got, wanted = (read_checkpoint(path)["state_dict"] for path in (sent, here.last))
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert run.read("metrics.csv") == here.metrics.read_bytes()


@pytest.mark.slow
def test_predictions_are_made_there_and_come_into_the_store(beaker: Loopback, place: Path) -> None:
    (place.parent / "hold").unlink()
    here = tiny.write_run(place.parent / "here", yaml.safe_load(Path("OUT.yaml").read_text()))
    assert fit(here) == 0
    run = ObjectStore(RUN, patience=10)
    for name in ("config.yaml", "checkpoints/best.ckpt"):
        run.upload(here.path / name, name)
    assert main([*UNCHECKED, "--mode", "predict"]) == 0
    assert beaker.wait_for_end(beaker.only, seconds=600) == Status.STATUS_SUCCEEDED, beaker.only.output()
    predicted = json.loads(run.read("predictions.json") or b"")["datasets"]
    assert {name: told["windows"] for name, told in predicted.items()} == {"classify": 3, "regress": 3}
    assert "predictions/regress/default/w009/regress.geojson" in run.sizes()


@pytest.mark.slow  # as tests/slurm does, by another engine
def test_two_machines_train_together_and_start_again_when_one_breaks(beaker: Loopback, place: Path) -> None:
    words = UNCHECKED
    assert main([*words, "--nodes", "2", "--retries", "1", "--dry_run", "false"]) == 0
    wait_for("checkpoints/last.ckpt", beaker)
    beaker.only.crash(rank=1)
    (place.parent / "hold").unlink()
    assert beaker.wait_for_end(beaker.only, seconds=300) == Status.STATUS_SUCCEEDED, beaker.only.output()
    assert len(beaker.only.replicas) == 4 and "going on from" in beaker.only.output()


def test_the_command_is_sent_and_cancelled_it_leaves(beaker: Loopback, capsys: pytest.CaptureFixture[str]) -> None:
    beaker.runs_tasks = False
    # The check finds the tests' own encoder in this checkout, the job in the snapshot.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *shlex.split(COMMAND)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"submitted: beaker {beaker.only.id}, {RUN}" in done.stdout
    beaker.only.task["arguments"], beaker.only.task["command"] = (
        [],
        ["sh", "-c", "trap 'kill $!; exit 143' TERM; sleep 60 & wait"],
    )
    beaker.only.start_all()
    time.sleep(0.5)
    assert main(["helios", "cancel", *NAMED]) == 0
    assert beaker.wait_for_end(beaker.only, seconds=60) == Status.STATUS_CANCELED
    assert [each.job.status.exit_code for each in beaker.only.replicas] == [143]
    assert main(["helios", "cancel", *NAMED]) == 2
    assert f"{RUN} is neither queued nor running: cancelled" in capsys.readouterr().err


@pytest.mark.parametrize("ends", ["exit 3", "exit 0 without its work"])
def test_what_fails_is_not_called_a_success(
    ends: str, beaker: Loopback, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beaker.runs_tasks = False
    assert main([*UNCHECKED, "--retries", "1"]) == 0
    beaker.only.task["arguments"], beaker.only.task["command"] = [], ["sh", "-c", f"echo out; {ends[:6]}"]
    beaker.only.start_all()
    assert main(["helios", "logs", *NAMED, "--follow", "true"]) == 1
    said = capsys.readouterr()
    assert f"{RUN}: failed" in said.err
    # Failed for Beaker too: then it is started once more.
    assert said.out.count("out\n") == (2 if ends == "exit 3" else 1)
