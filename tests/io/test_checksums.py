"""Checksums: whatever bit of a file is flipped, it is refused or means the same."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rslp.errors import ConfigError, RunError
from rslp.io import LOAD_ERRORS, archive_damage, dump_yaml, read_json, read_yaml, with_checksum, write_json

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
CONTENT = st.dictionaries(st.text(max_size=5), PLAIN | st.lists(PLAIN, max_size=3) | st.tuples(PLAIN), max_size=4)
EXAMPLE = {"state": "running", "step": 12, "score": 0.25, "unmoved": ["a/b"], "nested": {"x": [1, None, True]}}


@settings(max_examples=60, deadline=None)
@given(content=CONTENT)
def test_what_is_written_can_be_read(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    content.pop("crc32", None)
    write_json(path, content)
    again = read_json(path)
    assert again is not None
    # NaN is no equal of itself, and a tuple comes back as a list.
    assert repr(again) == repr({key: list(v) if isinstance(v, tuple) else v for key, v in content.items()})


def test_each_flipped_bit_of_json_is_noticed_or_means_the_same(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, EXAMPLE)
    raw, refused = path.read_bytes(), 0
    for damaged in flipped(raw, range(len(raw))):
        path.write_bytes(damaged)
        try:
            content = read_json(path) or {}
        except RunError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            # Of a flip in the checksum's own name, a key is left that nobody asks for.
            assert {key: content.get(key) for key in EXAMPLE} == EXAMPLE
    assert refused > 6 * len(raw)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b'{"a": 1, "crc32": "00000000"}', b"[" * 10**5]
)
def test_what_is_no_whole_object_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"state\.json is damaged") as refused:
        read_json(path)
    assert "\n" not in str(refused.value)


def test_no_file_a_folder_and_one_without_a_checksum(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a.json") is None
    with pytest.raises(RunError, match=r"can't be read: .*Is a directory"):
        read_json(tmp_path)
    (tmp_path / "b.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "b.json") == {"a": 1}


def test_each_flipped_bit_and_cut_of_a_config_is_noticed_or_means_the_same(tmp_path: Path) -> None:
    path, config = tmp_path / "config.yaml", {"seed": 3, "trainer": {"max_epochs": 2}}
    path.write_text(with_checksum(dump_yaml(config)))
    raw = path.read_bytes()
    head = raw.index(b"\n")
    for damaged in (*flipped(raw, range(len(raw))), *(raw[:cut] for cut in range(head + 1, len(raw)))):
        path.write_bytes(damaged)
        try:
            assert read_yaml(path).data == config
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def flipped(raw: bytes, places: Iterable[int], *, bits: int = 8) -> Iterable[bytes]:
    """Copies with one bit flipped: at each place in turn so many bits, others at each."""
    for at in places:
        for bit in {(at + 8 * n // bits) % 8 for n in range(bits)}:
            damaged = bytearray(raw)
            damaged[at] ^= 1 << bit
            yield bytes(damaged)


SAVED = {"state_dict": {"a": torch.arange(6.0), "b": torch.ones(3, 3)}, "epoch": 1}


def archive() -> bytes:
    stream = io.BytesIO()
    torch.save(SAVED, stream)
    return stream.getvalue()


def alike(one: Any) -> bool:
    tensors = one["state_dict"]
    return (
        one["epoch"] == 1
        and tensors.keys() == SAVED["state_dict"].keys()  # type: ignore[attr-defined]
        and all(torch.equal(tensors[name], tensor) for name, tensor in SAVED["state_dict"].items())  # type: ignore[attr-defined]
    )


def assert_noticed(raw: bytes, places: Iterable[int], file: Path | None = None, *, bits: int = 8) -> int:
    """Each flipped bit is noticed, or torch reads what was saved; how many were noticed."""
    noticed = 0
    for damaged in flipped(raw, places, bits=bits):
        if archive_damage(io.BytesIO(damaged)):
            noticed += 1
            continue
        source: Any = io.BytesIO(damaged)
        if file is not None:
            file.write_bytes(damaged)
            source = file
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = torch.load(source, weights_only=True, mmap=file is not None)
        except LOAD_ERRORS:
            noticed += 1
        else:
            assert alike(read)
    return noticed


def test_flipped_bits_of_the_directory_of_an_archive() -> None:
    """No checksum is over it; one bit of it makes torch read a tensor from nowhere."""
    raw = archive()
    assert archive_damage(io.BytesIO(raw)) == ""
    with zipfile.ZipFile(io.BytesIO(raw)) as content:
        start = content.start_dir
    entries = [at for at in range(start, len(raw)) if raw.startswith(b"PK\x01\x02", at)]
    assert assert_noticed(raw, [entry + 38 for entry in entries]) == len(entries)
    assert_noticed(raw, range(start, len(raw)), bits=2)


def test_flipped_bits_of_the_records_of_an_archive() -> None:
    raw = archive()
    with zipfile.ZipFile(io.BytesIO(raw)) as content:
        record = content.getinfo("archive/data/1")
    at = raw.index(b"\x00\x00\x80?" * 9)
    assert record.header_offset < at
    assert assert_noticed(raw, range(at, at + 36)) == 36 * 8
    assert_noticed(raw, range(0, at, 9))


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [False, True])
def test_every_flipped_bit_of_an_archive(tmp_path: Path, mapped: bool) -> None:
    raw = archive()
    assert_noticed(raw, range(len(raw)), tmp_path / "a.pt" if mapped else None)


def test_cuts_of_an_archive_and_the_older_format() -> None:
    raw = archive()
    assert all(archive_damage(io.BytesIO(raw[:cut])) for cut in range(0, len(raw), 7))
    older = io.BytesIO()
    torch.save(SAVED, older, _use_new_zipfile_serialization=False)
    assert archive_damage(older) and not archive_damage(older, older=True)
    assert older.tell() == 0
