"""Which configs freeze the encoder for good."""

from __future__ import annotations

from typing import Any

import pytest

from rslp.data.features.stage import stays_frozen

OURS, STOCK = "rslp.train.Freeze", "rslearn.train.callbacks.freeze_unfreeze.FreezeUnfreeze"


@pytest.mark.parametrize(
    ("class_path", "init_args", "wanted"),
    [
        (OURS, {}, True),
        (OURS, None, True),
        (OURS, {"modules": ["model.decoders", "model.encoder"]}, True),
        (OURS, {"thaw_at_epoch": 3}, False),
        (OURS, {"modules": "model.encoder.0.model.blocks.3"}, False),
        (STOCK, {"module_selector": ["model", "encoder", 0]}, True),
        (STOCK, {"module_selector": ["model", "encoder", 0], "unfreeze_at_epoch": 2}, False),
        ("lightning.pytorch.callbacks.LearningRateMonitor", {}, False),
    ],
)
def test_an_encoder_that_never_thaws(class_path: str, init_args: dict[str, Any] | None, wanted: bool) -> None:
    assert stays_frozen({"trainer": {"callbacks": [{"class_path": class_path, "init_args": init_args}]}}) is wanted


def test_without_callbacks_nothing_is_frozen() -> None:
    assert not stays_frozen({}) and not stays_frozen({"trainer": {"callbacks": None}})
