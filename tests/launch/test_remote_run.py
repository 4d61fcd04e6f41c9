"""A run whose directory lies in an object store: what happens to the command is what happens to the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from rslp.errors import RunError
from rslp.io import ObjectStore
from rslp.launch.job import Mode
from rslp.launch.lease import LEASE_FILE, LeaseTiming
from rslp.launch.remote import run_in_copy
from rslp.train.fit import fit
from tests import tiny
from tests.hold import holding, until
from tests.stores import Server

QUICK = LeaseTiming(beat=0.2, stale=1, confirm=0.05, push=0.1)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("RSLP_SCRATCH", str(tmp_path / "scratch"))
    store = ObjectStore(f"memory://{request.node.name.partition('[')[0]}/projects/p/e", patience=1)
    store.write("config.yaml", b"a: 1\n")
    return store


def run(store: ObjectStore, code: str, *, mode: Mode = "fit", writes: bool = True) -> int:
    return run_in_copy(
        store.root,
        (sys.executable, "-c", f"import sys, time; from pathlib import Path\n{code}"),
        mode=mode,
        writes=writes,
        timing=QUICK,
    )


HERE = "here = Path(sys.argv[sys.argv.index('--run_dir') + 1])\n"


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_exit_codes_pass_through_and_nothing_stays_behind(store: ObjectStore, tmp_path: Path, code: int) -> None:
    assert run(store, f"{HERE}assert (here / 'config.yaml').is_file(); sys.exit({code})") == code
    assert list((tmp_path / "scratch").iterdir()) == []
    assert store.read(LEASE_FILE) is None


def test_results_arrive_while_it_runs_and_at_its_end(store: ObjectStore) -> None:
    seen: list[bytes | None] = []
    watch = threading.Thread(target=lambda: seen.append(_await(store, "metrics.csv")))
    watch.start()
    code = f"{HERE}(here / 'metrics.csv').write_text('1')\ntime.sleep(1.5)\n(here / 'DONE.json').write_text('2')"
    assert run(store, code) == 0
    watch.join()
    assert seen == [b"1"] and store.read("DONE.json") == b"2"


def _await(store: ObjectStore, name: str) -> bytes | None:
    end = time.monotonic() + 10
    while (content := store.read(name)) is None and time.monotonic() < end:
        time.sleep(0.05)
    return content


def test_the_other_machines_wait_for_the_first_and_send_nothing(store: ObjectStore) -> None:
    codes: list[int] = []
    write = f"{HERE}(here / 'other.csv').write_text('1')\nassert (here / 'config.yaml').read_text() == 'b: 2'"
    # An earlier start's lease stands still, and its machine 0 changed the run before it ended.
    store.write(LEASE_FILE, json.dumps({"token": "t", "job": "", "host": "h", "process": 1, "beats": 3}).encode())
    with pytest.MonkeyPatch.context() as patch:
        # Signals can only be taken by a main thread, which the other machine has and this thread is not.
        patch.setattr("rslp.launch.processes.forwarded_signals", list)
        other = threading.Thread(target=lambda: codes.append(run(store, write, writes=False)))
        other.start()
        time.sleep(1)
        store.write("config.yaml", b"b: 2")
        assert run(store, "time.sleep(2)") == 0
        other.join()
    assert codes == [0] and "other.csv" not in store.sizes()


def test_an_evaluation_on_other_machines_waits_for_nobody(store: ObjectStore) -> None:
    assert run(store, f"{HERE}(here / 'metrics.csv').write_text('1')", writes=False, mode="test") == 0
    assert set(store.sizes()) == {"config.yaml"}


def test_a_signal_reaches_the_command_and_its_last_words_are_sent(store: ObjectStore) -> None:
    code = (
        f"import signal\n{HERE}"
        "def leave(*_):\n (here / 'state.json').write_text('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, leave)\n(here / 'ready').write_text('')\ntime.sleep(60)"
    )
    killer = threading.Thread(target=lambda: (_await(store, "ready"), os.kill(os.getpid(), signal.SIGTERM)))
    killer.start()
    assert run(store, code) == 143
    killer.join()
    assert store.read("state.json") == b"saved"


def test_whose_lease_is_taken_ends_and_sends_no_more(store: ObjectStore) -> None:
    def take() -> None:
        _await(store, "ready")
        store.write(LEASE_FILE, b'{"token": "other", "job": "", "host": "h", "process": 1}')

    thief = threading.Thread(target=take)
    thief.start()
    with pytest.raises(RunError, match="another job has taken the lease of this run"):
        run(store, f"{HERE}(here / 'ready').write_text('')\ntime.sleep(60)")
    thief.join()
    assert b"other" in (store.read(LEASE_FILE) or b"")


def test_what_cannot_be_sent_is_kept_and_is_no_success(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: ObjectStore, source: Path, name: str) -> None:
        from rslp.errors import StoreError

        raise StoreError("the network is gone")

    monkeypatch.setattr(ObjectStore, "upload", broken)
    assert run(store, f"{HERE}(here / 'DONE.json').write_text('2'); time.sleep(0.5)") == 1
    said = capsys.readouterr().err
    assert said.count("the network is gone; the run goes on") == 1
    (kept,) = (tmp_path / "scratch").rglob("DONE.json")
    assert f"the run stays in {kept.parent}" in said


def start(location: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rslp.main", "helios", "run", "--run_dir", location, "--mode", "fit"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_elsewhere_to_the_same_weights(
    s3: ObjectStore, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = {kind: (str(tiny.write_dataset(tmp_path / kind, kind)), kind) for kind in ("classify", "segment")}
    config = tiny.run_config(datasets, epochs=3, dropout=0.2)
    local = tiny.write_run(tmp_path / "local", config)
    assert fit(local) == 0
    config = holding(config, tmp_path / "hold")
    s3.write("config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    monkeypatch.setenv("RSLP_SCRATCH", str(tmp_path / "first machine"))
    first = start(s3.root)
    until(
        lambda: s3.read("checkpoints/last.ckpt"), lives=lambda: first.poll() is None, what="ended without a checkpoint"
    )
    first.kill()
    (tmp_path / "hold").unlink()
    first.communicate()
    assert s3.read("DONE.json") is None and s3.read(LEASE_FILE) is not None

    monkeypatch.setenv("RSLP_SCRATCH", str(tmp_path / "second machine"))
    second = start(s3.root)
    assert second.stderr is not None
    while "going on from" not in (line := second.stderr.readline()):
        assert line, "the second start did not go on"
    s3_server.pause(3)
    said = second.communicate()[1]
    assert second.returncode == 0, said
    assert s3.read("DONE.json") is not None and s3.read(LEASE_FILE) is None
    s3.download("checkpoints/last.ckpt", tmp_path / "last.ckpt")
    s3.download("metrics.csv", tmp_path / "metrics.csv")

    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in (tmp_path / "last.ckpt", local.last))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert validations(tmp_path / "metrics.csv") == validations(local.metrics)


@pytest.mark.slow
def test_predictions_come_into_the_store_and_former_ones_leave_it(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.run_config(
        {"segment": (str(tiny.write_dataset(tmp_path / "segment", "segment")), "segment")}, epochs=1
    )
    local = tiny.write_run(tmp_path / "local", config)
    assert fit(local) == 0
    for name in ("config.yaml", "checkpoints/best.ckpt"):
        s3.upload(local.path / name, name)
    s3.write("predictions/segment/default/gone/segment.tif", b"of another prediction")
    s3.write("predictions.json", b"{}")
    monkeypatch.setenv("RSLP_SCRATCH", str(tmp_path / "scratch"))
    command = [sys.executable, "-m", "rslp.main", "helios", "run", "--run_dir", s3.root, "--mode", "predict"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {f"predictions/segment/default/{window}/segment.tif" for window in ("w009", "w010", "w011")}
    assert set(s3.sizes()) == {"config.yaml", "checkpoints/best.ckpt", "predictions.json", *files}
    assert json.loads(s3.read("predictions.json") or b"")["datasets"]["segment"]["windows"] == 3


def validations(log: Path) -> list[str]:
    """The log's lines about validation data; means of losses over an epoch know only what this start has seen."""
    return [line for line in log.read_text().splitlines() if ",val/" in line]
