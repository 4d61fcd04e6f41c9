"""A run has an id, which its checkpoints carry: one of another run, of the same shapes, is not taken for its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rslp.errors import CheckpointError, RunError
from rslp.evaluate.evaluation import evaluate
from rslp.evaluate.prediction import predict
from rslp.rundir import RunDir
from rslp.train.checkpoints import RUN_KEY, read_checkpoint
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and two runs on it, alike in all but their weights."""
    folder = tmp_path_factory.mktemp("two")
    data = str(write_dataset(folder / "data", "classify", train=4, val=2, test=1))
    for name in ("a", "b"):
        config = run_config({"classify": (data, "classify")}, epochs=1, store=str(folder / "store"))
        config["trainer"]["enable_progress_bar"] = False
        config["trainer"]["callbacks"] = [
            {"class_path": "rslp.train.checkpoints.RunCheckpoints",
             "init_args": {"run_dir": str(folder / name / "projects" / "tests" / "tiny"), "every_n_steps": 1}}
        ]  # fmt: skip
        assert fit(write_run(folder / name, {**config, "seed": int(name == "b")})) == 0
    return folder


@pytest.fixture
def runs(two: Path, tmp_path: Path) -> tuple[RunDir, RunDir]:
    """Copies of the two; the config of the first asks for one epoch more."""
    made = []
    for name in ("a", "b"):
        run = RunDir(tmp_path / name)
        shutil.copytree(two / name / "projects" / "tests" / "tiny", run.path)
        text = run.config.read_text().replace(str(two / name / "projects" / "tests" / "tiny"), str(run.path))
        run.config.write_text(text.replace("max_epochs: 1", "max_epochs: 2"))
        made.append(run)
    return made[0], made[1]


def identity(run: RunDir) -> str:
    found: str = json.loads(run.state.read_text())["run_id"]
    return found


def test_a_run_keeps_its_id_and_gives_it_to_its_checkpoints(runs: tuple[RunDir, RunDir]) -> None:
    own, other = map(identity, runs)
    assert own != other
    assert fit(runs[0]) == 0
    assert identity(runs[0]) == own
    checkpoints = sorted(runs[0].checkpoints.glob("*.ckpt"))
    assert {path.stem for path in checkpoints} == {"best", "best-classify", "last", "previous"}
    assert {read_checkpoint(path)[RUN_KEY] for path in checkpoints} == {own}


def test_a_resume_from_another_runs_checkpoint_is_refused(runs: tuple[RunDir, RunDir]) -> None:
    run, other = runs
    own, found = map(identity, runs)
    shutil.copyfile(other.last, run.last)
    before = run.metrics.read_bytes()
    with pytest.raises(RunError) as refused:
        fit(run)
    assert all(part in str(refused.value) for part in (str(run.last), own, found, "move that one away"))
    assert "\n" not in str(refused.value)
    assert run.metrics.read_bytes() == before
    run.last.unlink()
    assert fit(run) == 0


def test_nor_is_it_evaluated_as_if_it_were_the_runs_own(runs: tuple[RunDir, RunDir]) -> None:
    run, other = runs
    shutil.copyfile(other.best(), run.best())
    with pytest.raises(RunError, match="another run"):
        evaluate(run, splits=("val",))
    with pytest.raises(RunError, match="another run"):
        predict(run)
    # Named where it lies, it is what was asked for.
    assert evaluate(run, splits=("val",), checkpoint=str(other.best()))


def without_ids(run: RunDir) -> None:
    """As a version without ids has left it."""
    state = json.loads(run.state.read_text())
    run.state.write_text(json.dumps({key: state[key] for key in ("state", "epoch", "step", "score", "heartbeat")}))
    for path in run.checkpoints.glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        del content[RUN_KEY]
        torch.save(content, path)
    done = json.loads(run.done_marker.read_text())
    del done["crc32"]
    run.done_marker.write_text(json.dumps(done))


def test_a_run_of_an_earlier_version_goes_on_and_gets_an_id(runs: tuple[RunDir, RunDir]) -> None:
    run, _ = runs
    without_ids(run)
    assert fit(run) == 0
    assert read_checkpoint(run.last)[RUN_KEY] == identity(run)


def test_a_run_whose_state_is_torn_takes_its_id_from_its_checkpoint(
    runs: tuple[RunDir, RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = runs
    own = identity(run)
    run.state.write_text('{"state": "ru')
    assert fit(run) == 0
    said = capsys.readouterr().err
    assert f"warning: {run.state} is damaged" in said
    assert identity(run) == own == read_checkpoint(run.last)[RUN_KEY]


def test_a_copied_run_directory_is_the_same_run(runs: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    run, _ = runs
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    copy.config.write_text(copy.config.read_text().replace(str(run.path), str(copy.path)))
    assert fit(copy) == 0
    assert identity(copy) == identity(run)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_both_are_an_error(
    runs: tuple[RunDir, RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    reference, _ = runs
    run = RunDir(reference.path.with_name("damaged"))
    shutil.copytree(reference.path, run.path)
    run.config.write_text(run.config.read_text().replace(str(reference.path), str(run.path)))
    assert fit(reference) == 0
    flip_middle(run.last)
    assert fit(run) == 0
    said = capsys.readouterr().err
    assert f"warning: {run.last} can't be read as a checkpoint: it is damaged: " in said
    assert f"going on from {run.last.with_name('previous.ckpt')}" in said
    ends = [read_checkpoint(one.last)["state_dict"] for one in (reference, run)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    for path in (run.last, run.last.with_name("previous.ckpt"), run.best()):
        flip_middle(path)
    capsys.readouterr()
    with pytest.raises(CheckpointError, match=r"^no checkpoint can be resumed from; remove them to start anew: .*$"):
        fit(run)
    assert capsys.readouterr().err == ""
    with pytest.raises(CheckpointError, match=r"best\.ckpt can't be read .*--checkpoint names another"):
        evaluate(run, splits=("val",))


def flip_middle(path: Path) -> None:
    """Flip a bit of a weight."""
    raw = bytearray(path.read_bytes())
    weight = next(
        tensor for name, tensor in torch.load(path, weights_only=True)["state_dict"].items() if "0.weight" in name
    )
    raw[raw.index(weight.numpy().tobytes()) + 3] ^= 1
    path.write_bytes(raw)
