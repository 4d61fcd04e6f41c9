"""What a run says: the same count of epochs, the time left, each warning once, and nothing of bars in files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from rslp.io.terminal import counted
from rslp.train import quiet
from tests import children
from tests.tiny import run_config, write_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was trained in the foreground; its output is in the file ``output``."""
    folder = tmp_path_factory.mktemp("foreground")
    config = run_config({"a": (str(write_dataset(folder / "data", "classify")), "classify")}, epochs=2)
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    words = ["--config_paths+=run.yaml", "--experiment_id", "x", "--local", "true", "--check", "false"]
    command = [sys.executable, "-m", "rslp.main", "helios", "launch_finetune", *words]
    with (folder / "output").open("w") as output:
        process = children.Python(
            command, cwd=folder, env=environment(folder), stdout=output.fileno(), stderr=output.fileno()
        )
        assert process.wait() == 0, (folder / "output").read_text()
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "RSLP_PREFIX": str(folder / "runs"), "RSLP_TRUST": "tests", "PYTHONPATH": str(ROOT)}


def test_a_file_gets_lines_and_no_bars(place: Path) -> None:
    output = (place / "output").read_text()
    first, last = re.findall(r"^epoch .*$", output, re.MULTILINE)
    assert re.fullmatch(r"epoch 1/2  score \d\.\d+  a \d\.\d+  0:00:\d\d left", first), first
    assert last.startswith("epoch 2/2  score") and "left" not in last
    assert not re.search(r"[━╸\x1b\r]|Epoch", output), output


def test_logs_of_a_run_in_the_foreground(place: Path) -> None:
    words = ["helios", "logs", "--rslp_project", "helios_finetuning", "--experiment_id", "x"]
    done = children.rslp(*words, cwd=place, environment=environment(place))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^epoch 1/2  score .* left\nepoch 2/2  score ", done.stdout, re.MULTILINE), done.stdout
    assert "done: 2 epochs, 6 steps" in done.stdout


def test_a_warning_is_shown_once_however_often_filters_change() -> None:
    shown: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: shown.append(str(message))
        quiet._show_warnings_once()
        quiet._show_warnings_once()
        for number in (0, 1, 0, 1):
            warnings.filterwarnings("ignore", message=f"other {number}")
            warnings.warn(f"text {number}", stacklevel=1)
    assert shown == ["text 0", "text 1"]


@pytest.mark.parametrize(("number", "text"), [(0, "0 datasets"), (1, "1 dataset"), (1200, "1,200 datasets")])
def test_one_is_no_plural(number: int, text: str) -> None:
    assert counted(number, "dataset") == text


def test_stage_1_counts_one_dataset(tmp_path: Path) -> None:
    from tests.study.small import write_study

    write_study(tmp_path, sizes={"train": 1, "val": 1, "test": 1})
    multi = yaml.safe_load((tmp_path / "multi.yaml").read_text())
    (tmp_path / "multi.yaml").write_text(yaml.safe_dump({**multi, "dataset_cfgs": ["classes.yaml"]}))
    command = [sys.executable, str(ROOT / "make_multidataset_config.py"), "--cfg", "multi.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "wrote OUT.yaml (1 dataset: classes)" in done.stdout, done.stderr
