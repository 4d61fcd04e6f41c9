"""A run with the store and one without it are the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run


def test_losses_and_weights_are_equal_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {kind: (str(write_dataset(tmp_path / kind, kind, train=4)), kind) for kind in ("classify", "segment")}
    logged, weights = [], []
    for store in ("off", "auto", "auto"):
        run = write_run(tmp_path / f"{store}{len(logged)}", run_config(data, epochs=2, store=store))
        if len(logged) == 2:
            # The second start reads nothing from the datasets.
            monkeypatch.setattr("rslp.upstream.read_inputs", None)
        assert fit(run) == 0
        logged.append(run.metrics.read_text())
        weights.append(read_checkpoint(run.last)["state_dict"])
    assert "train_loss" in logged[0]
    assert logged[0] == logged[1] == logged[2]
    assert all(torch.equal(weights[0][name], weights[k][name]) for k in (1, 2) for name in weights[0])
