"""Reads that never return: a pipe is refused at once, any other is told of, and given up after ``read_timeout``."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rslp.cli.main import main
from rslp.data.bad_samples import BadSamplePolicy
from rslp.errors import ConfigError, DataError
from rslp.runtime import slow_reads
from rslp.runtime.slow_reads import SlowReadWatch, read_with_notice
from rslp.train.fit import fit
from rslp.upstream import nodata, vectors
from tests.data.test_bad_samples import file_of, source
from tests.tiny import run_config, write_dataset, write_run


def with_pipe(folder: Path, layer: str = "image", window: str = "w000") -> Path:
    """A dataset with a pipe, which nobody writes to, in place of a window's file."""
    path = write_dataset(folder / "data", "classify", train=4, val=2, test=1)
    make_pipe(file_of(path, layer, window))
    return path


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def of(path: Path, **data: Any) -> dict[str, Any]:
    return run_config({"classify": (str(path), "classify")}, epochs=1, **data)


@pytest.fixture
def blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes are not looked for: GDAL waits for them as it does for a dead mount. A read is slow after a moment."""
    for module in (nodata, vectors):
        monkeypatch.setattr(module, "refuse_pipes", str)
    monkeypatch.setattr(slow_reads, "FIRST", 0.2)
    monkeypatch.setattr(slow_reads, "AGAIN", 0.4)
    slow_reads.slow_read_watch._end()  # one that began earlier looks every 15 s


@pytest.mark.parametrize("layer", ["image", "label"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(layer: str, tmp_path: Path) -> None:
    found = source(with_pipe(tmp_path, layer), "classify")
    index = next(i for i in range(len(found)) if "/w000/" in found.identity(i))
    message = rf"^crops/default/w000/0_0_8_8: layer {layer}: can't read the sample: ValueError: .* is a pipe, a socket"
    with pytest.raises(DataError, match=message):
        found.sample(index)


@pytest.mark.parametrize("name", ["config.json", "windows/default/w001/metadata.json"])
@pytest.mark.parametrize("store", ["off", "auto"])
def test_a_pipe_in_place_of_a_description(
    name: str, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dataset(tmp_path / "data", "classify", train=2, val=1, test=1)
    make_pipe(path / name)
    run = write_run(tmp_path, of(path, store=store))
    commands = [["run", "--run_dir", str(run.path)], ["check", f"--config_paths+={run.config}", "--forward", "false"]]
    for words in commands if store == "off" else commands[:1]:
        assert main(["helios", *words]) == 2
        said = capsys.readouterr().err
        assert name in said
        assert "Traceback" not in said


def test_what_never_returns_is_told_of_and_left_out(
    tmp_path: Path, blocking: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a worker process, from a store that could not pack it, with another sample in its place."""
    path = with_pipe(tmp_path)
    data = {"on_fault": "skip", "read_timeout": 1.0, "num_workers": 1, "store": str(tmp_path / "stores")}
    run = write_run(tmp_path, of(path, **data))
    assert fit(run) == 0
    said = capfd.readouterr().err
    assert f"{path}: window default/w000: layer image" in said  # the packer
    assert "s: classify/default/w000/0_0_8_8: layer image\n" in said  # the worker
    skipped = "skipped (train): classify/default/w000/0_0_8_8: layer image: not read within 1 s (read_timeout)"
    assert said.count(skipped) == 1
    assert run.done() is not None


def test_without_leave_to_skip_the_run_ends_with_one_line(
    tmp_path: Path, blocking: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, of(with_pipe(tmp_path, "label"), read_timeout=0.3, store="off"))
    assert main(["helios", "run", "--run_dir", str(run.path)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert said == ["error: classify/default/w000/0_0_8_8: layer label: not read within 0.3 s (read_timeout)"]


def test_the_check_gives_up_too(tmp_path: Path, blocking: None, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path, of(with_pipe(tmp_path), read_timeout=0.5, store="off")).config
    assert main(["helios", "check", f"--config_paths+={config}", "--forward", "false"]) == 2
    said = capsys.readouterr().err
    assert "still reading" in said
    assert "classify/default/w000: layer image, label: not read within 0.5 s (read_timeout) [unreadable]" in said


def test_a_slow_read_is_told_of_again_and_its_value_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slow_reads, "FIRST", 0.1)
    monkeypatch.setattr(slow_reads, "AGAIN", 0.1)
    slow_reads.slow_read_watch._end()
    for limit in (None, 60.0):
        assert read_with_notice(limit, lambda: time.sleep(0.5) or 7, what="a") == 7
        assert capsys.readouterr().err.count("s: a\n") >= 2
    assert read_with_notice(60.0, lambda: None, what="b") is None
    with pytest.raises(ZeroDivisionError):
        read_with_notice(60.0, lambda: 1 / 0, what="c")
    assert capsys.readouterr().err == ""


def test_a_forked_process_has_a_watch_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slow_reads, "FIRST", 0.1)
    watch = SlowReadWatch()
    with watch.over("parent"):
        pid = os.fork()
        if pid == 0:
            watch._reads.clear()
            with watch.over("child"):
                time.sleep(0.5)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    watch._end()
    said = capfd.readouterr().err
    assert said.count("s: child\n") == 1
    assert said.count("s: parent\n") == 1


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_no_time_at_all(seconds: float) -> None:
    with pytest.raises(ConfigError, match="more than 0, or null"):
        BadSamplePolicy(read_timeout=seconds)


def test_no_thread_is_left_behind_by_ordinary_reads(tmp_path: Path) -> None:
    found = source(write_dataset(tmp_path / "data", "classify", train=2, val=1, test=1), "classify")
    slow_reads.slow_read_watch._end()
    before = threading.active_count()
    for index in range(len(found)):
        found.sample(index)
    slow_reads.slow_read_watch._end()
    assert threading.active_count() <= before
