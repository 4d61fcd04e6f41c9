"""Packing is interrupted, short of room, or done twice at once; training goes on all the same."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rslp.cli.main import main
from rslp.data.cache import cache, pack, segments
from rslp.data.cache.segments import RecordEntry
from rslp.errors import MachineError
from rslp.runtime import preemption
from tests.children import Python
from tests.data.cache.places import assert_equal_sources, direct, module, opened, stored, write_places
from tests.tiny import run_config, write_dataset

PACK = """
import sys, time
from pathlib import Path
from rslp.data.cache import pack
from tests.tiny import run_config, write_dataset
from tests.data.cache.places import stored
slow = float(sys.argv[2])
pack.CHUNK = 1
done = pack.Packer.pack
pack.Packer.pack = lambda self, tasks: (time.sleep(slow), done(self, tasks))[1]
print(len(stored(Path(sys.argv[1]))), flush=True)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_places(tmp_path_factory.mktemp("data") / "places")


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "places"))


def start(path: Path, *, slow: float) -> Python:
    command = [sys.executable, "-c", PACK, str(path), str(slow)]
    return Python(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def entries(path: Path) -> list[tuple[str, Any]]:
    found = []
    for file in sorted((path / ".rslp-store").glob("records-*.cat")):
        found += [(file.name, tuple(entry["fingerprint"].tolist())) for entry in segments.read_entries(file)[0]]
    return found


def test_a_killed_packing_goes_on_where_it_was(path: Path) -> None:
    with start(path, slow=0.5) as process:
        while not entries(path) and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = entries(path)
    assert 0 < len(before) < 4 * 7
    for file in (path / ".rslp-store").glob("records-*.cat"):
        with file.open("ab") as handle:
            handle.write(b"half an entry")
    assert_equal_sources(stored(path), direct(path))
    after = entries(path)
    assert set(before) < set(after)
    assert len(after) == len(set(after)) == 4 * 7


def test_two_runs_on_one_store(path: Path) -> None:
    first, second = start(path, slow=0.2), start(path, slow=0.2)
    for process in (first, second):
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out) == (0, "4\n"), err
    found = entries(path)
    assert len(found) == len(set(found))
    assert_equal_sources(stored(path), direct(path))


def test_who_waits_says_so(path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(path)
    with cache.cache_lock(store.folder):
        monkeypatch.setattr("rslp.io.locks.time.sleep", lambda _: (_ for _ in ()).throw(TimeoutError))
        with pytest.raises(TimeoutError), cache.cache_lock(store.folder):
            pass
        monkeypatch.setattr(preemption.preemption_flag, "received", signal.SIGTERM)
        with pytest.raises(preemption.Preempted), cache.cache_lock(store.folder):
            pass
    assert f"waiting for process {os.getpid()} on " in caplog.text
    assert f"which is writing to {store.folder}" in caplog.text


def test_a_training_that_is_asked_to_leave_stops_packing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "CHUNK", 1)
    monkeypatch.setattr(preemption.preemption_flag, "received", signal.SIGTERM)
    with pytest.raises(preemption.Preempted):
        stored(path)
    assert 0 < len(entries(path)) < 4 * 7


@pytest.mark.parametrize("asked", [False, True])
def test_a_packing_process_that_is_killed_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    monkeypatch.setattr("rslp.data.cache.cache._WORTH_A_PROCESS", 1)
    monkeypatch.setattr(pack, "CHUNK", 1)
    monkeypatch.setattr(pack.Packer, "pack", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    # As a training does; the pool's processes must not inherit it, or they could not be ended.
    former = signal.signal(signal.SIGTERM, lambda *_: None)
    if asked:
        monkeypatch.setattr(preemption.preemption_flag, "received", signal.SIGTERM)
    error = preemption.Preempted if asked else MachineError
    try:
        with pytest.raises(error, match="SIGTERM" if asked else "a process that packs windows into .* was killed"):
            stored(path, workers=2)
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_full_disk_stops_the_packing_and_not_the_training(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(pack, "CHUNK", 1)
    try:
        # The kernel refuses to make a file larger than this: the same way a full disk shows, on one file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, hard))
        source = stored(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "can't take all windows" in caplog.text
    assert "File too large" in caplog.text
    assert 0 < len(entries(path)) < 4 * 7
    assert_equal_sources(source, direct(path))
    assert_equal_sources(stored(path), direct(path))


def test_a_store_that_would_be_too_large_is_not_begun(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_equal_sources(stored(path, limit=1000), direct(path))
    assert re.search(r"would take [\d,]+ bytes more, [\d,]+ are free, and `store_limit_gb` leaves 1,000;", caplog.text)
    assert not entries(path)


@pytest.mark.parametrize("limit", [None, 1e-6])
def test_the_command_says_that_nothing_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    data = str(write_dataset(tmp_path / "data", "classify", train=2, val=1, test=1))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_config({"classify": (data, "classify")}, store_limit_gb=limit)))
    if limit is None:
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=4000))
    assert main(["helios", "pack", f"--config_paths+={config}"]) == 1
    out, err = capsys.readouterr()
    why = "4,000 are free, and half of them may be taken" if limit is None else r"`store_limit_gb` leaves 1,000;"
    line = rf"error: classify train: the sample cache {data}/.rslp-store would take [\d,]+ bytes more, .*{why}.*"
    assert re.fullmatch(line, err.splitlines()[-1])
    assert not out and not entries(Path(data))


def test_a_folder_that_cannot_be_written(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    made = module(path)
    from rslp.data.cache.cache import SampleCacheSettings, open_sample_cache
    from rslp.data.samples import open_dataset

    chosen = SampleCacheSettings(store=str(tmp_path / "file"))
    assert (
        open_sample_cache("places", dataset=open_dataset("places", made), inputs=made.inputs, settings=chosen) is None
    )
    assert "is read without one" in caplog.text


def test_a_window_that_changes_while_it_is_read_is_left_for_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = pack.Packer.decode
    label = path / "windows" / "even" / "w000" / "layers" / "label" / "data.geojson"

    def meddle(*args: Any) -> Any:
        decoded = decode(*args)
        label.write_text(label.read_text() + " ")
        return decoded

    monkeypatch.setattr(pack.Packer, "decode", meddle)
    source = stored(path)
    assert len(entries(path)) == 3 * 7
    assert_equal_sources(source, direct(path))


def test_where_a_store_lies(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upath import UPath

    monkeypatch.setenv("RSLP_CACHE", str(tmp_path / "cache"))
    assert cache.cache_folder(UPath(path), "auto") == path / ".rslp-store"
    elsewhere = cache.cache_folder(UPath(path), str(tmp_path / "here"))
    assert elsewhere.parent == tmp_path / "here" / "stores"
    assert elsewhere.name.startswith("places-")
    assert cache.cache_folder(UPath("memory://places"), "auto").parent == tmp_path / "cache" / "stores"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache.cache_folder(UPath(path), "auto").parent == tmp_path / "cache" / "stores"


def test_the_command_packs_and_verifies_the_datasets_of_a_run_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_dataset(tmp_path / "data", "classify", train=2, val=1, test=1))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_config({"classify": (data, "classify")})))
    command = ["helios", "pack", f"--config_paths+={config}"]
    assert main(command) == 0
    assert f"classify: 4 windows in {data}/.rslp-store, 8 records made\n" in capsys.readouterr().out
    assert main([*command, "--verify", "true"]) == 0
    assert "0 records made, 0 of 8 were damaged, 0 records differed from the dataset\n" in capsys.readouterr().out
    assert main([*command, "--verify", "checksums"]) == 0
    assert "0 records made, 0 of 8 were damaged\n" in capsys.readouterr().out
    segment = min(Path(data).glob(".rslp-store/data/*.seg"))
    segment.write_bytes(b"\xff" + segment.read_bytes()[1:])
    assert main([*command, "--verify", "checksums"]) == 0
    told = capsys.readouterr()
    assert "1 records made, 1 of 8 were damaged\n" in told.out
    assert main([*command, "--verify", "checksums"]) == 0
    assert "0 records made, 0 of 8 were damaged\n" in capsys.readouterr().out
    assert main([*command, "--verify", "often"]) == 2
    assert "--verify must be true or false or checksums; got often" in capsys.readouterr().err
    assert main([*command, "--splits+=valid"]) == 2
    assert "there is no split 'valid'" in capsys.readouterr().err
    config.write_text(yaml.safe_dump(run_config({"classify": (data, "classify")}, store="off")))
    assert main(command) == 2
    assert "classify: there is no sample cache" in capsys.readouterr().err


def test_torn_entries_are_passed_over_and_cut_off(tmp_path: Path) -> None:
    made = [RecordEntry((n, n + 1), 5, 64 * n, 10, 3, 99) for n in range(4)]
    file = tmp_path / "records-x.cat"
    segments.append_entries(file, made[:2])
    with file.open("r+b") as handle:
        handle.truncate(segments.ENTRY_DTYPE.itemsize * 2 - 5)
    assert segments.read_entries(file)[0]["fingerprint"].tolist() == [[0, 1]]
    segments.append_entries(file, made[2:])
    assert segments.read_entries(file)[0]["fingerprint"].tolist() == [[0, 1], [2, 3], [3, 4]]


def exchange_in_place(path: Path) -> None:
    """Other content, with the size, the time of writing and the inode that there were."""
    file = path / "windows" / "even" / "w000" / "layers" / "label" / "data.geojson"
    state = file.stat()
    with file.open("r+") as handle:
        text = handle.read()
        handle.seek(0)
        handle.write(text.replace('"low"', '"LOW"'))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) == (
        state.st_size,
        state.st_mtime_ns,
        state.st_ino,
    )


def test_content_that_was_exchanged_with_size_time_and_inode_kept_is_noticed(path: Path) -> None:
    stored(path)
    before = entries(path)
    exchange_in_place(path)
    assert_equal_sources(stored(path), direct(path))
    assert len(entries(path)) == len(before) + 1


def test_verifying_finds_what_nothing_on_the_disk_tells_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_change(path: str, at: int | None) -> tuple[int, int, int, int]:
        state = os.stat(path, dir_fd=at)
        return state.st_mtime_ns, 1, state.st_size, state.st_ino

    # A file system that keeps no time of change.
    monkeypatch.setattr("rslp.data.cache.window_state._stamp", without_change)
    source = stored(path)
    exchange_in_place(path)
    data_module = module(path)
    store = opened(path, data_module)
    rows = source._windows._rows  # type: ignore[attr-defined]
    before = entries(path)
    assert store.pack(rows, data_module.inputs) == 0
    assert store.verify(rows, data_module.inputs) == 1
    assert store.pack(rows, data_module.inputs) == 1
    assert store.verify(rows, data_module.inputs) == 0
    assert len(entries(path)) == len(before) + 1
    assert_equal_sources(stored(path), direct(path))
