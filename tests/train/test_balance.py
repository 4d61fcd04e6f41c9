"""Balance of losses and gradients: its formulas, written down a second time, within real steps, resumes and ranks."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchjd.aggregation
import yaml
from lightning.pytorch import LightningModule, Trainer
from rslearn.train.model_context import ModelContext

from rslp.check.config import parse
from rslp.config.merge import merge
from rslp.errors import CheckpointError, ConfigError, TrainingError
from rslp.evaluate.evaluation import evaluate
from rslp.rundir import RunDir
from rslp.runtime import extras
from rslp.train.balance import AGGREGATIONS, AggregationName
from rslp.train.balance.aggregation import Aggregation
from rslp.train.balance.losses import LossBalance, loss_balance, split_group
from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run
from tests.train.ranks import ROOT, train_on
from tests.train.relatives import write
from tests.train.test_fit import logged, same, start, weights
from tests.train.test_steps import OneGraph

Data = dict[str, tuple[str, str]]
# A zero: the task keeps its loss, and takes no part.
LOSS_WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5, "off": 0.0}


def steps(seed: int = 0) -> Iterator[dict[str, float]]:
    """Steps with some of three tasks of unlike losses, which fall at unlike rates; sometimes with no valid label."""
    draws = np.random.default_rng(seed)
    for step in range(60):
        present = [task for task in "abc" if draws.random() < 0.6]
        losses = {"a": 900.0, "b": 1.0 / (1 + step / 5), "c": 0.01 * (1 + draws.random())}
        yield {task: 0.0 if draws.random() < 0.1 else losses[task] * (1 + draws.random()) for task in present}


def take(balance: LossBalance, losses: Mapping[str, float]) -> dict[str, float]:
    """One step, in two batches of each task that hold a quarter and three quarters of its units; the step's weights."""
    balance.begin()
    before = balance.weights()
    total = torch.zeros((), requires_grad=True)
    for share, factor in ((0.25, 2.0), (0.75, 2.0 / 3)):
        values = {t: {"x": torch.tensor(v * factor * LOSS_WEIGHTS[t])} for t, v in losses.items()}
        factors = {t: torch.tensor(share / 3, dtype=torch.float64) for t in losses}
        total = total + balance.loss(values, factors, like=torch.zeros(()))
    total.backward()
    balance.update()
    return before


def scaled(history: list[dict[str, float]]) -> dict[str, float]:
    sizes = {}
    for task in LOSS_WEIGHTS:
        values = [losses[task] for losses in history if losses.get(task)]
        decays = [0.9 ** (len(values) - 1 - i) for i in range(len(values))]
        sizes[task] = float(np.average(values, weights=decays)) if values else math.inf
    return {task: 1 / size for task, size in sizes.items()}


def famo(history: list[dict[str, float]]) -> dict[str, float]:
    """Span by span: the logits as Adam moves them, and the weights of the step after the history."""
    logits, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    spans: list[dict[str, list[float]]] = [{}]
    for losses in history:
        for task, loss in losses.items():
            if loss:
                spans[-1].setdefault(task, []).append(loss)
        if len(spans[-1]) == 3:
            spans.append({})
    means = [np.array([np.mean(span[task]) for task in "abc"]) for span in spans[:-1]]
    for moves, (old, new) in enumerate(itertools.pairwise(means), start=1):
        z = np.exp(logits) / np.exp(logits).sum()
        jacobian = np.diag(z) - np.outer(z, z)
        gradient = jacobian @ (np.log(old) - np.log(new)) + 0.001 * logits
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        logits = logits - 0.025 * (m / (1 - 0.9**moves)) / (np.sqrt(v / (1 - 0.999**moves)) + 1e-8)
    sizes = dict(zip("abc", means[-1], strict=True)) if means else {t: np.mean(x) for t, x in spans[0].items()}
    z = {task: math.exp(logit) for task, logit in zip("abc", logits, strict=True)}
    raw = {task: z[task] / size for task, size in sizes.items()}
    return {task: len(raw) * float(value) / float(sum(raw.values())) for task, value in raw.items()}


@pytest.mark.parametrize("reference", [scaled, famo])
def test_weights_are_those_of_the_formula(reference: Callable[[list[dict[str, float]]], dict[str, float]]) -> None:
    balance = loss_balance({scaled: "scale", famo: "famo"}[reference], LOSS_WEIGHTS)
    balance.set_tasks(["a", "b", "c"])
    history: list[dict[str, float]] = []
    for losses in steps():
        expected = reference(history)
        given = take(balance, losses)
        assert given == pytest.approx({t: expected.get(t, 0.0) for t in LOSS_WEIGHTS}, rel=2e-4)
        history.append(losses)


def test_log_variances_are_learned_as_adam_learns_them() -> None:
    """The task's loss in a step is factor x (e^-s l + s / 2) times its loss weight: the factors add up to 1 / 3."""
    balance = loss_balance("uncertainty", LOSS_WEIGHTS)
    body = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([body, *balance.parameters()], lr=0.5, weight_decay=0.3)
    split_group(optimizer, balance)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.3), (0.025, 0.0)]
    s, m, v, n = {}, dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 0)
    for losses in steps():
        optimizer.zero_grad()
        assert take(balance, losses) == pytest.approx(
            {t: math.exp(-s[t]) if t in s else 0.0 for t in LOSS_WEIGHTS}, rel=1e-4
        )
        optimizer.step()
        for task, loss in losses.items():
            if task not in s:
                s |= {task: math.log(2 * loss)} if loss else {}
                continue
            gradient = LOSS_WEIGHTS[task] * (0.5 - math.exp(-s[task]) * loss) / 3 if loss else 0.0
            n[task] += 1
            m[task], v[task] = 0.9 * m[task] + 0.1 * gradient, 0.999 * v[task] + 0.001 * gradient**2
            corrected = m[task] / (1 - 0.9 ** n[task]), v[task] / (1 - 0.999 ** n[task])
            s[task] -= 0.025 * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
    assert balance.weights()["off"] == 0


@pytest.mark.parametrize("name", ["scale", "uncertainty", "famo"])
def test_an_absent_task_does_not_move_and_a_negative_loss_is_an_error(name: str) -> None:
    balance = loss_balance(name, LOSS_WEIGHTS)
    optimizer = torch.optim.AdamW(balance.parameters(), lr=0.1) if name == "uncertainty" else None
    for losses in [{"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"b": math.nan, "off": 1.0}, {"b": math.inf}]:
        before = copy.deepcopy(balance.state_dict())
        take(balance, losses)
        # A step that is not finite is left out.
        if optimizer is not None and all(map(math.isfinite, losses.values())):
            optimizer.step()
        balance.zero_grad()
    assert same(before, balance.state_dict())
    with pytest.raises(TrainingError, match=f"the loss of task 'b' is -1; balance: {name} needs losses above 0"):
        take(balance, {"b": -1.0})


class Expected(OneGraph):
    """Each step's gradients a second time, with the weights of the balance, or aggregated by TorchJD itself."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        name, model = pl_module.balance_name, copy.deepcopy(pl_module.model)
        factors = pl_module.balance.weights() or dict.fromkeys(model.tasks, 1.0)
        rows, total = [], torch.zeros(())
        for part in batch:
            context = ModelContext(inputs=part.inputs, metadatas=part.metadatas)
            loss = factors[part.dataset] * sum(model(context, part.targets).loss_dict.values()) / len(batch)
            rows.append(torch.autograd.grad(loss, list(model.encoder.parameters()), retain_graph=True))
            total = total + loss
        total.backward()
        # With a single dataset in the step there is nothing to aggregate.
        if name in AGGREGATIONS and len(rows) > 1:
            jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            aggregator = {"upgrad": "UPGrad", "pcgrad": "PCGrad", "cagrad": "CAGrad", "mgda": "MGDA"}[name]
            made = getattr(torchjd.aggregation, aggregator)(**({"c": 0.4} if name == "cagrad" else {}))
            gradient = made(jacobian) * (1 if name == "pcgrad" else len(rows))
            torch.nn.utils.vector_to_parameters(gradient, [p.grad for p in model.encoder.parameters()])
        self.expected = {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    kinds = ("classify", "regress", "segment")
    return {kind: (str(write_dataset(folder / kind, kind, train=6, val=1, test=1)), kind) for kind in kinds}


def config(data: Data, name: str, *, epochs: int = 2, **settings: Any) -> dict[str, Any]:
    made = run_config(data, epochs=epochs, **{"datasets_per_step": 2, **settings})
    made["model"]["init_args"]["balance"] = name
    made["model"]["init_args"]["model"]["init_args"]["loss_weights"] = {"classify": 2.0}
    made["trainer"] |= {"check_val_every_n_epoch": epochs, "log_every_n_steps": 1}
    return made


LOSS_BALANCES = ("scale", "uncertainty", "famo")


@pytest.mark.parametrize("name", [*LOSS_BALANCES, *AGGREGATIONS])
def test_gradients_of_a_run_are_those_of_the_formula(tmp_path: Path, data: Data, name: str) -> None:
    made = config(data, name)
    made["trainer"]["callbacks"] = [{"class_path": "tests.train.test_balance.Expected"}]
    run = write_run(tmp_path, made)
    assert fit(run) == 0
    names = {row["name"] for row in logged(run) if row["name"].endswith("weight")}
    task = [f"train/{kind}/{kind}/weight" for kind in data]
    assert names == (set(task) if name in LOSS_BALANCES else {f"train/{kind}/weight" for kind in data})


@pytest.mark.parametrize("name", ["uncertainty", "famo", "pcgrad"])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path, data: Data, name: str) -> None:
    made = config(data, name, epochs=3, dropout=0.2)
    made["trainer"] |= {"check_val_every_n_epoch": 3, "accumulate_grad_batches": 2}
    whole = start(tmp_path / "whole", made)
    start(tmp_path / "killed", made, die_at=5)
    run = start(tmp_path / "killed", made)
    assert same(weights(run.last), weights(whole.last))
    assert [row for row in logged(run) if "weight" in row["name"]] == [
        row for row in logged(whole) if "weight" in row["name"]
    ]


def same_in_two_processes(folder: Path, data: Data, names: tuple[str, ...]) -> None:
    runs: dict[int, list[RunDir]] = {1: [], 2: []}
    for world, name in itertools.product(runs, names):
        made = config(data, name, epochs=3, batch_sizes=4 // world, datasets_per_step=3)
        runs[world].append(write_run(folder / f"{name}-{world}", made))
    assert [fit(run) for run in runs[1]] == [0] * len(names)
    train_on(2, [run.path for run in runs[2]])
    for alone, both in zip(*runs.values(), strict=True):
        ours = weights(both.last)
        for key, value in weights(alone.last).items():
            torch.testing.assert_close(
                ours[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key} {text}"
            )


def test_two_processes_give_what_one_gives(tmp_path: Path, data: Data) -> None:
    same_in_two_processes(tmp_path, data, ("famo", "upgrad"))


@pytest.mark.slow
def test_two_processes_give_what_one_gives_with_any_balance(tmp_path: Path, data: Data) -> None:
    same_in_two_processes(tmp_path, data, ("scale", "uncertainty", "pcgrad", "cagrad", "mgda"))


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("spoiled")
    return {name: (write(folder / name, name, 24), "classify") for name in ("spoiler", "twin_a")}


@pytest.mark.parametrize("name", ["uncertainty", "famo"])
def test_a_spoiler_is_weighted_down(tmp_path: Path, spoiled: Data, name: str) -> None:
    made = config(spoiled, name, epochs=16, batch_sizes=8)
    made["model"]["init_args"]["model"]["init_args"].pop("loss_weights")
    run = write_run(tmp_path, made)
    assert fit(run) == 0
    found = {row["name"]: float(row["value"]) for row in logged(run)}
    assert found["train/twin_a/twin_a/weight"] > 2 * found["train/spoiler/spoiler/weight"]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_rows_of_zeros_and_of_what_is_not_finite_have_no_say(name: AggregationName) -> None:
    def aggregated(*gradients: list[float]) -> list[float]:
        shared = torch.nn.Parameter(torch.zeros(2))
        aggregation = Aggregation(name, [shared])
        aggregation.begin(str(i) for i in range(len(gradients)))
        for i, gradient in enumerate(gradients):
            aggregation.dataset = str(i)
            shared.grad = torch.tensor(gradient)
            aggregation.collect()
        aggregation.apply(seed=0)
        assert shared.grad is not None
        return shared.grad.tolist()

    assert aggregated([1.0, 2.0]) == aggregated([0.0, 0.0], [1.0, 2.0]) == [1.0, 2.0]
    assert aggregated([1.0, 0.0], [0.0, 0.0], [-0.5, 1.0]) == aggregated([1.0, 0.0], [-0.5, 1.0])
    # The guard against such gradients comes after it.
    assert not all(map(math.isfinite, aggregated([math.nan, 1.0], [1.0, 1.0])))


def test_old_runs_go_on_and_another_balance_is_refused(tmp_path: Path, data: Data) -> None:
    made = config(data, "none", epochs=1)
    run = write_run(tmp_path, made)
    assert fit(run) == 0
    assert not any("balance" in key for key in (*read_checkpoint(run.last), *weights(run.last)))
    changed = config(data, "scale", epochs=2)
    run.config.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"was trained with balance: none, and the config has balance: scale; "):
        fit(run)
    # Weights alone are those of any run.
    assert evaluate(run, splits=("val",), checkpoint=str(run.last))


def faults(made: dict[str, Any]) -> list[str]:
    return [f"{'.'.join(map(str, finding.at))}: {finding.what}" for finding in parse(made).findings if finding.error]


def test_what_cannot_be_is_refused_by_the_check_and_by_the_run(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = "model.init_args.balance: "
    one = {"classify": data["classify"]}
    surgery = config(data, "cagrad")
    surgery["trainer"]["callbacks"] = [
        {"class_path": "rslp.train.surgery.MiniPCGrad", "init_args": {"selectors": [""]}}
    ]
    half = config(data, "mgda")
    half["trainer"]["precision"] = "16-mixed"
    single = config(data, "upgrad", datasets_per_step=1)
    for made, message in (
        (config(data, "famoo"), "one of none, scale, uncertainty, famo, upgrad, pcgrad, cagrad, mgda; got 'famoo'; did "
         "you mean famo?"),
        (single, "upgrad aggregates the gradients of a step's datasets, and each step has one dataset; set "
         "data.init_args.datasets_per_step to 2 or more"),
        (config(one, "upgrad", datasets_per_step=1), "upgrad aggregates gradients of several datasets, and the run has "
         "one"),
        (surgery, "trainer.callbacks.0: MiniPCGrad changes the gradients that balance: cagrad aggregates; leave one of "
         "them out"),
        (half, "mgda needs gradients that are not scaled; set trainer.precision to bf16-mixed or 32-true"),
    ):  # fmt: skip
        made["model"]["init_args"]["model"]["init_args"].pop("loss_weights")
        assert any(fault.endswith(message) for fault in faults(made))
        run = write_run(tmp_path / str(len(list(tmp_path.iterdir()))), made)
        with pytest.raises(ConfigError) as caught:
            fit(run)
        assert message in str(caught.value)
    monkeypatch.setitem(extras._EXTRAS, "balance", "torchjd_that_is_absent")
    (message,) = faults(config(data, "upgrad"))
    assert message == at + "upgrad needs TorchJD, which is not installed; install it: pip install 'rslp[balance]'"


def test_a_frozen_encoder_leaves_nothing_to_aggregate(tmp_path: Path, data: Data) -> None:
    made = config(data, "upgrad")
    made["trainer"]["callbacks"] = [{"class_path": "rslp.train.Freeze"}]
    with pytest.raises(ConfigError, match="upgrad aggregates gradients on the encoder, which is frozen for the whole"):
        fit(write_run(tmp_path, made))


BLOCKS = re.findall(r"```yaml\n(global_overrides:.*?)```", (ROOT / "docs" / "joint_training.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("name", ["balance:", "rslp.train.Affinity", "EMAWeightAveraging"])
def test_what_the_page_shows_is_a_valid_config(data: Data, name: str) -> None:
    (block,) = [block for block in BLOCKS if name in block]
    overrides = yaml.safe_load(block)["global_overrides"]
    assert faults(merge(run_config(data), overrides)) == []
