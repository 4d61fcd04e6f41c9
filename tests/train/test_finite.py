"""Steps that are not finite: where they come from is said; skipped ones change nothing; the count survives a resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rslearn.train.model_context import SampleMetadata

from rslp.data.batches import Batch
from rslp.errors import ConfigError, TrainingError
from rslp.train.callbacks import FiniteGuard, FinitePolicy
from rslp.train.fit import fit
from tests.data.test_bad_samples import file_of, properties
from tests.tiny import run_config, write_dataset, write_run
from tests.train.test_fit import same, start, weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Two datasets; one has a finite label whose squared error is not."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("classify", "regress"):
        write_dataset(folder / kind, kind)
    properties(file_of(folder / "regress", "label", "w002"), value=1e30)
    return {kind: (str(folder / kind), kind) for kind in ("classify", "regress")}


def config(data: dict[str, tuple[str, str]], **settings: Any) -> dict[str, Any]:
    made = run_config(data, epochs=3, dropout=0.2)
    made["model"]["init_args"] |= settings
    return made


def test_a_loss_that_is_not_finite_stops_and_names_samples_and_parameters(
    tmp_path: Path, data: dict[str, tuple[str, str]]
) -> None:
    run = write_run(tmp_path, config(data))
    pattern = (
        r"^step \d+: the loss of dataset 'regress' is not finite \(\w+ = inf\) with the samples .*default/w002.*; "
        r"lower the learning rate"
    )
    with pytest.raises(TrainingError, match=pattern) as caught:
        fit(run)
    assert "\n" not in str(caught.value)
    assert "weights are not finite" not in str(caught.value)


class SeeSkips(Callback):
    """Checks at each step whether weights and optimiser stay as they are if, and only if, the step is skipped."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before = copy.deepcopy((pl_module.state_dict(), trainer.optimizers[0].state_dict()["state"]))
        self.skipped = len(pl_module.finite.skipped)  # type: ignore[union-attr, arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        left_out = len(pl_module.finite.skipped) > self.skipped  # type: ignore[union-attr, arg-type]
        state = trainer.optimizers[0].state_dict()["state"]
        assert same(pl_module.state_dict(), self.before[0]) == left_out
        if left_out:
            assert state.keys() == self.before[1].keys()
            assert all(same(state[i], self.before[1][i]) for i in state)


def test_a_skipped_step_changes_nothing_and_is_counted_across_a_resume(
    tmp_path: Path, data: dict[str, tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(data, on_nonfinite="skip")
    run = write_run(tmp_path / "watched", copy.deepcopy(settings))
    watched = {**settings["trainer"], "callbacks": [{"class_path": "tests.train.test_finite.SeeSkips"}]}
    run.config.write_text(json.dumps({**settings, "trainer": watched}))
    assert fit(run) == 0
    assert "without 3 steps that were not finite" in capsys.readouterr().err
    reference = start(tmp_path / "a", settings)
    killed = start(tmp_path / "b", settings, die_at=11)
    start(tmp_path / "b", settings)
    assert same(weights(killed.last), weights(reference.last))
    for of in (reference, killed):
        assert json.loads((of.path / "state.json").read_text())["nonfinite_steps"] == 3


def test_one_more_than_the_limit_stops(tmp_path: Path, data: dict[str, tuple[str, str]]) -> None:
    run = write_run(tmp_path, config(data, on_nonfinite="skip", max_nonfinite=2))
    with pytest.raises(TrainingError, match=r"more than max_nonfinite = 2 steps are not finite:(\n  step \d+: .*){3}$"):
        fit(run)


def module_with(gradient: float, *, weight: float = 1.0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(module.weight, weight)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1.0)
    assert module.bias.grad is not None
    module.bias.grad.fill_(gradient)
    return module, torch.optim.AdamW(module.parameters())


def batch() -> Batch:
    metadata = SampleMetadata(
        window_group="g", window_name="w", window_bounds=(0, 0, 1, 1), crop_bounds=(0, 0, 1, 1), crop_idx=0,
        num_crops_in_window=1, time_range=None, projection=None, dataset_source="crops",  # type: ignore[arg-type]
    )  # fmt: skip
    return Batch("crops", [{}], [{}], [metadata])


@pytest.mark.parametrize(
    ("gradient", "weight", "loss", "gradients", "message"),
    [
        (1e38, 1.0, 1.0, True, None),  # its square is not finite, itself it is
        (float("nan"), 1.0, 1.0, True, r"losses of crops are finite here; gradients are not finite: bias \(1 of 2"),
        (float("-inf"), 1.0, 1.0, True, r"gradients are not finite: bias"),
        (float("inf"), 1.0, 1.0, False, None),  # the scaler of half precision sees to it
        (1.0, float("nan"), 1.0, True, None),  # would show in the loss
        (1.0, float("nan"), float("nan"), True, r"'crops' is not finite \(cls = nan\) with .* g/w; weights are not"),
        (1.0, 1.0, float("inf"), False, r"\(cls = inf\)"),
    ],
)  # fmt: skip
def test_what_is_seen(gradient: float, weight: float, loss: float, gradients: bool, message: str | None) -> None:
    guard = FiniteGuard(FinitePolicy())
    module, optimizer = module_with(gradient, weight=weight)
    guard.note(batch(), {"cls": torch.tensor(loss)})
    if message is None:
        assert guard.check(module, optimizer, step=0, gradients=gradients)
    else:
        with pytest.raises(TrainingError, match=message):
            guard.check(module, optimizer, step=0, gradients=gradients)


@pytest.mark.parametrize("policy", [{"on_nonfinite": "hide"}, {"max_nonfinite": -1}])
def test_a_policy_that_cannot_be(policy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.init_args\.\w+"):
        FinitePolicy(**policy)
