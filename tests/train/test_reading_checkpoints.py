"""A file that is no checkpoint, or only a part of one, is one clear error, whatever is in it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rslp.errors import CheckpointError
from rslp.train.checkpoints import load_weights, read_checkpoint


def saved() -> bytes:
    stream = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.arange(6.0)}, "epoch": 1, "global_step": 2}, stream)
    return stream.getvalue()


WHOLE = saved()


def read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        assert "state_dict" in read_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints") / "last.ckpt"


@given(st.binary(max_size=200))
def test_any_bytes(path: Path, content: bytes) -> None:
    read(path, content)


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=9), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_pickle(path: Path, content: object) -> None:
    read(path, pickle.dumps(content, protocol=2))


@given(st.integers(0, len(WHOLE) - 1))
def test_a_checkpoint_that_was_cut(path: Path, size: int) -> None:
    read(path, WHOLE[:size])


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_checkpoint_with_a_byte_changed(path: Path, at: int, value: int) -> None:
    read(path, WHOLE[:at] + bytes([value]) + WHOLE[at + 1 :])


def test_weights_that_do_not_fit_are_told_in_few_words() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(50)))
    odd = {"state_dict": {f"old.{name}": value for name, value in model.state_dict().items()}}
    with pytest.raises(CheckpointError) as raised:
        load_weights(model, odd, path=Path("x.ckpt"))
    assert "x.ckpt does not fit the model: Missing key(s)" in str(raised.value)
    assert "0.weight" in str(raised.value) and len(str(raised.value)) < 500
