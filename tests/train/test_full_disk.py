"""A disk that is full at any write of a run: one line, nothing torn; the same command goes on to the same weights."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rslp.errors import DiskError
from rslp.io import append, write_atomic
from rslp.rundir import RunDir
from rslp.train.checkpoints import _states, bytes_of, read_checkpoint
from rslp.train.fit import fit
from tests.forks import Forks
from tests.tiny import run_config, write_dataset, write_run
from tests.train.full_disk import PAGE, Fault, Harness, fill, record, small_disk, sweep
from tests.train.ranks import ROOT

RECORD = ROOT / "docs" / "records" / "full-disk.md"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Harness]:
    folder = tmp_path_factory.mktemp("full")
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(folder / "disk", size=16 << 20))
        except PermissionError:
            disk = folder
        harness = Harness(disk, folder / "aside", forks)
        harness.prepare()
        yield harness


@pytest.mark.parametrize(
    ("command", "kind", "number"),
    [
        ("compose", "size", 1000),
        pytest.param("launch", "size", 1000, marks=pytest.mark.slow),
        ("detach", "call", 6),
        pytest.param("pack", "size", 1000, marks=pytest.mark.slow),
        # The folder of the sample cache.
        ("pack", "call", 2),
        ("fit", "size", 10_000),
        ("fit", "pages", 20),
        # The first checkpoint.
        pytest.param("fit", "call", 31, marks=pytest.mark.slow),
        ("test", "size", 100),
        ("predict", "size", 100),
        pytest.param("predict", "pages", 1, marks=pytest.mark.slow),
    ],
)
def test_each_command_ends_in_one_line_and_goes_on(harness: Harness, command: str, kind: str, number: int) -> None:
    if kind == "pages" and not harness.own_disk:
        pytest.skip("no file system can be mounted here")
    assert harness.attempt(command, Fault(kind, number, errno.ENOSPC))
    assert harness.tallies[command].wrong == []


@pytest.mark.slow
def test_a_log_that_takes_no_more_ends_no_run(harness: Harness, tmp_path: Path) -> None:
    if not harness.own_disk:
        pytest.skip("no file system can be mounted here")
    with small_disk(tmp_path / "logs", size=1 << 20) as disk:
        log = disk / "fit.log"
        log.write_text("x")
        fill(disk / "filler", free=0)
        harness.train_into(log)
        assert log.stat().st_size <= PAGE


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_a_fault_at_every_write(harness: Harness) -> None:
    kinds = ("pages", "size", "call") if harness.own_disk else ("size", "call")
    sweep(harness, kinds=kinds, every=3, rng=random.Random(0))
    RECORD.write_text(record(harness.tallies, every=3))
    assert [tally.wrong for tally in harness.tallies.values()] == [[]] * 7
    assert sum(tally.ended for tally in harness.tallies.values()) > 50


@pytest.mark.parametrize("write", [write_atomic, append])
def test_a_file_that_does_not_fit_is_left_as_it_was(
    tmp_path: Path, write: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("/dev/shm") / f"rslp-test-{tmp_path.name}" / "file"
    write_atomic(path, "before\n")
    try:
        with pytest.raises(
            DiskError, match=r"^/dev/shm/.*/file can't be written: .* \(.* bytes needed, .* bytes free in "
        ):
            _within(1 << 20, lambda: write(path, b"x" * (2 << 20)))  # type: ignore[operator]
        assert path.read_text() == "before\n"
        assert [one.name for one in path.parent.iterdir()] == ["file"]
    finally:
        shutil.rmtree(path.parent)


def _within(size: int, call: object) -> None:
    import resource

    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        call()  # type: ignore[operator]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_checkpoints_that_will_not_fit_are_said_before_the_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config({"regress": (str(write_dataset(tmp_path / "data", "regress")), "regress")}, epochs=1)
    run = write_run(tmp_path, config)
    monkeypatch.setattr("rslp.train.checkpoints.shutil.disk_usage", lambda _: SimpleNamespace(free=1234))
    fit(run)
    said = [line for line in capsys.readouterr().err.splitlines() if "bytes are free" in line]
    last, best = (read_checkpoint(path) for path in (run.last, run.best()))
    states = [value for state in last["optimizer_states"][0]["state"].values() for value in state.values()]
    moments = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.ndim)
    weights = sum(value.nbytes for value in best["state_dict"].values())
    needed = 3 * (weights + moments) + 2 * weights
    assert said == [
        f"warning: {run.checkpoints} needs about {needed:,} bytes more (last.ckpt, previous.ckpt, 2 of best weights, "
        "and one more during a write), and 1,234 bytes are free there"
    ]
    fit(RunDir(run.path))
    monkeypatch.setattr("rslp.train.checkpoints.shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    config["trainer"]["max_epochs"] = 2
    run.config.write_text(json.dumps(config))
    capsys.readouterr()
    fit(run)
    assert "bytes are free" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9)],
)
def test_what_an_optimiser_keeps_is_known_before_its_first_step(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    weights = torch.nn.Linear(30, 20)
    made = optimizer(weights.parameters(), lr=0.1)
    expected = _states(made.param_groups[0]) * sum(p.nbytes for p in weights.parameters())
    weights(torch.ones(30)).sum().backward()
    made.step()
    kept = {key: {k: v for k, v in state.items() if k != "step"} for key, state in made.state_dict()["state"].items()}
    assert bytes_of(kept) == expected
