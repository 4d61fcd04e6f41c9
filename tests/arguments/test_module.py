"""Arguments of rslearn's joint data module, its Lightning module and its restoring of weights, in our classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rslearn.train.lightning_module import RestoreConfig
from upath import UPath

from rslp.check.config import parse
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import ConfigError
from rslp.models import restoring
from rslp.train.fit import fit
from rslp.train.module import JointModule
from tests.arguments.effects import Effects, cases, made, outcome, pair, plain
from tests.tiny import TinyEncoder, data_module_config, run_config, write_dataset, write_run

pytestmark = pytest.mark.filterwarnings("ignore")
_MODULE = run_config({"a": ("A", "classify")})["model"]["init_args"]
EFFECTS = {
    "rslp.train.MultiDatasetDataModule": Effects(
        {"data_modules": ["a", "b"], "num_workers": 0},
        {
            "data_modules": ["a"],
            "num_workers": 1,
            "sample_mode": "cycle",
            "batch_sizes": {"a": 1},
            "refill_batches": True,
            "per_dataset_patch_limit": 2,
            "steps_per_dataset": 2,
            "disabled_datasets": ["b"],
        },
        {"steps_per_dataset": {"sample_mode": "reptile", "steps_per_dataset": 1}},
    ),
    "rslearn.train.lightning_module.RestoreConfig": Effects(
        {"restore_path": "plain.pt"},
        {
            "restore_path": "other.pt",
            "selector": ["state_dict"],
            "ignore_prefixes": ["layers.0"],
            "remap_prefixes": [["old.", ""]],
        },
        {"selector": {"restore_path": "nested.pt"}, "remap_prefixes": {"restore_path": "mixed.pt"}},
    ),
    "rslp.train.JointModule": Effects(
        {name: _MODULE[name] for name in ("model", "task")},
        {
            "model": run_config({"b": ("B", "regress")})["model"]["init_args"]["model"],
            "task": run_config({"b": ("B", "regress")})["model"]["init_args"]["task"],
            "optimizer": {"class_path": "rslearn.train.optimizer.AdamW", "init_args": {"lr": 0.5}},
            "scheduler": {"class_path": "rslearn.train.scheduler.CosineAnnealingScheduler", "init_args": {"T_max": 5}},
            "lr": 0.5,
            "plateau": True,
            "plateau_factor": 0.5,
            "plateau_patience": 1,
            "plateau_min_lr": 0.1,
            "plateau_cooldown": 3,
        },
        {f"plateau_{name}": {"plateau": True} for name in ("factor", "patience", "min_lr", "cooldown")},
    ),
}
REFUSED = {
    "visualize_dir": "pictures",
    "metrics_file": "metrics.json",
    "write_test_metrics": True,
    "print_parameters": True,
    "print_model": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of different sizes, and weights of an encoder in several forms."""
    folder = tmp_path_factory.mktemp("module")
    for name, size in (("a", 6), ("b", 3)):
        write_dataset(folder / name, "classify", train=size, val=2, test=1)
    torch.manual_seed(1)
    weights = TinyEncoder().state_dict()
    torch.save(weights, folder / "plain.pt")
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, folder / "other.pt")
    torch.save({**weights, "state_dict": {name: tensor + 2 for name, tensor in weights.items()}}, folder / "nested.pt")
    torch.save({"state_dict": weights}, folder / "within.pt")
    mixed = dict(list(weights.items())[:1]) | {f"old.{name}": tensor for name, tensor in list(weights.items())[1:]}
    torch.save(mixed, folder / "mixed.pt")
    torch.save({name: tensor[..., :0] for name, tensor in weights.items()}, folder / "small.pt")
    (folder / "torn.pt").write_bytes(b"this is no torch file")
    return folder


def seen(path: str, arguments: Mapping[str, Any], folder: Path) -> Any:
    """The batches of an epoch, the restored weights, or optimiser and scheduler with outputs' names."""
    if path.endswith("MultiDatasetDataModule"):
        return outcome(lambda: _epoch(arguments, folder))
    if path.endswith("RestoreConfig"):
        return outcome(lambda: _restored(arguments, folder))
    module: JointModule = made(path, arguments)
    optimizer = module.optimizer_factory.build(module)
    scheduler = module.scheduler_factory.build(optimizer) if module.scheduler_factory else None
    rates = [group["lr"] for group in optimizer.param_groups]
    plateau = (
        {} if scheduler is None else {k: v for k, v in vars(scheduler).items() if isinstance(v, int | float | list)}
    )
    parts = [str(module.model), list(module.task.tasks)]
    return outcome(lambda: [rates, str(type(scheduler)), plateau, *parts])


def _epoch(arguments: Mapping[str, Any], folder: Path) -> Any:
    modules = {
        name: made(
            "rslearn.train.data_module.RslearnDataModule",
            data_module_config(str(folder / name), {name: "classify"})["init_args"],
        )
        for name in arguments["data_modules"]
    }
    data = MultiDatasetDataModule(**{**arguments, "data_modules": modules, "store": "off"})
    return [data.num_workers, sorted(data.data_modules), [plain(batch) for batch in data._epoch(0)]]


def _restored(arguments: Mapping[str, Any], folder: Path) -> Any:
    torch.manual_seed(2)
    model = TinyEncoder()
    restoring.load(made_restore(arguments, folder), model)
    return model.state_dict()


def made_restore(arguments: Mapping[str, Any], folder: Path) -> RestoreConfig:
    path = "rslearn.train.lightning_module.RestoreConfig"
    restore: RestoreConfig = made(path, {**arguments, "restore_path": str(folder / arguments["restore_path"])})
    return restore


@pytest.mark.parametrize("case", cases(EFFECTS))
def test_effect(case: str, folder: Path) -> None:
    path, base, changed = pair(EFFECTS, case)
    without = seen(path, base, folder)
    assert not isinstance(without, tuple), without
    assert without != seen(path, changed, folder)


@pytest.mark.parametrize("argument", REFUSED)
def test_what_is_refused_is_one_line(argument: str) -> None:
    config = run_config({"a": ("nowhere", "classify")})
    config["model"]["init_args"][argument] = REFUSED[argument]
    (found,) = [finding for finding in parse(config).findings if finding.error]
    assert found.at == ("model", "init_args", argument)
    assert f"JointModule has no argument '{argument}'" in found.what


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"restore_path": "absent.pt"}, r"restore_config\.restore_path: .*absent\.pt does not exist"),
        ({"restore_path": "torn.pt"}, "restore_config: .*torn.pt can't be read as weights"),
        ({"restore_path": "plain.pt", "selector": ["state_dict"]}, "can't be read as weights: KeyError"),
        ({"restore_path": "within.pt"}, "none of the 1 tensors in .* has a name of the model"),
        ({"restore_path": "small.pt"}, "small.pt does not fit the model"),
    ],
)
def test_weights_that_cannot_be_restored_are_one_line(arguments: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        restoring.load(made_restore(arguments, folder), TinyEncoder())
    assert "\n" not in str(caught.value)


def test_a_missing_file_of_weights_is_found_by_the_check_and_by_the_run(folder: Path, tmp_path: Path) -> None:
    config = run_config({"a": (str(folder / "a"), "classify")}, epochs=1)
    config["model"]["init_args"]["restore_config"] = {"restore_path": str(tmp_path / "absent.pt")}
    (found,) = parse(config).findings
    assert (found.error, found.at) == (True, ("model", "init_args", "restore_config", "restore_path"))
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/absent.pt does not exist")):
        fit(write_run(tmp_path, config))


def test_a_run_starts_from_the_weights_and_says_what_is_not_in_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config({"a": (str(folder / "a"), "classify")}, epochs=1)
    restore = {"restore_path": str(folder / "other.pt"), "remap_prefixes": [["layers.", "encoder.0.layers."]]}
    config["model"]["init_args"]["restore_config"] = restore
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.0
    run = write_run(tmp_path, config)
    assert fit(run) == 0
    assert "2 of the model are not in it (e.g. decoders.a.0.output_layer.weight)" in capsys.readouterr().err
    trained = torch.load(run.last, weights_only=True)["state_dict"]
    given = torch.load(folder / "other.pt", weights_only=True)
    assert torch.equal(trained["model.encoder.0.layers.0.bias"], given["layers.0.bias"])


def test_options_of_the_path_reach_the_file_system() -> None:
    (UPath("memory://weights.pt")).write_bytes(b"")
    arguments = {"restore_path": "memory://weights.pt", "restore_path_options": {"skip_instance_cache": True}}
    restore = made("rslearn.train.lightning_module.RestoreConfig", arguments)
    assert restore.restore_path.storage_options == arguments["restore_path_options"]
