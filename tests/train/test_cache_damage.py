"""Whatever happens to a file of the caches, a run reads the values that it would have read, or says why it can't."""

from __future__ import annotations

import copy
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from rslp.data.cache import segments
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests.tiny import write_run
from tests.train import cache_damage
from tests.train.cache_damage import Truth, case, cases, flip, folder, heard, kind_of, prepared, start
from tests.train.ranks import ROOT

RECORD = ROOT / "docs" / "records" / "damage-caches.md"


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return prepared(tmp_path_factory.mktemp("damage"))


def files(truth: Truth, kind: str) -> list[Path]:
    found = [file for file in truth.files() if kind_of(file) == kind]
    assert found, kind
    return found


def test_a_flipped_bit_and_a_cut_in_each_kind_of_file(truth: Truth) -> None:
    kinds = {kind_of(file) for file in truth.files()}
    found = list(cases(truth, 2 * len(kinds), seed=1))
    assert {kind_of(file) for file, _, _ in found} == kinds
    assert {damage for _, damage, _ in found} == {"flip", "cut"}
    assert sum(outcome == "made anew, one line" for _, _, outcome in found) >= 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_damage_to_every_kind_of_file(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.cache_damage", str(tmp_path), "--record", str(RECORD)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) >= 300
    assert {damage for _, damage, _ in found} == {damage.__name__ for damage in cache_damage.DAMAGES}


@pytest.mark.parametrize("kind", ["sample cache, .seg", "feature cache, .seg"])
def test_without_checksums_the_flips_would_be_wrong_values(
    truth: Truth, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = segments._Segment.view

    def trusted(self: Any, end: int) -> memoryview:
        found = view(self, end)
        self.checked = bytearray(b"\xff" * len(self.checked))
        return found

    monkeypatch.setattr(segments._Segment, "view", trusted)
    wrong = 0
    for seed in range(12):
        rng = Random(seed)
        try:
            case(truth, rng.choice(files(truth, kind)), flip, rng)
        except Exception:  # noqa: BLE001 (an array that differs, or whatever comes of a head that is none)
            wrong += 1
    assert wrong


def test_a_cache_that_was_copied_half(truth: Truth) -> None:
    for seed in range(3):
        truth.put_back()
        for file in Random(seed).sample(truth.files(), len(truth.files()) // 2):
            (truth.caches / file).unlink()
        start(truth)
        assert not start(truth)


def test_processes_that_read_a_damaged_file_at_once(truth: Truth) -> None:
    truth.put_back()
    for kind in ("sample cache, .seg", "feature cache, .seg"):
        for file in files(truth, kind):
            raw = bytearray((truth.caches / file).read_bytes())
            raw[::50] = bytes(byte ^ 1 for byte in raw[::50])
            (truth.caches / file).write_bytes(raw)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=start, args=(truth,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    start(truth)
    assert not start(truth)


def damaged_segments(truth: Truth) -> int:
    for kind in ("sample cache, .seg", "feature cache, .seg"):
        for file in files(truth, kind):
            raw = bytearray((truth.caches / file).read_bytes())
            raw[1] ^= 1
            (truth.caches / file).write_bytes(raw)
    return 1


def test_checking_reads_both_caches(truth: Truth) -> None:
    truth.put_back()
    assert checked(truth)[1] == 0
    damaged_segments(truth)
    records, bad = checked(truth)
    # Images and labels of six windows, and the features of five.
    assert records >= 2 * 5 + 5
    for kind in ("sample cache, .seg", "feature cache, .seg"):
        assert bad >= len(files(truth, kind))
    for _ in range(2):
        start(truth)
    assert checked(truth)[1] == 0


def checked(truth: Truth) -> tuple[int, int]:
    store = MultiDatasetDataModule(truth.modules, num_workers=0).sample_cache("classify")
    assert store is not None
    return store.check()


def things_in_the_way(truth: Truth) -> int:
    for kind in ("feature cache, in-use", "sample cache, .cat"):
        for file in files(truth, kind):
            folder(truth.caches / file, Random(0))
    return 2


@pytest.mark.parametrize("damage", [damaged_segments, things_in_the_way])
def test_a_run_on_damaged_caches_is_the_same_run(truth: Truth, tmp_path: Path, damage: Callable[[Truth], int]) -> None:
    truth.put_back()
    least = damage(truth)
    config = copy.deepcopy(truth.config)
    config["data"]["init_args"]["num_workers"] = 1
    run = write_run(tmp_path, config)
    with heard() as lines:
        assert fit(run) == 0
    assert len(lines) >= least
    assert all("classify" in line for line in lines)
    weights, expected = (read_checkpoint(one.last)["state_dict"] for one in (run, truth.run))
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            # Features of a sample that is encoded in another batch differ in their last bits.
            assert torch.allclose(weights[name], value, rtol=1e-4, atol=1e-6), name
