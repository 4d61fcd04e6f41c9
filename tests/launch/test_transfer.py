"""What lies in the store can always go on, whenever the sending was cut off."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from rslp.errors import StoreError
from rslp.io import ObjectStore
from rslp.launch.remote import DONE, LAST, PREDICTED, PREVIOUS, RunUploader, download_run


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("." + path.name)
    partial.write_text(text)
    partial.replace(path)


def train(folder: Path, step: int) -> None:
    """What a run writes at a step, in its order."""
    with (folder / "metrics.csv").open("a") as log:
        log.write(f"{step}\n")
    write(folder, "checkpoints/best.ckpt", f"best of {step}")
    write(folder, "checkpoints/previous.ckpt", f"last of {step - 1}")
    write(folder, LAST, f"last of {step}")
    write(folder, "state.json", f"state of {step}")


def test_there_and_back(s3: ObjectStore, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("config.yaml", "lock", ".hidden", "checkpoints/.last.ckpt.tmp", "code/x.zip", "logs/rank1.log"):
        write(here, name, name)
    pusher = RunUploader(here)
    for step in (1, 2):
        train(here, step)
        assert pusher.push(s3) > 0
    write(here, DONE, "done")
    assert pusher.push(s3) == 1
    assert pusher.push(s3) == 0
    sent = {"config.yaml", "logs/rank1.log", "metrics.csv", "checkpoints/best.ckpt", "state.json", LAST, PREVIOUS, DONE}
    assert set(s3.sizes()) == sent
    download_run(s3, there)
    assert {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()} == sent
    assert (there / LAST).read_text() == "last of 2"
    assert (there / PREVIOUS).read_text() == "last of 1"
    # More epochs: the marker of success goes first.
    (here / DONE).unlink()
    pusher.push(s3)
    assert s3.read(DONE) is None


def test_only_a_prediction_takes_predictions_along_and_its_marker_comes_last(s3: ObjectStore, tmp_path: Path) -> None:
    here, fit, again = (tmp_path / name for name in ("here", "fit", "again"))
    for name in ("config.yaml", "predictions/a/g/w/a.tif", "predictions/progress.jsonl"):
        write(here, name, name)
    pusher = RunUploader(here)
    pusher.push(s3)
    (here / "predictions/progress.jsonl").unlink()
    write(here, PREDICTED, "all")
    write(here, "predictions/a/g/w2/a.tif", "the last one")
    failing = Failing(s3.root, patience=0)
    object.__setattr__(failing, "left", 1)
    with pytest.raises(StoreError):
        pusher.push(failing)
    assert s3.read(PREDICTED) is None and s3.read("predictions/a/g/w2/a.tif") is not None
    pusher.push(s3)
    assert set(s3.sizes()) == {"config.yaml", "predictions/a/g/w/a.tif", "predictions/a/g/w2/a.tif", PREDICTED}
    download_run(s3, fit)
    assert not (fit / "predictions").exists()
    training = RunUploader(fit)
    training.mark_all_as_sent()
    training.push(s3)
    assert "predictions/a/g/w/a.tif" in s3.sizes()
    download_run(s3, again, predictions=True)
    assert (again / "predictions/a/g/w/a.tif").read_text() == "predictions/a/g/w/a.tif"


class Failing(ObjectStore):
    """A store whose network breaks after so many changes."""

    left = 0
    log: tuple[str, ...] = ()

    def _change(self, name: str) -> None:
        if self.left <= 0:
            raise StoreError("the network is gone")
        object.__setattr__(self, "left", self.left - 1)
        object.__setattr__(self, "log", (*self.log, name))

    def upload(self, source: Path, name: str) -> None:
        self._change(name)
        super().upload(source, name)

    def copy(self, name: str, other: str) -> None:
        self._change(other)
        super().copy(name, other)


@pytest.mark.parametrize("cut", range(10))
def test_cut_off_anywhere_log_and_best_are_never_older_than_the_checkpoint(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, here = random.Random(cut), tmp_path / "here"
    here.mkdir()
    store = Failing(f"memory://cut-{cut}/projects/p/e")
    pusher = RunUploader(here)
    for step in range(1, 6):
        train(here, step)
        if step == 5:
            write(here, DONE, "done")
        object.__setattr__(store, "left", cut if step == 3 else rng.randrange(8) if step < 5 else 99)
        try:
            pusher.push(store)
        except StoreError:
            assert step < 5
        last = (store.read(LAST) or b"last of 0").decode().split()[-1]
        log = (store.read("metrics.csv") or b"").decode().split()
        best = (store.read("checkpoints/best.ckpt") or b"best of 0").decode().split()[-1]
        assert int(best) >= int(last) and log[: int(last)] == [str(n) for n in range(1, int(last) + 1)]
    assert store.log[-1] == DONE


def test_the_checkpoint_that_is_sent_is_whole_though_a_new_one_comes_meanwhile(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    train(here, 1)

    class Slow(ObjectStore):
        def upload(self, source: Path, name: str) -> None:
            if name == "metrics.csv":
                train(here, 2)
            super().upload(source, name)

    store: Any = Slow("memory://meanwhile/projects/p/e")
    RunUploader(here).push(store)
    assert store.read(LAST) == b"last of 1"
