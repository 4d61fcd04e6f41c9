"""The same start gives the same weights: whatever the hashes of strings, the order of directories, the workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from rslp.rundir import RunDir
from tests.train.ranks import ROOT, finish, start_ranks
from tests.train.starts import digest_of, environment_of, left_by_run, left_in_caches, unlike
from tests.train.two_sensors import ENCODERS, freezing, run_config, write_place

# What every start leaves behind: if one were missing, nothing would be compared.
KINDS = ("state_dict", "optimizer_states", "metrics.csv", "val.json", ".idx", "records-", "features/")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("two") / "place")


def prepared(place: Path, folder: Path, *, workers: int) -> list[RunDir]:
    """For each encoder a run that keeps its features, and one that trains it."""
    runs = []
    for encoder in ENCODERS:
        kept, trained = (run_config(place, encoder, workers=workers, epochs=n, store=str(folder)) for n in (2, 1))
        for name, config in (("frozen", freezing(kept, thaw_at_epoch=None)), ("trained", trained)):
            run = RunDir(folder / "projects" / encoder / name)
            run.path.mkdir(parents=True)
            run.config.write_text(yaml.safe_dump(config, sort_keys=False))
            runs.append(run)
    return runs


def started(place: Path, folder: Path, *, seed: int, workers: int, world: int) -> dict[str, str]:
    """Train in processes of their own; what they leave behind."""
    runs = prepared(place, folder, workers=workers)
    command = ["-m", "tests.train.ranks", *(str(run.path) for run in runs)]
    ended = finish(start_ranks(command, world=world, environment=lambda rank: environment_of(10 * seed + rank)))
    assert [code for code, _ in ended] == [0] * world, "\n".join(output[-3000:] for _, output in ended)
    left = {f"{run.project}/{run.experiment}: {name}": made for run in runs for name, made in left_by_run(run).items()}
    return left | left_in_caches(folder / "stores")


def differences(place: Path, folder: Path, starts: Sequence[tuple[int, int]], *, world: int = 1) -> list[str]:
    """How starts (hash seed and workers) differ."""
    left = {
        f"seed {seed} with {workers} workers": started(
            place, folder / f"{world}-{seed}-{workers}", seed=seed, workers=workers, world=world
        )
        for seed, workers in starts
    }
    kinds = {kind for one in left.values() for name in one for kind in KINDS if kind in name}
    assert kinds == set(KINDS)
    return unlike(left)


COMPOSE = "helios make_multidataset_config --cfg example/multi_dataset.yaml"
LAUNCH = "--config_paths+=example/OUT_two.yaml --rslp_project p --experiment_id e --check false --dry_run true"


@pytest.mark.parametrize(
    ("lines", "seeds"),
    [
        ([COMPOSE], 3),
        pytest.param(
            [
                COMPOSE,
                "helios check --config_paths+=example/OUT_two.yaml",
                f"helios launch_finetune {LAUNCH} --local true",
                f"helios launch_finetune {LAUNCH} --engine slurm",
                "tables",
            ],
            5,
            marks=[pytest.mark.slow, pytest.mark.timeout(1800)],
        ),
    ],
)
def test_every_start_writes_the_same_texts(place: Path, tmp_path: Path, lines: list[str], seeds: int) -> None:
    texts = {}
    for seed in range(seeds):
        folder = tmp_path / str(seed)
        shutil.copytree(place, folder / "example")
        environment = {**os.environ, **environment_of(seed), "PYTHONPATH": str(ROOT), "RSLP_PREFIX": "/prefix"}
        environment["RSLEARN_LOGLEVEL"] = "WARNING"  # its lines tell the time
        command = [sys.executable, "-m", "tests.train.starts", *lines]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        written = [*folder.glob("*.json"), *folder.glob("example/OUT*")]
        assert written
        texts[f"seed {seed}"] = {path.name: digest_of(path.read_text()) for path in sorted(written)} | {
            "what is said": done.stdout.replace(str(folder), "")
        }
    assert unlike(texts) == []


# Quick tests of the same: kills under two hash seeds (test_kills.py), no order of a set in the code (test_order.py).
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2])
def test_five_starts_leave_the_same_behind(place: Path, tmp_path: Path, world: int) -> None:
    starts = [(seed, workers) for seed in range(5) for workers in (0, 2)]
    assert differences(place, tmp_path, starts, world=world) == []
