"""One, two and three processes: the same losses, weights and metrics from the same global batches."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rslp.evaluate.evaluation import evaluate
from rslp.evaluate.predictions import read_predictions
from rslp.rundir import RunDir
from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests.tiny import KINDS, run_config, write_dataset, write_run
from tests.train.ranks import TIMEOUT, finish, start_ranks, train_on
from tests.train.test_fit import logged, weights

# 11 windows in batches of 6 and 5: over three processes 2, 2, 2 and 1, 2, 2.
WINDOWS = {"train": 11, "val": 7, "test": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("data")
    return {kind: (str(write_dataset(folder / kind, kind, **WINDOWS)), kind) for kind in KINDS}


def joint(data: Mapping[str, tuple[str, str]], *, epochs: int, **settings: Any) -> dict[str, Any]:
    config = run_config(dict(data), epochs=epochs, **settings)
    # Pixels of class 0 do not count: windows have unlike numbers of valid ones, some next to none.
    if "segment" in data:
        for tasks in (config["model"]["init_args"]["task"], dataset(config, "segment")["task"]):
            tasks["init_args"]["tasks"]["segment"]["init_args"]["zero_is_invalid"] = True
    return config


def dataset(config: dict[str, Any], name: str) -> dict[str, Any]:
    init_args: dict[str, Any] = config["data"]["init_args"]["data_modules"][name]["init_args"]
    return init_args


def place(folder: Path, name: str, config: dict[str, Any], *, world: int, batch: int = 6) -> Path:
    config = copy.deepcopy(config)
    config["data"]["init_args"]["batch_sizes"] = batch // world
    callback = {"class_path": "tests.train.ranks.Drawn", "init_args": {"path": str(folder / name)}}
    config["trainer"]["callbacks"] = [callback]
    return write_run(folder / f"{name}-{world}", config).path


def configs(data: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    smooth = {kind: data[kind] for kind in KINDS if kind != "detect"}
    single = joint(smooth, epochs=4)
    several = joint(smooth, epochs=20, datasets_per_step=3)
    several["trainer"] |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "check_val_every_n_epoch": 10}
    several["model"]["init_args"]["model"]["init_args"]["loss_weights"] = {"regress": 3.0}
    return {"single": single, "several": several, "all": joint(data, epochs=1)}


Runs = dict[str, RunDir]


def runs_of(folder: Path, data: Mapping[str, tuple[str, str]], *, names: tuple[str, ...], world: int) -> Runs:
    """Train the named configs; the last one is evaluated too."""
    wanted = configs(data)
    runs = {name: RunDir(place(folder, name, wanted[name], world=world)) for name in names}
    if world > 1:
        train_on(world, [run.path for run in runs.values()])
    else:
        assert [fit(run) for run in runs.values()] == [0] * len(runs)
    return runs


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, data: dict[str, tuple[str, str]]) -> Runs:
    return runs_of(tmp_path_factory.mktemp("one"), data, names=("several", "all"), world=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, data: dict[str, tuple[str, str]]) -> Runs:
    return runs_of(tmp_path_factory.mktemp("two"), data, names=("several", "all"), world=2)


def drawn(run: RunDir, name: str, world: int) -> list[list[tuple[str, list[str]]]]:
    """For each step its batches: the dataset, and the windows of all ranks in their order."""
    folder = run.path.parents[3]
    ranks = [(folder / name).with_suffix(f".{world}-{rank}").read_text().splitlines() for rank in range(world)]
    steps = []
    for lines in zip(*ranks, strict=True):
        parts = zip(*(json.loads(line) for line in lines), strict=True)
        steps.append([(part[0][0], [name for _, names in part for name in names]) for part in parts])
    return steps


def same_training(one: RunDir, many: RunDir, *, steps: int) -> None:
    assert (one.done() or {})["step"] == (many.done() or {})["step"] == steps
    ours = weights(many.last)
    for key, value in weights(one.last).items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert len(losses(one)) > 10
    assert losses(many) == pytest.approx(losses(one), rel=1e-4, abs=1e-6)


def losses(run: RunDir) -> dict[tuple[str, str], float]:
    return {(row["step"], row["name"]): float(row["value"]) for row in logged(run) if "loss" in row["name"]}


def same_metrics(run: RunDir, alone: RunDir) -> None:
    """What several processes said of their last checkpoint is what one says of it."""
    (evaluation,) = evaluate(alone, splits=("val",), checkpoint=str(run.last))
    files = (
        run.evaluation("val", "last"),
        next(iter(alone.path.glob(f"eval/{evaluation.checkpoint_sha256[:12]}/*.json"))),
    )
    recorded = [
        read_predictions(f.with_suffix(".parquet"), checkpoint_sha256=evaluation.checkpoint_sha256) for f in files
    ]
    assert recorded[0].keys() == recorded[1].keys()
    for key, of_task in recorded[1].items():
        # Each sample once, whichever process has evaluated it.
        assert recorded[0][key].samples == of_task.samples and len(set(of_task.samples)) == len(of_task.samples) > 0
    together = json.loads(run.evaluation("val", "last").read_text())["rows"]
    assert len(together) == len(evaluation.rows) >= 9
    for row, other in zip(evaluation.rows, together, strict=True):
        assert (row.dataset, row.metric, row.n) == (other["dataset"], other["metric"], other["n"])
        exact = row.dataset != "regress"
        for name in ("n_windows", "valid_share"):
            assert other[name] == getattr(row, name)
        assert other["value"] == (row.value if exact else pytest.approx(row.value, rel=1e-6, abs=1e-6))
        assert other["floor"] == (row.floor if exact or row.floor is None else pytest.approx(row.floor, abs=1e-6))


def test_weights_and_losses_are_those_of_one_process(one: Runs, two: Runs) -> None:
    same_training(one["several"], two["several"], steps=20)


def test_the_same_samples_are_drawn(one: Runs, two: Runs) -> None:
    for name in ("several", "all"):
        assert drawn(two[name], name, 2) == drawn(one[name], name, 1)


def test_metrics_do_not_depend_on_the_processes(one: Runs, two: Runs) -> None:
    same_metrics(two["all"], one["all"])


def test_a_step_is_what_was_asked_for(one: Runs) -> None:
    steps = drawn(one["several"], "several", 1)
    assert {len(step) for step in steps} == {6}
    for step in steps:
        assert sorted(name for name, _ in step[:3]) == ["classify", "regress", "segment"]


@pytest.mark.slow
def test_three_processes_and_one_dataset_a_step(tmp_path: Path, data: dict[str, tuple[str, str]]) -> None:
    names = ("single", "several", "all")
    one, three = (runs_of(tmp_path / str(world), data, names=names, world=world) for world in (1, 3))
    same_training(one["single"], three["single"], steps=24)
    same_training(one["several"], three["several"], steps=20)
    same_metrics(three["all"], one["all"])
    for name in names:
        assert drawn(three[name], name, 3) == drawn(one[name], name, 1)


def uneven(folder: Path, *, largest: int) -> dict[str, Any]:
    """A dataset of one window, one of seven, and a larger one."""
    sizes = {"classify": 1, "segment": 7, "regress": largest}
    data = {kind: (str(write_dataset(folder / kind, kind, train=n, val=1)), kind) for kind, n in sizes.items()}
    return joint(data, epochs=2)


def dumped(config: dict[str, Any]) -> str:
    """In the order as it is, in which initial weights are drawn."""
    return yaml.safe_dump(config, sort_keys=False)


def helios_run(run: RunDir) -> list[str]:
    return ["-m", "rslp.main", "helios", "run", "--run_dir", str(run.path)]


def warn_and_wait(run: RunDir, **where: Any) -> list[tuple[int, str]]:
    """Run on two processes, of which one is sent SIGTERM; the run's config is put back."""
    text = run.config.read_text()
    config = yaml.safe_load(text)
    at = {"class_path": "tests.train.ranks.Terminate", "init_args": where}
    run.config.write_text(dumped({**config, "trainer": {**config["trainer"], "callbacks": [at]}}))
    ended = finish(start_ranks(helios_run(run), world=2))
    run.config.write_text(text)
    return ended


def test_a_warning_to_one_process_saves_once_and_ends_both_with_143(tmp_path: Path) -> None:
    run = RunDir(place(tmp_path, "uneven", uneven(tmp_path / "data", largest=9), world=2, batch=4))
    ended = warn_and_wait(run, rank=1, step=2)
    assert [code for code, _ in ended] == [143, 143], ended
    assert read_checkpoint(run.last)["global_step"] == 3
    assert json.loads((run.path / "state.json").read_text())["state"] == "preempted"
    assert ended[0][1].endswith("the same command goes on from epoch 0, step 3\n")
    assert ended[1][1] == ""  # the first process alone speaks


@pytest.mark.slow
def test_a_run_that_was_warned_ends_like_one_that_was_not(tmp_path: Path) -> None:
    config = uneven(tmp_path / "data", largest=9)
    one, two = (RunDir(place(tmp_path, "uneven", config, world=world, batch=4)) for world in (1, 2))
    assert fit(one) == 0
    assert [code for code, _ in warn_and_wait(two, rank=1, step=2)] == [143, 143]
    ended = finish(start_ranks(helios_run(two), world=2))
    assert [code for code, _ in ended] == [0, 0], ended
    same_training(one, two, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_datasets_of_1_7_and_1000_windows_never_hang(tmp_path: Path, world: int) -> None:
    config = uneven(tmp_path / "data", largest=1000)
    config["data"]["init_args"]["datasets_per_step"] = 2
    run = RunDir(place(tmp_path, "uneven", config, world=world, batch=12))
    train_on(world, [run.path])
    assert run.done() is not None


@pytest.mark.slow
def test_a_warning_during_a_validation_ends_both_with_143(tmp_path: Path) -> None:
    config = uneven(tmp_path / "data", largest=9)
    run = RunDir(place(tmp_path, "uneven", config, world=2, batch=4))
    ended = warn_and_wait(run, rank=0, step=6, validating=True)
    assert [code for code, _ in ended] == [143, 143], ended


@pytest.mark.slow
def test_torchrun_starts_a_run_and_ends_with_1_when_it_is_preempted(tmp_path: Path) -> None:
    run = RunDir(place(tmp_path, "uneven", uneven(tmp_path / "data", largest=9), world=2, batch=4))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "RSLP_RANKS": "torchrun", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, *helios_run(run)]
    config = yaml.safe_load(run.config.read_text())
    at = {"class_path": "tests.train.ranks.Terminate", "init_args": {"rank": 1, "step": 2}}
    run.config.write_text(dumped({**config, "trainer": {**config["trainer"], "callbacks": [at]}}))
    assert subprocess.run(command, env=environment, check=False, timeout=TIMEOUT).returncode == 1
    assert json.loads((run.path / "state.json").read_text())["state"] == "preempted"
    run.config.write_text(dumped(config))
    subprocess.run(command, env=environment, check=True, timeout=TIMEOUT)
    assert (run.done() or {})["step"] == 12
