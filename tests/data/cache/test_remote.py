"""Datasets on object stores: the same samples through a store in the cache folder, and nothing stale."""

from __future__ import annotations

import itertools
import json
import posixpath
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rslp.data.cache import pack, refresh, segments
from rslp.data.samples import SampleSource
from rslp.errors import DataError
from tests.data.cache.places import (
    SIZE,
    assert_equal_sources,
    assert_same,
    direct,
    inputs,
    module,
    opened,
    stored,
    write_places,
)
from tests.stores import Server

_numbers = itertools.count()
COUNT = 2


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_places(tmp_path_factory.mktemp("data") / "places", windows=COUNT)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server("s3")
    made.start()
    yield made
    made.stop()


@pytest.fixture(params=["memory", "s3"])
def url(
    request: pytest.FixtureRequest, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setenv("RSLP_CACHE", str(tmp_path / "cache"))
    name = f"data-{next(_numbers)}"
    if request.param == "s3":
        place = request.getfixturevalue("server").bucket(name, monkeypatch) + "/places"
    else:
        place = f"memory://{name}/places"
        # Its clock alone tells of changes; here nothing changes twice within a tick.
        monkeypatch.setattr(refresh, "COARSE_TICK_NS", 0)
    fs, root = fsspec.url_to_fs(place)
    for file in sorted(original.rglob("*")):
        if file.is_file() and ".rslp-store" not in file.parts:
            fs.pipe_file(f"{root}/{file.relative_to(original)}", file.read_bytes())
    yield place
    if request.param == "memory":
        fs.rm(root, recursive=True)


class Remote:
    """A dataset's objects, for changing them."""

    def __init__(self, url: str) -> None:
        self.fs, self.root = fsspec.url_to_fs(url)
        self.window = f"{self.root}/windows/even/w000"

    def edit(self, path: str, change: Callable[[bytes], bytes]) -> None:
        self.fs.pipe_file(f"{self.window}/{path}", change(self.fs.cat_file(f"{self.window}/{path}")))

    def copy(self, source: str, target: str) -> None:
        for path in self.fs.find(source):
            self.fs.pipe_file(target + path.removeprefix(source), self.fs.cat_file(path))


def entries(tmp_path: Path) -> set[Any]:
    found: set[Any] = set()
    for file in (tmp_path / "cache").rglob("records-*.cat"):
        found |= {(file.name, *entry["fingerprint"].tolist()) for entry in segments.read_entries(file)[0]}
    return found


def through(url: str, **settings: Any) -> SampleSource:
    return stored(Path(url), data_module=at(url), **settings)


def at(url: str) -> Any:
    return module(url)  # type: ignore[arg-type]


def test_samples_are_the_same_and_a_second_start_reads_no_object(
    url: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equal_sources(through(url), direct(original))
    assert_equal_sources(through(url), direct(Path(url), data_module=at(url)))
    before = entries(tmp_path)
    assert len(before) == COUNT * len(inputs())
    kind = type(Remote(url).fs)
    for name in ("cat", "cat_file", "_cat_file", "open", "_open"):
        if hasattr(kind, name):
            monkeypatch.setattr(kind, name, _refuse_below(url, getattr(kind, name)))
    source = through(url)
    assert len([source.sample(index) for index in range(len(source))]) == COUNT
    assert entries(tmp_path) == before


def test_what_is_no_window_is_left_out_and_a_broken_one_is_named(url: str, original: Path) -> None:
    there = Remote(url)
    group = there.window.rpartition("/")[0]
    for name in ("list.csv", "w999/layers/label/completed", ".hidden/metadata.json", "../README.txt"):
        there.fs.pipe_file(str(posixpath.normpath(f"{group}/{name}")), b"x")
    assert_equal_sources(through(url), direct(original))
    assert_equal_sources(direct(Path(url), data_module=at(url)), direct(original))
    there.edit("metadata.json", lambda text: text[:20])
    for read in (through, lambda path: direct(Path(path), data_module=at(path))):
        with pytest.raises(DataError, match=r"^dataset 'places': .*windows/even/w000/metadata.json.*JSONDecodeError"):
            read(url)


def _refuse_below(url: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        assert "/windows/" not in str(path), path
        return real(self, path, *args, **kwargs)

    return read


def _same_size(raw: bytes) -> bytes:
    return raw.replace(b'"low"', b'"lox"')


def _moved(raw: bytes) -> bytes:
    document = json.loads(raw)
    document["bounds"] = [one + 1 for one in document["bounds"]]
    return json.dumps(document).encode()


def _tagged(raw: bytes) -> bytes:
    return json.dumps({**json.loads(raw), "options": {"split": "other"}}).encode()


CHANGES: dict[str, tuple[Callable[[Remote], None], int]] = {
    "nothing": (lambda _: None, 0),
    "a label edited to the same size": (lambda r: r.edit("layers/label/data.geojson", _same_size), 1),
    "bounds changed": (lambda r: r.edit("metadata.json", _moved), len(inputs())),
    "a tag changed": (lambda r: r.edit("metadata.json", _tagged), 0),
    "an item group added": (lambda r: r.copy(f"{r.window}/layers/series", f"{r.window}/layers/series.3"), 3),
    "an item group removed": (lambda r: r.fs.rm(f"{r.window}/layers/series.1", recursive=True), 3),
    "a layer no longer complete": (lambda r: r.fs.rm(f"{r.window}/layers/mask/completed"), 0),
    "a window removed": (lambda r: r.fs.rm(r.window, recursive=True), 0),
    "a window copied": (lambda r: r.copy(r.window, f"{r.root}/windows/even/w002"), len(inputs())),
    "a window of a hidden group": (lambda r: r.copy(r.window, f"{r.root}/windows/.even/w002"), 0),
    "a layer of predictions written": (lambda r: r.fs.pipe_file(f"{r.window}/layers/output/data.geojson", b"{}"), 0),
    "items written": (lambda r: r.fs.pipe_file(f"{r.window}/items.json", b"[]"), len(inputs())),
}


@pytest.mark.parametrize("url", ["memory", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_leads_to_fresh_values_and_only_what_changed_is_packed(url: str, tmp_path: Path, name: str) -> None:
    change, packed = CHANGES[name]
    through(url)
    before = entries(tmp_path)
    assert len(before) == COUNT * len(inputs())
    change(Remote(url))
    assert_equal_sources(through(url), direct(Path(url), data_module=at(url)), draws=1)
    assert len(entries(tmp_path) - before) == packed


def test_several_processes_pack_and_forked_ones_read_what_is_not_packed(
    url: str, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not url.startswith("s3"):
        pytest.skip("one process can't see another's memory")
    monkeypatch.setattr("rslp.data.cache.cache._WORTH_A_PROCESS", 1)
    made = module(url, crop_size=(SIZE + 5, 4))  # type: ignore[arg-type]
    source = stored(Path(url), data_module=made, workers=2)
    expected = direct(original, data_module=module(original, crop_size=(SIZE + 5, 4)))
    assert_equal_sources(through(url), direct(original), draws=1)
    # Crops beyond the window are never in a store.
    with ProcessPoolExecutor(1, get_context("fork"), _keep, (source,)) as pool:
        assert_same(pool.submit(_first).result(timeout=120), expected.sample(0))


_KEPT: list[SampleSource] = []


def _keep(source: SampleSource) -> None:
    _KEPT.append(source)


def _first() -> Any:
    return _KEPT[0].sample(0)


def test_an_object_that_was_written_just_now_is_read_directly(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not url.startswith("memory"):
        pytest.skip("a hash of the content tells at once")
    monkeypatch.setattr(refresh, "COARSE_TICK_NS", 60_000_000_000)
    assert_equal_sources(through(url), direct(Path(url), data_module=at(url)), draws=1)
    assert not entries(tmp_path)


def test_a_window_that_cannot_be_reached_is_left_for_later(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("the connection was lost")

    monkeypatch.setattr(pack.records, "read_vectors", fail)
    through(url)
    assert not entries(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("RSLP_CACHE", str(tmp_path / "cache"))


def test_a_file_system_that_does_not_tell_of_changes_has_no_store(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refresh, "_CONTENT", ())
    monkeypatch.setattr(refresh, "_TIMES", ())
    with pytest.raises(AssertionError):
        opened(Path(url), at(url))
    assert "gives neither a hash nor a time" in caplog.text
