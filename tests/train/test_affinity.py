"""Which datasets go together: measured on a pair of twins, a stranger and a spoiler, without a change to the run."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rslearn.train.model_context import ModelContext

from rslp.errors import ConfigError
from rslp.rundir import RunDir
from rslp.train.balance.affinity import Affinity, groups_of, interval
from rslp.train.fit import fit
from tests.tiny import TinyEncoder, run_config, write_run
from tests.train.relatives import NAMES, write
from tests.train.test_fit import Killed, same, weights


class Normed(TinyEncoder):
    """An encoder with batch statistics, which a measurement must not change."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.layers.insert(1, torch.nn.BatchNorm2d(8))


class Again(Callback):
    """Measures a second time, by an SGD step of a copy's encoder. It stands behind ``Affinity`` among the callbacks."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.before = [parameter.detach().clone() for parameter in pl_module.model.encoder.parameters()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        (affinity,) = [callback for callback in trainer.callbacks if isinstance(callback, Affinity)]  # type: ignore[attr-defined]
        parts = sorted(batch, key=lambda part: part.dataset)

        def loss(model: torch.nn.Module, part: Any) -> torch.Tensor:
            return sum(model(ModelContext(part.inputs, part.metadatas), part.targets).loss_dict.values())  # type: ignore[no-any-return]

        pairs = zip(pl_module.model.encoder.parameters(), self.before, strict=True)
        length = torch.cat([(now - then).detach().flatten() for now, then in pairs]).norm()
        gradients, harm = [], torch.zeros((len(parts), len(parts)))
        for i, part in enumerate(parts):
            model = copy.deepcopy(pl_module.model)
            before = torch.stack([loss(model, other).detach() for other in parts])
            model.zero_grad()
            loss(model, part).backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.encoder.parameters()]))
            torch.optim.SGD(model.encoder.parameters(), lr=float(length / gradients[-1].norm())).step()
            harm[i] = torch.stack([loss(model, other).detach() for other in parts]) / before - 1
        directions = torch.nn.functional.normalize(torch.stack(gradients), dim=1)
        measured = torch.tensor(affinity.measurements[-1])
        torch.testing.assert_close(measured[0], -harm, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(measured[1], directions @ directions.T, rtol=1e-3, atol=1e-5)
        SEEN.append(trainer.global_step)


SEEN: list[int] = []


def config(folder: Path, *, windows: int, epochs: int, every: int | None, **data: Any) -> dict[str, Any]:
    if not folder.exists():
        for name in NAMES:
            write(folder / name, name, windows)
    made = run_config({name: (str(folder / name), "classify") for name in NAMES}, epochs=epochs, **data)
    callback = {"class_path": "rslp.train.Affinity", "init_args": {"every_n_steps": every}}
    made["trainer"] |= {"check_val_every_n_epoch": epochs, "callbacks": [callback] if every else []}
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "large"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> RunDir:
    made = config(folder, windows=48, epochs=8, every=10, batch_sizes=16, dropout=0.1)
    run = write_run(tmp_path_factory.mktemp("run"), made)
    assert fit(run) == 0
    return run


def test_a_twin_helps_and_neither_a_stranger_nor_a_spoiler_does(run: RunDir) -> None:
    content = json.loads(run.affinity.read_text())
    assert content["groups"] == [["spoiler"], ["stranger"], ["twin_a", "twin_b"]]
    assert (content["datasets"], content["measurements"], content["every_n_steps"]) == (list(NAMES), 8, 10)
    low, high, cosine = (np.array(matrix) for matrix in (*map(content["affinity"].get, ("low", "high")),
                                                         content["cosine"]["mean"]))  # fmt: skip
    assert min(low[2, 3], low[3, 2]) > 0 > max(high[0, 2], high[0, 3])
    assert np.allclose(cosine.diagonal(), 1) and np.allclose(cosine, cosine.T) and cosine[2, 3] > 0 > cosine[0, 2]


def small(folder: Path, *, every: int | None, **settings: Any) -> dict[str, Any]:
    made = config(folder.parent / "small", windows=4, epochs=3, every=every, datasets_per_step=4, **settings)
    made["model"]["init_args"]["model"]["init_args"]["encoder"][0]["class_path"] = "tests.train.test_affinity.Normed"
    return made


def test_measurements_change_nothing_of_the_run_and_survive_a_kill(tmp_path: Path, folder: Path) -> None:
    runs = {}
    for name, every, step in (("without", None, None), ("whole", 1, None), ("killed", 1, 3), ("killed", 1, None)):
        made = small(folder, every=every, dropout=0.2)
        if step is not None:
            made["trainer"]["callbacks"] += [{"class_path": "tests.train.test_fit.DieAt", "init_args": {"step": step}}]
        run = runs[name] = RunDir(tmp_path / name / "projects" / "tests" / "tiny")
        if not run.path.exists():
            write_run(tmp_path / name, made)
        run.config.write_text(json.dumps(made))
        if step is None:
            assert fit(run) == 0
        else:
            with pytest.raises(Killed):
                fit(run)
    assert same(weights(runs["without"].last), weights(runs["whole"].last))
    assert not runs["without"].affinity.exists()
    contents = [json.loads(runs[name].affinity.read_text()) for name in ("whole", "killed")]
    assert contents[0] == contents[1] and contents[0]["measurements"] == 6


def test_an_affinity_is_the_share_of_a_loss_that_a_step_takes_away(tmp_path: Path, folder: Path) -> None:
    made = small(folder, every=1)
    made["trainer"]["callbacks"] += [{"class_path": "tests.train.test_affinity.Again"}]
    assert fit(write_run(tmp_path, made)) == 0
    # The file is imported a second time, by its class path.
    assert importlib.import_module("tests.train.test_affinity").SEEN == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("datasets", [2, 3, 8])
@pytest.mark.parametrize("batches", [1, 4])
def test_measurements_take_at_most_a_quarter(datasets: int, batches: int) -> None:
    """In forward passes; a backward pass takes two."""
    steps = interval(datasets, batches=batches)
    assert 3 * datasets + datasets**2 <= steps * 3 * batches / 4 <= 3 * datasets + datasets**2 + 3 * batches / 4


@pytest.mark.parametrize(
    ("mean", "width", "groups"),
    [
        ([[1, 0.2, -0.1], [0.2, 1, -0.1], [-0.1, -0.1, 1]], 0.05, [["a", "b"], ["c"]]),
        ([[1, 0.2, -0.1], [0.2, 1, -0.1], [-0.1, -0.1, 1]], 0.5, [["a"], ["b"], ["c"]]),  # all are uncertain
        ([[1, 0.3, -0.1], [-0.1, 1, 0.1], [0.1, 0.1, 1]], 0.01, [["a", "b", "c"]]),  # a, c: 0; a + b, c: 0.05
        ([[1, -0.3, 0.2], [-0.3, 1, 0.1], [0.2, 0.1, 1]], 0.01, [["a", "c"], ["b"]]),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 0.0, [["a"], ["b"], ["c"]]),
        ([[1, 1, 1], [1, 1, 1], [1, 1, 1]], 0.1, [["a", "b", "c"]]),
    ],
)
def test_groups_are_those_of_the_rule(mean: list[list[float]], width: float, groups: list[list[str]]) -> None:
    values = np.array(mean, dtype=np.float64)
    matrix = {"mean": mean, "low": (values - width).tolist(), "high": (values + width).tolist()}
    assert groups_of(["a", "b", "c"], matrix) == groups
    assert groups_of(["a", "b", "c"], {**matrix, "low": None, "high": None}) == [["a"], ["b"], ["c"]]


def test_what_it_cannot_measure_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="Affinity: every_n_steps is 0; 1 or more"):
        Affinity(0)
    made = small(folder, every=1)
    made["data"]["init_args"] |= {"disabled_datasets": list(NAMES[1:]), "datasets_per_step": 1}
    with pytest.raises(ConfigError, match="Affinity compares datasets, and the run has one"):
        fit(write_run(tmp_path, made))
    trainer = SimpleNamespace(datamodule=SimpleNamespace(data_modules={"a": 0, "b": 0}), world_size=2, precision="32")
    with pytest.raises(ConfigError, match="it runs in one process; there are 2"):
        Affinity(1).on_fit_start(trainer, None)  # type: ignore[arg-type]


def test_a_run_with_nothing_to_measure_says_so(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, small(folder, every=100))
    assert fit(run) == 0
    assert "warning: Affinity measured nothing: fewer than 100 steps (every_n_steps)" in capsys.readouterr().err
    assert not run.affinity.exists()
