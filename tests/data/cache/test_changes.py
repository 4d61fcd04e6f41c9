"""Nothing stale: after every kind of change the store gives what the dataset holds, and packs no more than it must."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rslp.data.cache import refresh
from rslp.data.cache import segments as segment_files
from rslp.data.samples import SampleSource
from rslp.errors import DataError
from rslp.train.baselines import fit_baselines
from tests.data.cache.changes import ALL, CHANGES, window
from tests.data.cache.places import assert_same, direct, inputs, module, opened, stored, united, write_places

WINDOWS = 2


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_places(tmp_path_factory.mktemp("data") / "places", windows=WINDOWS)


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    path = tmp_path / "places"
    shutil.copytree(original, path)
    fit_baselines({"places": stored(path, data_module=united(path))})
    return path


def segments(path: Path) -> set[Any]:
    """The windows' records, by fingerprint."""
    found = set()
    for file in (path / ".rslp-store").glob("records-*.cat"):
        found |= {(file.name, *entry["fingerprint"].tolist()) for entry in segment_files.read_entries(file)[0]}
    return found


def outcome(source: SampleSource, index: int) -> Any:
    try:
        return source.sample(index)
    except DataError as error:
        return str(error)


def assert_fresh(path: Path, chosen: dict[str, Any]) -> None:
    expected = direct(path, data_module=module(path, **chosen))
    found = stored(path, data_module=module(path, **chosen))
    assert [found.identity(i) for i in range(len(found))] == [expected.identity(i) for i in range(len(expected))]
    for index in range(len(found)):
        assert_same(outcome(found, index), outcome(expected, index))
    # Learnt twice: from the labels, and from the note that was made of them.
    made = united(path, **chosen)
    ways = (stored(path, data_module=made), stored(path, data_module=made), direct(path, data_module=made))
    floors = [fit_baselines({"places": source}, skip=True) for source in ways]
    assert floors[0] == floors[1] == floors[2]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_leads_to_fresh_values_and_only_what_changed_is_packed(packed: Path, name: str) -> None:
    made, allowed = CHANGES[name]
    before = segments(packed)
    chosen: dict[str, Any] = {"wanted": inputs()}
    made(packed, chosen)
    assert_fresh(packed, chosen)
    new = segments(packed) - before
    assert len(new) <= allowed * len(inputs()) if allowed != ALL else new
    assert allowed == ALL or bool(new) == bool(allowed)


def test_without_a_change_nothing_is_looked_at_again(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = segments(packed)
    monkeypatch.setattr(refresh, "_scan_windows", None)
    monkeypatch.setattr("rslp.data.cache.cache.pack_all", None)
    assert len(stored(packed)) == WINDOWS
    assert segments(packed) == before


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(sorted(CHANGES)), min_size=2, max_size=5))
def test_changes_in_a_row(original: Path, tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    path = tmp_path_factory.mktemp("row") / "places"
    shutil.copytree(original, path)
    chosen: dict[str, Any] = {"wanted": inputs()}
    for name in names:
        try:
            CHANGES[name][0](path, chosen)
        except (FileNotFoundError, KeyError, StopIteration, ValueError):
            continue  # an earlier change took away what this one changes
        if (path / "windows").exists() and _has_samples(path, chosen):
            assert_fresh(path, chosen)


def _has_samples(path: Path, chosen: dict[str, Any]) -> bool:
    try:
        direct(path, data_module=module(path, **chosen))
    except DataError:
        return False
    return True


def test_in_a_large_dataset_a_changed_window_is_noticed_when_it_is_read(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "CHECKED_AT_START", 1)
    CHANGES["a pixel edited in place"][0](packed, {})
    store = opened(packed)
    assert refresh.may_trust_index(store.index, packed / "windows")
    before = segments(packed)
    assert_fresh(packed, {})
    assert segments(packed) == before
    shutil.copytree(window(packed), window(packed).with_name("more"))
    assert not refresh.may_trust_index(store.index, packed / "windows")
    assert_fresh(packed, {})


def test_in_a_large_dataset_a_window_is_seen_that_came_with_the_time_of_its_group_put_back(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "CHECKED_AT_START", 1)
    index, group = opened(packed).index, window(packed).parent
    state = group.stat()
    shutil.copytree(window(packed), group / "more")
    os.utime(group, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not refresh.may_trust_index(index, packed / "windows")


def test_in_a_large_dataset_a_changed_label_is_noticed_by_the_floors(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "CHECKED_AT_START", 1)
    source = stored(packed, data_module=united(packed))
    known = fit_baselines({"places": source})
    monkeypatch.setattr(SampleSource, "targets", None)
    assert fit_baselines({"places": stored(packed, data_module=united(packed))}) == known
    monkeypatch.undo()
    monkeypatch.setattr(refresh, "CHECKED_AT_START", 1)
    for label in packed.glob("windows/*/*/layers/label/data.geojson"):
        label.write_text(label.read_text().replace('"low"', '"high"'))
    found = stored(packed, data_module=united(packed))
    assert refresh.may_trust_index(opened(packed).index, packed / "windows")
    assert (
        fit_baselines({"places": found})
        == fit_baselines({"places": direct(packed, data_module=united(packed))})
        != known
    )


def test_a_file_that_was_written_just_now_is_not_trusted_yet(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = window(packed) / "layers" / "label" / "data.geojson"
    monkeypatch.setattr("rslp.data.cache.refresh.time.sleep", lambda _: None)
    at = file.stat().st_mtime_ns
    now = at + 10_000
    monkeypatch.setattr("rslp.data.cache.window_state.time.time_ns", lambda: now)
    os.utime(file, ns=(at, now))
    assert_fresh(packed, {})
    file.write_text(file.read_text().replace('"low"', '"lox"'))
    os.utime(file, ns=(at, now))
    assert_fresh(packed, {})
