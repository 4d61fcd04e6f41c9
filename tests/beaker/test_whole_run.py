"""The original's command line, sent to a Beaker that runs it, with everything of the run in an object store."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml

from rslp.files import Store
from tests.beaker.loopback import Loopback
from tests.beaker.tasks import Status
from tests.stores import Server

ROOT = Path(__file__).parents[2]
COMMAND = (
    "python -m rslp.main helios launch_finetune --config_paths+=OUT.yaml --rslp_project tests --experiment_id first "
    "--cluster+=ai2/jupiter --image_name henryh/rslp_multidataset_stable"
)
RUN = "s3://bucket/projects/tests/first"


def test_the_command_is_the_readmes() -> None:
    shown = COMMAND.replace("OUT.yaml", "[CONFIG]").replace(" tests ", " [PROJECT] ").replace("first", "[ID]")
    shown = shown.replace("ai2/jupiter", "[CLUSTER]").replace("henryh/rslp_multidataset_stable", "[IMAGE_NAME]")
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")


def settle(place: Path, beaker: Loopback, store: Server) -> None:
    """Settings that lead the job to the store; its key is a secret."""
    key = store.environment["AWS_SECRET_ACCESS_KEY"]
    beaker.secrets["STORE_KEY"] = key
    env = {name: value for name, value in store.environment.items() if value != key}
    settings = {"env": env, "secrets": {"AWS_SECRET_ACCESS_KEY": "STORE_KEY"}, "files": {}, "weka": {}}
    (place / ".rslp.yaml").write_text(yaml.safe_dump({"beaker": settings}))


def launch(*more: str) -> str:
    words = [sys.executable, *shlex.split(COMMAND)[1:], *more]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(store: Store, name: str, beaker: Loopback, *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while store.read(name) is None:
        assert time.monotonic() < end, beaker.only.output()
        time.sleep(0.1)


def test_it_trains_to_the_end_though_the_machine_is_taken_away(beaker: Loopback, store: Server, place: Path) -> None:
    settle(place, beaker, store)
    assert "submitted: beaker 01" in launch()
    run = Store(RUN, patience=10)
    wait_for(run, "checkpoints/last.ckpt", beaker)
    beaker.only.preempt()
    assert beaker.wait_for_end(beaker.only, seconds=200) == Status.STATUS_SUCCEEDED, beaker.only.output()
    said = beaker.only.output()
    assert "going on from" in said
    assert [each.job.status.exit_code for each in beaker.only.replicas] == [143, 0]
    assert json.loads(run.read("DONE.json") or b"")["epoch"] == 3
    code = json.loads(run.read("code.json") or b"")
    assert f"code {code['snapshot'][:12]} on " in said
    assert f"code/{code['snapshot']}.zip" in run.sizes()
    assert "lease.json" not in run.sizes()
    for secret in beaker.secrets.values():
        assert secret not in said
        assert all(secret.encode() not in (run.read(name) or b"") for name in run.sizes())
