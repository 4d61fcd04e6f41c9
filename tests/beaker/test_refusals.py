"""What can't be sent is refused in one line, before anything is sent."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rslp.cli.main import main
from rslp.errors import StoreError
from rslp.io import ObjectStore
from tests.beaker.loopback import Loopback
from tests.stores import Server

LAUNCH = (
    *("helios", "launch_finetune", "--config_paths+=OUT.yaml", "--rslp_project", "tests", "--experiment_id", "first"),
    *("--image_name", "henryh/rslp_multidataset_stable", "--check", "false"),
)


def refused(capsys: pytest.CaptureFixture[str], *words: str, cluster: str = "ai2/jupiter") -> str:
    assert main([*LAUNCH, f"--cluster+={cluster}", *words]) == 2
    # A loaded machine may take seconds to answer.
    lines = capsys.readouterr().err.splitlines(keepends=True)
    said = "".join(line for line in lines if not line.startswith("waiting for "))
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def no_image(beaker: Loopback, patch: pytest.MonkeyPatch) -> None:
    beaker.images = {"henryh/rslp_multidataset_stabel", "favyen/rslearn"}


def no_cluster(beaker: Loopback, patch: pytest.MonkeyPatch) -> None:
    beaker.clusters = {"ai2/jupyter", "ai2/saturn"}


def no_secret(beaker: Loopback, patch: pytest.MonkeyPatch) -> None:
    beaker.secrets["RSLEARN_WEKA_KEYS"] = beaker.secrets.pop("RSLEARN_WEKA_KEY")


def no_workspace(beaker: Loopback, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("RSLP_BEAKER_WORKSPACE", "ai2/earth-system")


def bad_token(beaker: Loopback, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("BEAKER_TOKEN", "wrong")


def no_config(beaker: Loopback, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("BEAKER_CONFIG", "/no/such/file")


def silence(beaker: Loopback, patch: pytest.MonkeyPatch) -> None:
    Path(".rslp.yaml").write_text("beaker: {timeout: 1.5}")
    beaker.silent.set()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (no_image, "no image 'henryh/rslp_multidataset_stable'; near: henryh/rslp_multidataset_stabel"),
        (no_cluster, "no cluster 'ai2/jupiter'; near: ai2/jupyter"),
        (no_secret, "no secret 'RSLEARN_WEKA_KEY' in the workspace ai2/earth-systems; near: RSLEARN_WEKA_KEYS"),
        (no_workspace, "no workspace 'ai2/earth-system'; near: ai2/earth-systems"),
        (bad_token, "Beaker does not know the token"),
        (no_config, "Beaker is not configured"),
        (silence, "Beaker does not answer: looking up image, cluster and secrets took longer than 1.5 s"),
    ],
)
def test_what_is_wrong_is_said(
    fault: Callable[[Loopback, pytest.MonkeyPatch], None],
    message: str,
    beaker: Loopback,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RSLP_PREFIX", "s3://no-store-is-asked")
    fault(beaker, monkeypatch)
    # The client alone would ask a silent server for ever.
    assert message in refused(capsys)
    assert beaker.experiments == {}


def test_a_run_that_is_at_work_is_not_sent_again(
    beaker: Loopback, store: Server, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beaker.runs_tasks = False
    words = [*LAUNCH, "--cluster+=ai2/jupiter"]
    assert main(words) == 0
    before = ObjectStore("s3://bucket/projects/tests/first", patience=5).read("config.yaml")
    capsys.readouterr()
    Path("OUT.yaml").write_text(Path("OUT.yaml").read_text() + "seed: 7\n")
    assert "is queued already (beaker 01" in refused(capsys)
    assert ObjectStore("s3://bucket/projects/tests/first", patience=5).read("config.yaml") == before
    assert len(beaker.experiments) == 1


def test_a_name_that_is_taken_leaves_the_run_as_it_was(
    beaker: Loopback, store: Server, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beaker.runs_tasks = False
    monkeypatch.setattr("rslp.launch.engines.beaker.secrets.token_hex", lambda _: "00000000")
    assert main([*LAUNCH, "--cluster+=ai2/jupiter"]) == 0
    run = ObjectStore("s3://bucket/projects/tests/first", patience=5)
    for name in ("config.yaml", "job.json"):
        run.delete(name)
    capsys.readouterr()
    assert "has an experiment 'tests_first_00000000' already" in refused(capsys)
    assert run.read("config.yaml") is None
    assert run.read("lease.json") is None


def test_without_the_client_it_is_said_what_to_install(
    beaker: Loopback, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "beaker":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setenv("RSLP_PREFIX", "s3://no-store-is-asked")
    assert "pip install 'rslp[beaker]'" in refused(capsys)


def test_nothing_to_evaluate(beaker: Loopback, store: Server, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--do_eval", "true")
    assert "no checkpoint best.ckpt in s3://bucket/projects/tests/first" in said
    assert beaker.experiments == {}


@pytest.mark.parametrize("prefix", ["s3://no-such-bucket", "nonsense://x"])
def test_a_store_that_is_not_there(
    beaker: Loopback,
    store: Server,
    place: Path,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RSLP_PREFIX", prefix)
    assert ("no such bucket" if "bucket" in prefix else "nonsense") in refused(capsys)
    assert beaker.experiments == {}


def test_a_local_prefix_is_a_warning(
    beaker: Loopback, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beaker.runs_tasks = False
    monkeypatch.setenv("RSLP_PREFIX", "runs")
    assert main([*LAUNCH, "--cluster+=ai2/jupiter"]) == 0
    assert "is a folder of this machine; the job sees it only if it is mounted there" in capsys.readouterr().err
    assert (place / "runs/projects/tests/first/config.yaml").is_file()


# Put together here: the code with this test in it has to travel.
VALUE = "".join(("s3cr3t", "-of-the-", "test-1"))


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("--env+=PASSED_ON=" + VALUE,), "the plan would hold the value of a secret"),
        (("--env+=PROXY=https://me:word@proxy.example.org",), "the plan would hold a login in a URL"),
        (("--checkpoint", f"/{VALUE}/a.ckpt", "--mode", "test"), "the plan would hold the value of a secret"),
        (("--helios_checkpoint_path", f"/x/{VALUE}"), "the run config would hold the value of a secret"),
    ],
)
def test_secrets_are_neither_shown_nor_sent(
    words: tuple[str, ...],
    where: str,
    beaker: Loopback,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("OUT.yaml").write_text(Path("OUT.yaml").read_text() + "rslp_description: '{CHECKPOINT_PATH}'\n")
    monkeypatch.setenv("MY_API_TOKEN", VALUE)
    monkeypatch.setenv("RSLP_PREFIX", "s3://no-store-is-asked")
    if "--helios_checkpoint_path" not in words:
        words = (*words, "--helios_checkpoint_path", "/x")
    assert main([*LAUNCH, "--cluster+=ai2/jupiter", *words]) == 2
    said = capsys.readouterr()
    assert where in said.err and VALUE not in said.err + said.out
    assert beaker.calls == []


NAMED = ("--rslp_project", "tests", "--experiment_id", "first")


def stored(name: str) -> bytes | None:
    """A file of the run; by a new client, since each test has a store of its own."""
    return ObjectStore("s3://bucket/projects/tests/first", patience=5).read(name)


def listed(capsys: pytest.CaptureFixture[str]) -> str:
    """What `jobs` shows of the run."""
    assert main(["helios", "jobs"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("former", [False, True])
def test_an_experiment_that_was_not_made_leaves_no_record(
    former: bool, beaker: Loopback, store: Server, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beaker.runs_tasks = False
    if former:
        assert main([*LAUNCH, "--cluster+=ai2/jupiter"]) == 0
        assert main(["helios", "cancel", *NAMED]) == 0
        capsys.readouterr()
    before = {name: stored(name) for name in ("config.yaml", "job.json")}
    Path("OUT.yaml").write_text(Path("OUT.yaml").read_text() + "seed: 7\n")
    beaker.fault = "refused"
    assert "Beaker can't be reached: broken" in refused(capsys)
    assert {name: stored(name) for name in before} == before
    assert len(beaker.experiments) == former


def test_an_experiment_whose_answer_was_lost_is_found_by_its_name(
    beaker: Loopback, store: Server, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beaker.runs_tasks, beaker.fault = False, "lost"
    assert main([*LAUNCH, "--cluster+=ai2/jupiter"]) == 0
    assert f"submitted: beaker {beaker.only.id}" in capsys.readouterr().out
    assert json.loads(stored("job.json") or b"")["id"] == beaker.only.id


def test_an_experiment_that_beaker_made_and_went_silent_can_be_followed_and_cancelled(
    beaker: Loopback, store: Server, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".rslp.yaml").write_text("beaker: {timeout: 1.5}")
    beaker.runs_tasks, beaker.fault = False, "unheard"
    said = refused(capsys)
    assert "the experiment tests_first_" in said and "may have been made, as `helios jobs` will show" in said
    assert stored("config.yaml") is not None and stored("lease.json") is None
    beaker.silent.clear()
    assert f"{beaker.only.name}  queued" in listed(capsys)
    assert "is queued already (beaker tests_first_" in refused(capsys)
    assert main(["helios", "cancel", *NAMED]) == 0
    assert "cancelled" in listed(capsys)


@pytest.mark.parametrize("fault", ["killed", "broken"])
def test_an_experiment_whose_record_cannot_be_completed_is_found_by_its_name(
    fault: str, beaker: Loopback, store: Server, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The store breaks, or this process is killed, as soon as the experiment is there."""
    beaker.runs_tasks = False
    real = ObjectStore.write

    def write(self: ObjectStore, name: str, content: bytes) -> None:
        if beaker.experiments:
            raise SystemExit(9) if fault == "killed" else StoreError("the network is gone")
        real(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "write", write)
        patch.setattr(ObjectStore, "delete", lambda *_: None)
        if fault == "killed":
            with pytest.raises(SystemExit):
                main([*LAUNCH, "--cluster+=ai2/jupiter"])
        else:
            assert main([*LAUNCH, "--cluster+=ai2/jupiter"]) == 0
            assert "warning: the network is gone; the record names the experiment" in capsys.readouterr().err
    assert json.loads(stored("job.json") or b"")["id"] == beaker.only.name
    assert f"{beaker.only.name}  queued" in listed(capsys)
    assert main(["helios", "cancel", *NAMED]) == 0
    assert "cancelled" in listed(capsys)
