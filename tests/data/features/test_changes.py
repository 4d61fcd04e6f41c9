"""Whatever changes on disk or in a config so that a sample is another, its features are not found any more."""

from __future__ import annotations

import copy
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rslp.data.features.encoding import blocks
from rslp.data.features.fingerprint import json_fingerprint, of_dataset, referenced_digests, weights_digest
from rslp.data.samples import SampleSource
from rslp.errors import DataError
from tests.data.cache.changes import CHANGES
from tests.data.cache.places import assert_same, inputs, module, opened, write_places

WINDOWS = 2
Key = tuple[str, int, int]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_places(tmp_path_factory.mktemp("data") / "places", windows=WINDOWS)


def by_key(path: Path, chosen: dict[str, Any]) -> dict[Key, Any]:
    """The samples of a dataset, by what their features are found by; one that can't be read is its error."""
    made = module(path, **chosen)
    source = SampleSource("places", data_module=made, split="train", seed=0, sample_cache=opened(path, made))
    fingerprints = source.fingerprints()
    assert fingerprints is not None
    # As a run config would say it.
    description = {key: value for key, value in chosen.items() if key != "wanted"}
    wanted = {name: {k: str(v) for k, v in vars(one).items()} for name, one in chosen["wanted"].items()}
    name = json_fingerprint(of_dataset([description, wanted], config=(path / "config.json").read_bytes()))
    return {(name, *fingerprints[i].tolist()): outcome(source, i) for i in range(len(source))}  # type: ignore[misc]


def outcome(source: SampleSource, index: int) -> Any:
    try:
        return source.sample(index)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_found_after_a_change_is_what_was_kept_before(original: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "places"
    shutil.copytree(original, path)
    chosen: dict[str, Any] = {"wanted": inputs()}
    before = by_key(path, chosen)
    CHANGES[name][0](path, chosen)
    after = by_key(path, chosen)
    for key in before.keys() & after.keys():
        assert_same(before[key], after[key])


def test_without_a_change_everything_is_found(original: Path) -> None:
    assert len(CHANGES) >= 40
    assert by_key(original, {"wanted": inputs()}).keys() == by_key(original, {"wanted": inputs()}).keys()


def test_crops_of_one_window_are_told_apart(original: Path) -> None:
    chosen = {"wanted": inputs(), "crop_size": 9, "load_all_crops": True}
    assert len(by_key(original, chosen)) == 4 * WINDOWS


def test_what_a_config_points_to_is_part_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = tmp_path / "statistics.json"
    statistics.write_text("{}")
    (tmp_path / "own_transforms.py").write_text("class Own:\n    factor = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_transforms  # type: ignore[import-not-found]  # noqa: F401

    description = {"transforms": [{"class_path": "own_transforms.Own", "init_args": {"path": str(statistics)}}]}
    names = [referenced_digests(description)]
    assert set(names[0]) == {"own_transforms.Own", str(statistics)}
    statistics.write_text("{ }")
    names.append(referenced_digests(description))
    (tmp_path / "own_transforms.py").write_text("class Own:\n    factor = 3\n")
    names.append(referenced_digests(description))
    assert len({json_fingerprint(name) for name in names}) == 3


def test_weights_are_told_apart_by_value_name_type_and_shape() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(2, 3)
    others = [torch.nn.Linear(2, 3), torch.nn.Linear(3, 2), torch.nn.Linear(2, 3, bias=False)]
    others[0].load_state_dict(plain.state_dict())
    assert weights_digest([plain]) == weights_digest([others[0]])
    with torch.no_grad():
        others[0].weight[0, 0] = torch.nextafter(plain.weight[0, 0], torch.tensor(9.0))
    digests = {
        weights_digest([one]) for one in [plain, *others, copy.deepcopy(plain).double(), torch.nn.Sequential(plain)]
    }
    assert len(digests) == 6
    assert weights_digest([plain, others[1]]) != weights_digest([others[1], plain])


@given(
    samples=st.integers(1, 50),
    size=st.integers(1, 9),
    keys=st.lists(st.tuples(st.integers(0, 49), st.integers(0, 3)), max_size=30),
)
def test_blocks_hold_what_is_wanted_and_are_always_the_same(samples: int, size: int, keys: list[Any]) -> None:
    keys = [(index % samples, view) for index, view in keys]
    found = blocks(keys, size=size, samples=samples)
    held = [key for block in found for key in block.samples()]
    assert set(keys) <= set(held)
    assert len(held) == len(set(held)) <= size * len(set(keys))
    # The same block comes whatever else is wanted.
    whole = blocks([(index, view) for index in range(samples) for view in range(4)], size=size, samples=samples)
    assert set(found) <= set(whole)
    assert sorted(index for block in whole if block.view == 0 for index, _ in block.samples()) == list(range(samples))


def test_a_large_file_is_told_by_its_time_of_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rslp.data.features.fingerprint._LARGE", 0)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"one")
    before, state = referenced_digests(str(file)), file.stat()
    # The clock of a file system has ticks.
    time.sleep(0.05)
    file.write_bytes(b"two")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert referenced_digests(str(file)) != before
