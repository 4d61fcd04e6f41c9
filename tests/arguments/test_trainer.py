"""Each argument of Lightning's trainer has the effect on a joint run that it has elsewhere, or is refused, or noted."""

from __future__ import annotations

import copy
import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rslp.check.config import parse
from rslp.config import without_effect
from rslp.errors import ConfigError, RunError, TrainingError
from rslp.evaluate.evaluation import evaluate
from rslp.evaluate.prediction import predict
from rslp.rundir import RunDir
from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests.arguments import recorder
from tests.arguments.effects import plain
from tests.tiny import TinyEncoder, run_config, write_dataset, write_run

pytestmark = pytest.mark.filterwarnings("ignore")
_CALLBACKS = "lightning.pytorch.callbacks"
_RECORDER = {"class_path": "tests.arguments.recorder.Recorder"}
_BF16 = {"class_path": "lightning.pytorch.plugins.precision.MixedPrecision",
         "init_args": {"precision": "bf16-mixed", "device": "cpu"}}  # fmt: skip
_STOPPING = {"class_path": f"{_CALLBACKS}.EarlyStopping",
             "init_args": {"monitor": "val_loss", "patience": 0, "min_delta": 9.0}}  # fmt: skip
_RATES = {"class_path": f"{_CALLBACKS}.LearningRateMonitor", "init_args": {"logging_interval": "step"}}
_CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "LOGS"}}
# By argument: its value, what of the run it changes, and what else both runs have.
EFFECTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "accumulate_grad_batches": (2, "steps", {}),
    "benchmark": (True, "benchmark", {}),
    "callbacks": ([_RECORDER, _RATES], "callbacks", {}),
    "check_val_every_n_epoch": (2, "validated", {}),
    "detect_anomaly": (True, "anomaly", {}),
    "deterministic": (True, "deterministic", {}),
    "enable_model_summary": (True, "callbacks", {}),
    "enable_progress_bar": (True, "callbacks", {}),
    "gradient_clip_algorithm": ("value", "weights", {"gradient_clip_val": 0.01}),
    "gradient_clip_val": (0.01, "weights", {}),
    "limit_train_batches": (1, "steps", {}),
    "limit_val_batches": (1, "validated", {}),
    "log_every_n_steps": (1, "logged", {"callbacks": [_RECORDER, _RATES]}),
    "logger": (_CSV, "loggers", {}),
    "max_epochs": (1, "epochs", {}),
    "max_steps": (1, "steps", {}),
    "max_time": ("00:00:00:01", "callbacks", {}),
    "min_epochs": (3, "epochs", {"callbacks": [_RECORDER, _STOPPING], "max_epochs": 3}),
    "min_steps": (6, "steps", {"callbacks": [_RECORDER, _STOPPING], "max_epochs": 3}),
    "num_sanity_val_steps": (1, "sanity", {}),
    "plugins": ([_BF16], "plugins", {}),
    "precision": ("bf16-mixed", "weights", {}),
    "profiler": ("simple", "profiler", {}),
    "reload_dataloaders_every_n_epochs": (1, "loaders", {}),
    "val_check_interval": (1, "validated", {}),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "barebones": (True, "a run writes checkpoints, metrics and its progress by itself"),
    "devices": (2, "leave it to RSLP_RANKS"),
    "enable_checkpointing": (False, "a run writes checkpoints, metrics and its progress by itself"),
    "fast_dev_run": (True, "the run would count as done"),
    "num_nodes": (2, "leave it to RSLP_RANKS"),
    "overfit_batches": (1, "each epoch draws other samples"),
    "strategy": ("fsdp", "every process holds the whole model here, leave the strategy out"),
    # Values of honoured arguments that would train nothing, or end in a traceback.
    "accelerator": ("gpu", "gpu"),
    "accumulate_grad_batches": (0, "must be a whole number from 1"),
    "max_epochs": (0, "nothing is trained"),
    "max_steps": (0, "nothing is trained"),
    "limit_train_batches": (0, "nothing is trained"),
    "max_time": ("00:00:00:00", "nothing was trained"),
    "precision": ("64-true", "weights and images are float32; use bf16-mixed or 32-true"),
    "val_check_interval": (100, "100 steps, but an epoch has 2"),
}
NOTED: dict[str, Any] = {
    "default_root_dir": "ELSEWHERE",
    "enable_autolog_hparams": False,
    "logger": True,
    "model_registry": "x",
    "use_distributed_sampler": True,
}
# What check knows of the refusals without the machine and the data of the run.
_LATER = ("devices", "num_nodes", "strategy", "accelerator", "max_time", "val_check_interval")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    path = write_dataset(tmp_path_factory.mktemp("data") / "d", "classify", train=4, val=4, test=4)
    return {"classify": (str(path), "classify")}


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Lightning leaves torch's settings as a run had them."""
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark


def config(data: dict[str, tuple[str, str]], trainer: Mapping[str, Any]) -> dict[str, Any]:
    made = run_config(data, epochs=2)
    made["trainer"] |= {"enable_progress_bar": False, "callbacks": [_RECORDER], **copy.deepcopy(dict(trainer))}
    return made


def trained(folder: Path, data: dict[str, tuple[str, str]], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Train, and give what was seen of it."""
    recorder.SEEN.clear()
    made = config(data, trainer)
    if isinstance(logger := made["trainer"].get("logger"), dict):
        logger["init_args"]["save_dir"] = str(folder / "logs")
    run = write_run(folder, made)
    assert fit(run) == 0
    checkpoint = read_checkpoint(run.last)
    with run.metrics.open() as handle:
        logged = Counter(row["name"] for row in csv.DictReader(handle))
    weights = plain(checkpoint["state_dict"])
    seen = {"steps": checkpoint["global_step"], "epochs": checkpoint["epoch"], "weights": weights, "logged": logged}
    return {**recorder.SEEN, "loaders": len(recorder.SEEN["loaders"]), "sanity": "sanity" in recorder.SEEN, **seen}


_BASES: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("argument", EFFECTS)
def test_effect(argument: str, data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    value, changes, beside = EFFECTS[argument]
    if (key := str(beside)) not in _BASES:
        _BASES[key] = trained(tmp_path / "base", data, beside)
    other = trained(tmp_path / "other", data, {**beside, argument: value})
    assert other[changes] != _BASES[key][changes]


def test_the_accelerator_is_the_one_that_is_named(data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    assert trained(tmp_path, data, {"accelerator": "cpu"})["device"] == "cpu"


@pytest.mark.parametrize("argument", REFUSED)
def test_what_is_refused_is_one_line(argument: str, data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    value, message = REFUSED[argument]
    if argument == "accelerator" and torch.cuda.is_available():
        pytest.skip("there is one here")
    made = config(data, {argument: value})
    with pytest.raises((ConfigError, RunError, TrainingError), match=message) as caught:
        fit(write_run(tmp_path, made))
    assert "\n" not in str(caught.value)
    if argument not in _LATER:
        (found,) = [finding for finding in parse(made).findings if finding.error]
        assert (found.at, message in found.what) == (("trainer", argument), True)


_CALLBACKS_REFUSED: dict[str, dict[str, Any]] = {
    "BatchSizeFinder": {},
    "LearningRateFinder": {},
    "GradientAccumulationScheduler": {"init_args": {"scheduling": {1: 2}}},
    "StochasticWeightAveraging": {"init_args": {"swa_lrs": 0.1}},
}


@pytest.mark.parametrize("name", sorted(_CALLBACKS_REFUSED))
def test_callbacks_that_tune_are_refused(name: str, data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    arguments = _CALLBACKS_REFUSED[name]
    made = config(data, {"callbacks": [_RECORDER, {"class_path": f"{_CALLBACKS}.{name}", **arguments}]})
    with pytest.raises(ConfigError, match=rf"config\.yaml:\d+: trainer\.callbacks\.1: {name} is not supported"):
        fit(write_run(tmp_path, made))
    assert ("trainer", "callbacks", 1) in [finding.at for finding in parse(made).findings]


@pytest.mark.parametrize("argument", NOTED)
def test_what_is_noted_has_no_effect(argument: str, data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    value = str(tmp_path / "elsewhere") if NOTED[argument] == "ELSEWHERE" else NOTED[argument]
    made = config(data, {argument: value})
    ((rule, (at,)),) = without_effect(made)
    assert (rule.name, at) == (argument, ("trainer", argument))
    one, other = trained(tmp_path / "one", data, {}), trained(tmp_path / "other", data, {argument: value})
    assert one == other
    assert not (tmp_path / "elsewhere").exists()


def test_limits_of_an_evaluation(data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    counts = {}
    for limit in (None, 1, 0):
        run = _evaluable(tmp_path / str(limit), data, {"limit_test_batches": limit})
        if limit == 0:
            with pytest.raises(RunError, match=r"nothing of the test split was evaluated: trainer\.limit_test_batches"):
                evaluate(run, splits=("test",))
        else:
            counts[limit] = max(row.n for row in evaluate(run, splits=("test",))[0].rows)
    assert counts == {None: 4, 1: 2}


def test_a_limited_prediction_says_what_it_left_out(data: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    counts = []
    for limit in (None, 1):
        run = _evaluable(tmp_path / str(limit), data, {"limit_predict_batches": limit})
        assert predict(run)
        written = json.loads(run.prediction_marker.read_text())["datasets"]["classify"]
        counts.append((written["windows"], written["left_out"]))
    assert counts == [(4, 0), (2, 2)]


def test_an_evaluation_tracks_tensors_where_inference_mode_is_off(
    data: dict[str, tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, forward = [], TinyEncoder.forward

    def watched(self: TinyEncoder, context: Any) -> Any:
        seen.append(torch.is_inference_mode_enabled())
        return forward(self, context)

    run = _evaluable(tmp_path, data, {})
    monkeypatch.setattr(TinyEncoder, "forward", watched)
    for wanted in (True, False):
        run.config.write_text(yaml.safe_dump(config(data, {"max_epochs": 1, "inference_mode": wanted})))
        seen.clear()
        evaluate(run, splits=("test",))
        assert set(seen) == {wanted}


def _evaluable(folder: Path, data: dict[str, tuple[str, str]], trainer: Mapping[str, Any]) -> RunDir:
    run = write_run(folder, config(data, {"max_epochs": 1, **trainer}))
    assert fit(run) == 0
    return run
