"""Runs on a real SLURM: submitted, followed, cancelled, failed, preempted, out of time; and what they leave."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rslp.launch.record import read_record
from rslp.rundir import RunDir
from rslp.train.checkpoints import read_checkpoint
from tests import children
from tests.hold import holding, until
from tests.slurm import cluster as slurm
from tests.slurm.cluster import Cluster
from tests.study.small import write_study
from tests.tiny import run_config, write_dataset

pytestmark = pytest.mark.skipif(
    bool(slurm.missing()), reason=f"SLURM is not installed: no {', '.join(slurm.missing())}"
)
ROOT = Path(__file__).parents[2]
SEVERAL = pytest.mark.skipif(
    find_spec("rslp.runtime.world") is None, reason="training in several processes is not there yet"
)
SLURM = ("--engine", "slurm", "--slurm.gres", "none", "--check", "false")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield slurm.start(tmp_path_factory.mktemp("slurm"), stack)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    datasets = {kind: (str(write_dataset(folder / kind, kind)), kind) for kind in ("classify", "regress")}
    return run_config(datasets, epochs=3, dropout=0.2)


class User:
    """Somebody at a terminal of the cluster."""

    def __init__(self, place: Path, cluster: Cluster) -> None:
        self.place, self.cluster = place, cluster
        self.environment = {**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def says(self, workflow: str, *words: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "rslp.main", "helios", workflow, *words]
        done = children.run(command, cwd=self.place, env=self.environment)
        assert done.returncode == code, done.stderr[-2000:]
        return done.stdout if code == 0 else done.stderr

    def launches(self, name: str, config: dict[str, Any], *words: str) -> str:
        """Submit a run; its job's number."""
        path = self.place / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        told = self.says("launch_finetune", f"--config_paths+={path}", "--experiment_id", name, *SLURM, *words)
        number = re.search(r"submitted: slurm (\d+)", told)
        assert number
        return number[1]

    def run(self, name: str) -> RunDir:
        return RunDir.of(self.place / "project_data", "helios_finetuning", name)

    def log(self, name: str) -> str:
        return self.says("logs", "--experiment_id", name)

    def waits_for_step(self, name: str, step: int) -> None:
        state, job = self.run(name).state, read_record(self.run(name))
        assert job is not None
        until(
            lambda: state.exists() and json.loads(state.read_text())["step"] >= step,
            lives=lambda: self.cluster.about(job.id)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"),
            what="it ended before",
        )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], cluster: Cluster) -> RunDir:
    """The same run, on this machine and undisturbed."""
    user = User(tmp_path_factory.mktemp("reference"), cluster)
    (user.place / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    here = ("--experiment_id", "here", "--local", "true", "--check", "false")
    user.says("launch_finetune", "--config_paths+=run.yaml", *here)
    return user.run("here")


@pytest.fixture
def user(tmp_path: Path, cluster: Cluster) -> User:
    return User(tmp_path, cluster)


def with_callback(config: dict[str, Any], name: str, **init_args: Any) -> dict[str, Any]:
    callback = {"class_path": f"tests.slurm.callbacks.{name}", "init_args": init_args}
    return {**config, "trainer": {**config["trainer"], "callbacks": [callback]}}


def assert_same_weights(run: RunDir, reference: RunDir) -> None:
    got, wanted = (read_checkpoint(one.last)["state_dict"] for one in (run, reference))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert run.metrics.read_bytes() == reference.metrics.read_bytes()


def test_submitted_followed_and_done_as_on_this_machine(
    user: User, config: dict[str, Any], reference: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a surrounding job left in the shell must not reach sbatch or the training.
    user.environment |= {"SLURM_MEM_PER_CPU": "1", "SBATCH_TIMELIMIT": "nonsense", "WORLD_SIZE": "8", "RANK": "3"}
    job = user.launches("plain", config, "--memory", "1GiB", "--cpus", "2", "--time_limit", "10m")
    followed = user.says("logs", "--experiment_id", "plain", "--follow", "true")
    assert "done: 3 epochs, 18 steps" in followed
    assert user.run("plain").done()
    assert_same_weights(user.run("plain"), reference)
    assert re.search(rf"plain +slurm +{job} +succeeded +3 ", user.says("jobs"))


def test_a_prediction_is_a_job_of_its_own(user: User, config: dict[str, Any], reference: RunDir) -> None:
    shutil.copytree(reference.path, user.run("plain").path)
    job = user.launches("plain", config, "--mode", "predict")
    user.cluster.wait(job, "COMPLETED")
    assert re.search(rf"plain +slurm +{job} \(predict\) +succeeded", user.says("jobs"))
    assert len(list(user.run("plain").predictions.glob("*/default/*/*.geojson"))) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", "9"), "More processors requested than permitted"),
        (("--memory", "1TiB"), "Requested node configuration is not available"),
        (("--time_limit", "9d"), "Requested time limit is invalid"),
        (("--slurm.partition", "no such"), "invalid partition specified: no such"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_in_one_line(
    user: User, config: dict[str, Any], words: tuple[str, ...], message: str
) -> None:
    (user.place / "run.yaml").write_text(yaml.safe_dump(config))
    line = ("--config_paths+=run.yaml", "--experiment_id", "x", *SLURM, *words)
    told = user.says("launch_finetune", *line, code=2)
    assert told.startswith("error: SLURM refused: ")
    assert message in told
    assert told.count("\n") == 1
    assert not (user.place / "project_data").exists()


def test_an_array_is_a_run_for_each_file(user: User, config: dict[str, Any], reference: RunDir) -> None:
    name = "a_b.c-1"
    for seed in range(2):
        (user.place / f"seed{seed}.yaml").write_text(f"seed: {seed}\n")
    files = [f"--array+=seed{seed}.yaml" for seed in range(2)]
    job = user.launches(name, config, *files)
    for seed in range(2):
        user.cluster.wait(f"{job}_{seed}", "COMPLETED")
    table = user.says("jobs")
    for seed in range(2):
        assert re.search(rf"{re.escape(name)}-seed{seed} +slurm +{job}_{seed} +succeeded", table)
        assert "done: 3 epochs" in user.log(f"{name}-seed{seed}")
    assert_same_weights(user.run(f"{name}-seed0"), reference)
    weights = [read_checkpoint(user.run(f"{name}-seed{seed}").last)["state_dict"] for seed in range(2)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow  # an array of six runs
def test_a_study_is_an_array_and_the_same_command_compares(user: User) -> None:
    write_study(user.place, seeds=[0, 1], sizes={"train": 4, "val": 2, "test": 6})
    command = ("study", "--cfg", "study.yaml", "--engine", "slurm", "--slurm.gres", "none", "--memory", "1GiB")
    user.says(*command)
    folder = user.place / "project_data" / "studies" / "studies" / "study"
    entries = json.loads((folder / "arms.json").read_text())["runs"]
    assert {entry["state"] for entry in entries.values()} == {"submitted"} and len(entries) == 6
    for name in entries:
        record = read_record(RunDir.of(user.place / "project_data", "studies", name))
        assert record is not None
        user.cluster.wait(record.id, "COMPLETED")
    assert "comparison.json" in user.says(*command)
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["reference"] == "single" and comparison["missing"] == []
    assert {entry["state"] for entry in json.loads((folder / "arms.json").read_text())["runs"].values()} == {"done"}


@SEVERAL
@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_processes_of_two_nodes_train_as_so_many_here(user: User, config: dict[str, Any], each: int) -> None:
    job = user.launches("nodes", config, "--nodes", "2", "--gpus", str(each))
    here = ("--config_paths+=nodes.yaml", "--experiment_id", "here", "--local", "true", "--check", "false")
    user.says("launch_finetune", *here, "--gpus", str(2 * each))
    user.cluster.wait(job, "COMPLETED")
    assert user.run("nodes").done()
    got, wanted = (read_checkpoint(user.run(name).last)["state_dict"] for name in ("nodes", "here"))
    for key in wanted:
        # Sums over processes may be taken in another order.
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # it waits for the queue, as the preempted run does
def test_a_failing_run_is_tried_again_and_counted(user: User, config: dict[str, Any], reference: RunDir) -> None:
    failing = with_callback(config, "FailFirst", file=str(user.place / "count"), times=2)
    job = user.launches("failing", failing, "--retries", "1")
    user.cluster.wait(job, "FAILED")
    assert (user.place / "count").read_text() == "2"
    log = user.log("failing")
    assert "failed with exit code 1; queued again as retry 1 of 1" in log
    assert "failed with exit code 1; no retry is left (1 allowed)" in log
    assert re.search(rf"failing +slurm +{job} +failed", user.says("jobs"))
    user.cluster.wait(user.launches("failing", failing), "COMPLETED")
    assert_same_weights(user.run("failing"), reference)


def test_a_users_mistake_is_not_tried_again(user: User, config: dict[str, Any]) -> None:
    wrong = {**config, "trainer": {**config["trainer"], "max_epoch": 3}}
    job = user.launches("wrong", wrong, "--retries", "5")
    user.cluster.wait(job, "FAILED")
    assert "max_epoch" in user.log("wrong")
    assert (user.cluster.about(job)["Restarts"], user.cluster.about(job)["ExitCode"]) == ("0", "2:0")


def test_preempted_it_goes_on_to_the_same_weights(user: User, config: dict[str, Any], reference: RunDir) -> None:
    job = user.launches("preempted", with_callback(config, "WaitForWarning", step=8))
    user.waits_for_step("preempted", 6)
    user.cluster.ask("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    about = user.cluster.wait(job, "COMPLETED")
    assert int(about["Restarts"]) == 1
    log = user.log("preempted")
    assert "preempted: it is queued again" in log
    assert "going on from" in log
    assert_same_weights(user.run("preempted"), reference)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--signal=TERM",), ("--signal=HUP",), ("--full", "--signal=TERM")])
def test_a_signal_to_every_process_of_a_job_saves_and_queues_it_again(
    user: User, config: dict[str, Any], reference: RunDir, words: tuple[str, ...]
) -> None:
    data = {**config["data"], "init_args": {**config["data"]["init_args"], "num_workers": 2}}
    job = user.launches("told", with_callback({**config, "data": data}, "WaitForWarning", step=8))
    user.waits_for_step("told", 6)
    # The training and its reading workers; all of the job's, the batch script and srun, too.
    user.cluster.ask("scancel", *words, job)
    assert int(user.cluster.wait(job, "COMPLETED")["Restarts"]) == 1
    log = user.log("told")
    assert "preempted: it is queued again" in log
    # An srun that is told to end kills the training before it has saved.
    assert "--full" in words or f"{words[0].replace('--signal=', 'SIG')}: the same command goes on" in log
    assert_same_weights(user.run("told"), reference)


@SEVERAL
@pytest.mark.slow
def test_preempted_on_two_nodes_it_goes_on_to_the_same_weights(user: User, config: dict[str, Any]) -> None:
    job = user.launches("nodes", with_callback(config, "WaitForWarning", step=8), "--nodes", "2", "--gpus", "2")
    user.waits_for_step("nodes", 6)
    user.cluster.ask("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    calm = user.launches("calm", config, "--nodes", "2", "--gpus", "2")
    assert int(user.cluster.wait(job, "COMPLETED", seconds=300)["Restarts"]) == 1
    user.cluster.wait(calm, "COMPLETED", seconds=300)
    assert_same_weights(user.run("nodes"), user.run("calm"))


@pytest.mark.slow  # as a preempted run does, after a wait for the clock
def test_out_of_time_it_goes_on_to_the_same_weights(user: User, config: dict[str, Any], reference: RunDir) -> None:
    waiting = with_callback(config, "WaitForWarning", step=8)
    job = user.launches("limited", waiting, "--time_limit", "10m", "--slurm.notice", "60")
    user.waits_for_step("limited", 6)
    user.cluster.ask("scontrol", "update", f"jobid={job}", "EndTime=now+70")
    user.cluster.wait(job, "PENDING")
    user.cluster.ask("scontrol", "update", f"jobid={job}", "TimeLimit=10")
    about = user.cluster.wait(job, "COMPLETED")
    assert int(about["Restarts"]) == 1
    assert "preempted: it is queued again" in user.log("limited")
    assert_same_weights(user.run("limited"), reference)


@pytest.mark.parametrize("how", ["helios cancel", pytest.param("scancel", marks=pytest.mark.slow)])
def test_cancelled_it_saves_and_does_not_come_back(user: User, config: dict[str, Any], how: str) -> None:
    job = user.launches("unwanted", holding(config, user.place / "hold"))
    user.waits_for_step("unwanted", 6)
    again = ("--config_paths+=unwanted.yaml", "--experiment_id", "unwanted", *SLURM)
    assert f"is running already (slurm {job})" in user.says("launch_finetune", *again, code=2)
    if how == "scancel":
        user.cluster.ask("scancel", job)
    else:
        user.says("cancel", "--experiment_id", "unwanted")
    user.cluster.wait(job, "FAILED", "CANCELLED")
    time.sleep(2)
    assert user.cluster.about(job)["JobState"] != "PENDING"
    assert re.search(r"unwanted +slurm +\d+ +(cancelled|preempted)", user.says("jobs"))
    assert read_checkpoint(user.run("unwanted").last)["global_step"] >= 6
