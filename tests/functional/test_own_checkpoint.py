"""Evaluations and predictions with a checkpoint that is named, and what a terminal without UTF-8 shows of a run.

The launcher becomes the job's process; here that is a child of this one, which has imported what takes seconds.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rslp.rundir import RunDir
from rslp.train.fit import fit
from tests.children import in_a_child
from tests.tiny import run_config, write_dataset, write_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDir]:
    """A run config, and a run of another experiment that was trained with it."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_dataset(folder / "blé", "segment", train=4, val=2, test=2)
    config = run_config({"blé": (str(path), "segment")}, epochs=1)
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run = write_run(folder, config)
    assert fit(run) == 0
    return folder / "run.yaml", run


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: tuple[Path, RunDir]) -> Any:
    """Launches an experiment here, with the words of a mode; the exit code."""
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path))

    def launched(experiment: str, *words: str, config: Path = trained[0]) -> int:
        start = ["helios", "launch_finetune", "--experiment_id", experiment, "--rslp_project", "p", "--local", "true"]
        return in_a_child([*start, f"--config_paths+={config}", "--check", "false", *words])

    return launched


@pytest.mark.parametrize("existing", [False, True])
def test_a_named_checkpoint_serves_a_new_and_an_old_experiment(
    tmp_path: Path, trained: tuple[Path, RunDir], launch: Any, existing: bool
) -> None:
    run = RunDir.of(tmp_path, "p", "x")
    if existing:
        assert launch("x") == 0
        before = run.config.read_bytes(), run.last.read_bytes(), run.done_marker.read_bytes()
    named = ("--checkpoint", str(trained[1].best()))
    for mode in ("predict", "validate", "test"):
        assert launch("x", "--mode", mode, *named) == 0
        if mode == "predict":
            marker = json.loads(run.prediction_marker.read_text())
            assert marker["checkpoint"] == str(trained[1].best())
            assert marker["datasets"]["blé"]["windows"] == 2
            assert run.config.exists() == existing
    assert list((run.path / "eval").rglob("test.json"))
    if existing:
        assert before == (run.config.read_bytes(), run.last.read_bytes(), run.done_marker.read_bytes())
    else:
        # The run can still be trained.
        assert not run.done_marker.exists()
        assert launch("x") == 0


@pytest.mark.parametrize("mode", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), ("best.ckpt", "train the run first")),
        (("--checkpoint", "nowhere.ckpt"), ("nowhere.ckpt",)),
        (("--checkpoint", "/"), ("no checkpoint /",)),
    ],
)
def test_without_a_checkpoint_nothing_is_made(
    tmp_path: Path,
    launch: Any,
    capfd: pytest.CaptureFixture[str],
    mode: str,
    words: tuple[str, ...],
    names: tuple[str, ...],
) -> None:
    assert launch("new", "--mode", mode, *words) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and all(name in said for name in names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_another_encoding_shows_question_marks(
    launch: Any, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], encoding: str
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, name, stream)
    commands: list[list[str]] = [[], ["--do_eval", "true"], ["--mode", "predict"]]
    assert [launch("x", *words) for words in commands] == [0, 0, 0]
    assert in_a_child(["helios", "jobs"]) == 0
    assert in_a_child(["helios", "check", "--config_paths+=/no/such/blé→.yaml"]) == 2
    output, error = (text.decode(encoding) for text in capfdbinary.readouterr())
    assert "done: 1 epoch" in error and "Traceback" not in error + output
    assert ("bl?" if encoding == "ascii" else "blé") in output
    assert "bl" in error and "→" not in error


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii:strict"},
    ],
)
def test_a_process_says_what_it_has_to_say_in_any_locale(tmp_path: Path, environment: dict[str, str]) -> None:
    """What a batch system gives a job, as the first words of a process meet it."""
    command = [sys.executable, "-m", "rslp.main", "helios", "make_multidataset_config", "--cfg", "•→\u00e9.yaml"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **environment}, cwd=tmp_path)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
