"""With the store and without it, samples are the same bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from rslearn.config import DType
from rslearn.train.dataset import DataInput
from rslearn.utils.geometry import ResolutionFactor

from rslp.data.cache import pack, records, segments
from rslp.data.cache.cache import SampleCache
from rslp.data.cache.records import ItemGroup
from tests.data.cache.places import (
    PER_LAYER,
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


@pytest.fixture(scope="module", params=[None, PER_LAYER], ids=["a file per group", "a file per layer"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_places(tmp_path_factory.mktemp("data") / "places", storage=request.param)


def all_records(store: SampleCache) -> list[Any]:
    return [entry for file in store.folder.glob("*.cat") for entry in segments.read_entries(file)[0]]


@pytest.mark.parametrize(
    "crops",
    [
        {},
        {"crop_size": 6},
        {"crop_size": SIZE},
        {"crop_size": (SIZE + 5, 4)},
        {"crop_size": 6, "load_all_crops": True, "overlap_pixels": 2},
    ],
    ids=str,
)
def test_every_kind_of_input_and_crop(path: Path, crops: dict[str, Any]) -> None:
    data_module = module(path, **crops)
    through = stored(path, data_module=data_module)
    assert not any(entry["state"] for entry in all_records(opened(path, data_module)))
    assert_equal_sources(through, direct(path, data_module=data_module))


def test_a_sample_comes_from_the_store_and_not_from_the_dataset(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_module = module(path, crop_size=6)
    through = stored(path, data_module=data_module)
    expected = [through.sample(i) for i in range(len(through))]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the dataset was read")

    monkeypatch.setattr("rslp.upstream.read_inputs", refuse)
    for index, sample in enumerate(expected):
        assert_same(stored(path, data_module=data_module).sample(index), sample)


def test_another_resolution_is_given_back_whole_and_crops_are_read_directly(path: Path) -> None:
    wanted = {
        **inputs(),
        "half": DataInput("raster", ["series"], bands=["a"], resolution_factor=ResolutionFactor(1, 2)),
        "double": DataInput("raster", ["mask"], bands=["m"], resolution_factor=ResolutionFactor(2), dtype=DType.INT32),
    }
    for crops in ({}, {"crop_size": 6}):
        data_module = module(path, wanted=wanted, **crops)
        assert_equal_sources(stored(path, data_module=data_module), direct(path, data_module=data_module))


def test_pages_of_the_map_are_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_HELD_BYTES", 1000)
    assert_equal_sources(stored(path), direct(path))


def test_an_input_that_a_window_lacks_is_left_out_where_it_may_be(tmp_path: Path) -> None:
    path = write_places(tmp_path / "places")
    (path / "windows" / "even" / "w000" / "layers" / "mask" / "completed").unlink()
    assert_equal_sources(stored(path), direct(path))
    assert len(stored(path)) == 4


def test_a_window_that_cannot_be_read_fails_as_it_does_without_a_store(tmp_path: Path) -> None:
    path = write_places(tmp_path / "places")
    for tif in (path / "windows" / "even" / "w000" / "layers" / "series").rglob("*.tif"):
        tif.write_bytes(b"nothing")
    found = []
    for source in (stored(path), direct(path)):
        (bad,) = [i for i in range(len(source)) if "/w000/" in source.identity(i)]
        with pytest.raises(Exception, match="can't read the sample") as raised:
            source.sample(bad)
        found.append(str(raised.value))
    assert found[0] == found[1]


def test_a_store_that_was_damaged_is_passed_over(tmp_path: Path) -> None:
    path = write_places(tmp_path / "places")
    through = stored(path)
    for segment in (path / ".rslp-store" / "data").iterdir():
        segment.write_bytes(b"")
    assert_equal_sources(through, direct(path))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_record_holds_every_value_of_every_dtype(data: st.DataObject) -> None:
    final = data.draw(st.sampled_from([np.float32, np.int32]))
    source = data.draw(st.sampled_from(["uint8", "uint16", "int16", "int32", "float32"]))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    array = data.draw(npst.arrays(final, shape))
    import torch

    payload, head = records.encode_raster([ItemGroup(torch.from_numpy(array), None)], narrow=[source], crops=True)
    parsed = records.parse_head(head)
    assert np.frombuffer(payload, parsed.dtype).reshape(parsed.shape).astype(parsed.final).tobytes() == array.tobytes()


def test_integers_stay_as_narrow_as_they_were(tmp_path: Path) -> None:
    path = write_places(tmp_path / "places", windows=1)
    wanted = {name: one for name, one in inputs().items() if name in ("all_steps", "mask", "odd", "targets")}
    through = stored(path, data_module=module(path, wanted=wanted))
    sizes = {int(entry["payload"]) for entry in all_records(opened(path, module(path, wanted=wanted)))}
    assert len(through) == 1
    # An integer has no NaN for the pixels that the file declares nodata, so these images are wider.
    assert {2 * 3 * SIZE * SIZE * 2, SIZE * SIZE, 2 * SIZE * SIZE * 4} < sizes


def test_several_processes_pack_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rslp.data.cache.cache._WORTH_A_PROCESS", 1)
    monkeypatch.setattr(pack, "CHUNK", 1)
    path = write_places(tmp_path / "places")
    assert_equal_sources(stored(path, workers=2), direct(path))
