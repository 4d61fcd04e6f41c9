"""What was put into a bank comes out of it, for the same sample and view and for no other."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rslearn.models.component import FeatureVector

from rslp.train.features.bank import FeatureBank, dropped, make_room
from rslp.train.features.codec import Kept
from rslp.train.samples import SampleSource
from tests.train.features.test_codec import METADATA
from tests.train.store.places import stored, write_places


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    return stored(write_places(tmp_path_factory.mktemp("data") / "places", windows=4))


def opened(folder: Path, source: SampleSource) -> FeatureBank:
    prints = source.prints()
    assert prints is not None
    return FeatureBank(folder, source=source, prints=prints)


def kept(index: int, view: int) -> Kept:
    return Kept(FeatureVector(torch.tensor([[float(index), float(view)]])), {}, {}, METADATA)


def add(bank: FeatureBank, keys: list[tuple[int, int]]) -> None:
    writer = bank.writer()
    for index, view in keys:
        writer.add(index, view, kept(index, view))
    writer.close()


def assert_holds(bank: FeatureBank, keys: set[tuple[int, int]], *, of: set[tuple[int, int]]) -> None:
    assert set(bank.missing(of)) == of - keys
    for index, view in of:
        found = bank.read([(index, view)])
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
    bank = opened(tmp_path_factory.mktemp("bank") / "name", source)
    held: set[tuple[int, int]] = set()
    seen: set[int] = set()
    for number, keys in enumerate(portions):
        add(bank, sorted(keys))
        # Another process's file comes before or after those that are there.
        for path in bank.folder.glob(f"{os.getpid()}-*.cat"):
            path.rename(path.with_name(f"{data.draw(st.integers(0, 9))}-{number}.cat"))
        held |= keys
        views = {view for _, view in keys}
        seen |= views
        bank.look(views)
        assert_holds(bank, held, of={(index, view) for index in range(3) for view in seen})
        assert_holds(pickle.loads(pickle.dumps(bank)), held, of={(i, view) for i in range(3) for view in seen})
    bank.close()


def test_what_a_kill_leaves_half_written_is_not_found(source: SampleSource, tmp_path: Path) -> None:
    bank = opened(tmp_path / "name", source)
    add(bank, [(0, 0), (1, 0)])
    (catalogue,) = bank.folder.glob("*.cat")
    catalogue.write_bytes(catalogue.read_bytes()[:-5])
    bank.look({0})
    assert_holds(bank, {(0, 0)}, of={(0, 0), (1, 0)})
    for segment in bank.folder.glob("data/*.seg"):
        os.truncate(segment, 3)
    # Opened anew: a file that is mapped already is never made shorter.
    again = opened(tmp_path / "name", source)
    again.look({0})
    assert_holds(again, set(), of={(0, 0), (1, 0)})
    add(again, [(0, 0)])
    again.look({0})
    assert_holds(again, {(0, 0)}, of={(0, 0), (1, 0)})


def test_a_damaged_record_is_named_once_and_kept_anew(
    source: SampleSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bank = opened(tmp_path / "name", source)
    add(bank, [(0, 0), (1, 0)])
    (segment,) = bank.folder.glob("data/*.seg")
    raw = segment.read_bytes()
    segment.write_bytes(raw[:1] + bytes([raw[1] ^ 8]) + raw[2:])
    bank.look({0})
    assert bank.read([(1, 0), (0, 0)]) is None
    for _ in range(3):
        assert_holds(bank, {(1, 0)}, of={(0, 0), (1, 0)})
    assert [one.message for one in caplog.records] == [
        f"dataset 'places': {segment} is damaged: what differs from its checksum is not used any more, and made anew"
    ]
    # The next start knows of it before it reads anything.
    other = opened(tmp_path / "name", source)
    other.look({0})
    assert other.missing([(0, 0), (1, 0)]) == [(0, 0)]
    add(other, [(0, 0)])
    for one in (bank, other):
        one.look({0})
        assert_holds(one, {(0, 0), (1, 0)}, of={(0, 0), (1, 0)})
        one.close()
    assert len(caplog.records) == 1


def test_a_bank_is_full_when_each_sample_is_kept_in_each_view(source: SampleSource, tmp_path: Path) -> None:
    bank = opened(tmp_path / "name", source)
    add(bank, [(index, view) for view in range(2) for index in range(len(source) - view)])
    assert not bank.full(1)  # not looked for yet
    bank.look({0, 1})
    assert bank.full(1) and not bank.full(2)
    bank.close()


def test_a_bank_in_use_stays_and_the_longest_unused_makes_room(source: SampleSource, tmp_path: Path) -> None:
    banks = [opened(tmp_path / name, source) for name in ("a", "b", "c", "d")]
    for number, bank in enumerate(banks):
        add(bank, [(0, view) for view in range(100)])
        os.utime(bank.folder / "in-use", (1000 - number, 1000 - number))
    size = sum(path.stat().st_size for path in tmp_path.glob("a/data/*"))
    assert not dropped(banks[0].folder)
    for bank in banks[1:3]:
        bank.close()
    # Three may stay, and one more is wanted: of b and c, which nobody uses, c was unused for longer.
    left = make_room(tmp_path, needed=size, allowed=4 * size, keep=banks[3].folder)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "d"}
    assert left == size
    assert make_room(tmp_path, needed=3 * size, allowed=4 * size, keep=banks[3].folder) == 2 * size
    assert {path.name for path in tmp_path.iterdir()} == {"a", "d"}
    banks[0].close()
    assert dropped(banks[0].folder) and not banks[0].folder.exists()
    assert dropped(banks[0].folder)
    banks[3].close()


def test_a_window_that_changed_since_the_index_was_made_is_not_found(tmp_path: Path) -> None:
    path = write_places(tmp_path / "places", windows=2)
    prints = [stored(path).prints()]
    label = path / "windows" / "even" / "w000" / "layers" / "label" / "data.geojson"
    label.write_text(label.read_text().replace("high", "low"))
    prints.append(stored(path).prints())
    changed = [not np.array_equal(a, b) for a, b in zip(*prints, strict=True)]  # type: ignore[arg-type]
    assert sum(changed) == 1
