"""The tests of this folder hold for the versions that docs/upstream.md names."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn.flexi_vit import Encoder

import rslp.upstream
from rslp.upstream.encoder import PaddedEncoder

PAGE = Path(__file__).parents[2] / "docs/upstream.md"
(LISTED,) = re.findall(r"Versions:\n(.*?)\.\n\n", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("entry", LISTED.split(", "))
def test_the_installed_version_is_the_tested_one(entry: str) -> None:
    name, listed = entry.split()
    assert f"{version(name)}.".startswith(f"{listed}."), f"run tests/upstream, then name {version(name)} in {PAGE.name}"


def test_the_encoder_asks_for_its_mask_where_we_override_it() -> None:
    assert version("olmoearth-pretrain-minimal") == "0.1.5"
    assert vars(PaddedEncoder)["_maybe_get_attn_mask"] is not vars(Encoder)["_maybe_get_attn_mask"]


# What uses public parts of the libraries alone.
PUBLIC = {
    *("RawInput", "RawInputs", "open_dataset", "split_config", "all_crops", "with_dataset"),
    *("are_deterministic", "reads_inputs", "model_of", "is_fitting"),
}


def test_the_page_says_of_each_touch_what_would_make_it_needless() -> None:
    face = set(re.findall(r"(\w+) as \1\b", Path(rslp.upstream.__file__).read_text()))
    assert len(face) > 40
    assert face - set(re.findall(r"`(\w+)`", PAGE.read_text())) == PUBLIC
