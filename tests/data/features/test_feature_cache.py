"""What was put into a bank comes out of it, for the same sample and view and for no other."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rslearn.models.component import FeatureVector

from rslp.data.features.cache import FeatureCache, FeatureCacheWriter, delete_if_unused, make_room
from rslp.data.features.codec import CachedSample
from rslp.data.samples import SampleSource
from tests.data.cache.places import stored, write_places
from tests.data.features.test_codec import METADATA


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    return stored(write_places(tmp_path_factory.mktemp("data") / "places", windows=4))


def opened(folder: Path, source: SampleSource, *, views: int = 4) -> FeatureCache:
    return FeatureCache(folder, source=source, views=views)


def kept(index: int, view: int) -> CachedSample:
    return CachedSample(FeatureVector(torch.tensor([[float(index), float(view)]])), {}, {}, METADATA)


def add(feature_cache: FeatureCache, keys: list[tuple[int, int]]) -> None:
    writer = FeatureCacheWriter(feature_cache)
    for index, view in keys:
        writer.add(index, view, kept(index, view))
    writer.publish()
    writer.close()


def assert_holds(feature_cache: FeatureCache, keys: set[tuple[int, int]], *, of: set[tuple[int, int]]) -> None:
    assert set(feature_cache.missing(of)) == of - keys
    for index, view in of:
        found = feature_cache.read([(index, view)])
        if (index, view) in keys:
            assert found is not None
            assert found.features.feature_vector.tolist() == [[index, view]]
        else:
            assert found is None


@given(portions=st.lists(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3))), max_size=5), data=st.data())
def test_views_that_come_one_after_the_other_stay_apart(
    source: SampleSource,
    tmp_path_factory: pytest.TempPathFactory,
    portions: list[set[tuple[int, int]]],
    data: st.DataObject,
) -> None:
    feature_cache = opened(tmp_path_factory.mktemp("bank") / "name", source)
    held: set[tuple[int, int]] = set()
    for number, keys in enumerate(portions):
        add(feature_cache, sorted(keys))
        # Another process's file comes before or after those that are there.
        for path in feature_cache.folder.glob(f"{os.getpid()}-*.cat"):
            path.rename(path.with_name(f"{data.draw(st.integers(0, 9))}-{number}.cat"))
        held |= keys
        feature_cache = feature_cache.reopened()
        assert_holds(feature_cache, held, of={(index, view) for index in range(3) for view in range(4)})
    feature_cache.close()


def test_what_a_kill_leaves_half_written_is_not_found(source: SampleSource, tmp_path: Path) -> None:
    feature_cache = opened(tmp_path / "name", source)
    add(feature_cache, [(0, 0), (1, 0)])
    (catalogue,) = feature_cache.folder.glob("*.cat")
    catalogue.write_bytes(catalogue.read_bytes()[:-5])
    feature_cache = feature_cache.reopened()
    assert_holds(feature_cache, {(0, 0)}, of={(0, 0), (1, 0)})
    for segment in feature_cache.folder.glob("data/*.seg"):
        os.truncate(segment, 3)
    # Opened anew: a file that is mapped already is never made shorter.
    again = opened(tmp_path / "name", source)
    assert_holds(again, set(), of={(0, 0), (1, 0)})
    add(again, [(0, 0)])
    again = again.reopened()
    assert_holds(again, {(0, 0)}, of={(0, 0), (1, 0)})


def test_a_damaged_record_is_named_once_and_kept_anew(
    source: SampleSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    feature_cache = opened(tmp_path / "name", source)
    add(feature_cache, [(0, 0), (1, 0)])
    (segment,) = feature_cache.folder.glob("data/*.seg")
    raw = segment.read_bytes()
    segment.write_bytes(raw[:1] + bytes([raw[1] ^ 8]) + raw[2:])
    feature_cache = feature_cache.reopened()
    assert feature_cache.read([(1, 0), (0, 0)]) is None
    for _ in range(3):
        assert_holds(feature_cache, {(1, 0)}, of={(0, 0), (1, 0)})
    assert [one.message for one in caplog.records] == [
        f"dataset 'places': {segment} is damaged: records that differ from their checksum are made again"
    ]
    # The next start knows of it before it reads anything.
    other = opened(tmp_path / "name", source)
    assert other.missing([(0, 0), (1, 0)]) == [(0, 0)]
    add(other, [(0, 0)])
    for one in (feature_cache, other):
        again = one.reopened()
        assert_holds(again, {(0, 0), (1, 0)}, of={(0, 0), (1, 0)})
        again.close()
    assert len(caplog.records) == 1


def test_a_bank_is_full_when_each_sample_is_kept_in_each_view(source: SampleSource, tmp_path: Path) -> None:
    feature_cache = opened(tmp_path / "name", source)
    add(feature_cache, [(index, view) for view in range(2) for index in range(len(source) - view)])
    assert not feature_cache.is_complete()  # as it was opened
    assert opened(feature_cache.folder, source, views=1).is_complete()
    assert not opened(feature_cache.folder, source, views=2).is_complete()


def test_a_bank_in_use_stays_and_the_longest_unused_makes_room(source: SampleSource, tmp_path: Path) -> None:
    feature_caches = [opened(tmp_path / name, source, views=100) for name in ("a", "b", "c", "d")]
    for number, feature_cache in enumerate(feature_caches):
        add(feature_cache, [(0, view) for view in range(100)])
        os.utime(feature_cache.folder / "in-use", (1000 - number, 1000 - number))
    size = sum(path.stat().st_size for path in tmp_path.glob("a/data/*"))
    assert not delete_if_unused(feature_caches[0].folder)
    for feature_cache in feature_caches[1:3]:
        feature_cache.close()
    # Three may stay, and one more is wanted: of b and c, which nobody uses, c was unused for longer.
    assert not make_room(feature_caches[3].folder, needed=size, limit=4 * size)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "d"}
    lack = make_room(feature_caches[3].folder, needed=3 * size, limit=4 * size)
    assert f"{tmp_path / 'd'} would take {3 * size:,} bytes more" in lack
    assert f"`features_limit_gb` leaves {2 * size:,}" in lack
    assert {path.name for path in tmp_path.iterdir()} == {"a", "d"}
    feature_caches[0].close()
    assert delete_if_unused(feature_caches[0].folder) and not feature_caches[0].folder.exists()
    assert delete_if_unused(feature_caches[0].folder)
    feature_caches[3].close()


def test_a_window_that_changed_since_the_index_was_made_is_not_found(tmp_path: Path) -> None:
    path = write_places(tmp_path / "places", windows=2)
    fingerprints = [stored(path).fingerprints()]
    label = path / "windows" / "even" / "w000" / "layers" / "label" / "data.geojson"
    label.write_text(label.read_text().replace("high", "low"))
    fingerprints.append(stored(path).fingerprints())
    changed = [not np.array_equal(a, b) for a, b in zip(*fingerprints, strict=True)]  # type: ignore[arg-type]
    assert sum(changed) == 1
