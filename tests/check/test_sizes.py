"""Image sizes that patches divide, and encoders that take a smaller patch for a smaller image."""

from __future__ import annotations

from typing import Any

import pytest

from rslp.check.encoder import Patch, patch_of


def encoder(path: str, **arguments: Any) -> dict[str, Any]:
    made = [{"class_path": path, "init_args": arguments}]
    return {"model": {"init_args": {"model": {"init_args": {"encoder": made}}}}}


def test_galileo_takes_a_smaller_image_as_one_patch() -> None:
    assert patch_of(encoder("rslp.helios.galileo.Galileo", patch_size=8)) == Patch(8, shrinks_when_small=True)
    assert patch_of(encoder("rslp.helios.model.Helios", patch_size=8)) == Patch(8)
    assert patch_of(encoder("rslp.helios.model.Helios", forward_kwargs={"patch_size": 4})) == Patch(4)
    assert patch_of(encoder("some.Encoder")) is None


@pytest.mark.parametrize(
    ("size", "divided", "shrunk"),
    [((1, 1), False, True), ((4, 4), False, True), ((8, 8), True, True), ((16, 8), True, True),
     ((12, 12), False, False), ((4, 6), False, False), ((4, 12), False, True)],
)  # fmt: skip
def test_images_are_cut_without_a_rest(size: tuple[int, int], divided: bool, shrunk: bool) -> None:
    assert Patch(8).divides(*size) == divided
    assert Patch(8, shrinks_when_small=True).divides(*size) == shrunk
