"""Adapters, balanced classes and chosen losses in real runs: exact resume, two processes, merging, freezing."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rslearn.models.component import FeatureExtractor, FeatureMaps
from rslearn.train.lightning_module import RestoreConfig
from rslearn.train.model_context import ModelContext

from rslp.check.config import parse
from rslp.cli.main import main
from rslp.errors import ConfigError
from rslp.models import restoring
from rslp.rundir import RunDir
from rslp.train.build import build
from rslp.train.checkpoints import load_weights, read_checkpoint
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run
from tests.train.ranks import train_on
from tests.train.test_fit import Killed, same, weights

ENCODER = "model.encoder.0."


class Blocks(FeatureExtractor):
    """Two blocks of linear layers over the pixels of the input ``image``; features `B 8 H W`."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = torch.nn.Linear(2, 8)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(2))

    def forward(self, context: ModelContext) -> FeatureMaps:
        images = torch.stack([inputs["image"].image[:, 0] for inputs in context.inputs])
        values = self.pixels(images.movedim(1, -1))
        for block in self.blocks:
            values = values + block(values)
        return FeatureMaps([values.movedim(-1, 1)])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    data = {kind: (str(write_dataset(folder / kind, kind, train=9, val=2)), kind) for kind in ("classify", "segment")}
    config = run_config(data, epochs=2, class_balanced=True, datasets_per_step=2, store="off")
    model = config["model"]["init_args"]["model"]["init_args"]
    model["encoder"] = [{"class_path": "tests.train.test_adapted_runs.Blocks"}]
    model["adapter"] = {"rank": 2, "per_dataset": True, "kind": "dora", "dropout": 0.1}
    heads = {
        "segment": ("SegmentationHead", {"losses": {"focal": 1.0, "dice": 0.5, "lovasz": 0.5}, "weights": [1.0, 2.0]}),
        "classify": ("WeightedClassificationHead", {"label_smoothing": 0.1}),
    }
    for task, (name, arguments) in heads.items():
        model["decoders"][task][-1] = {"class_path": f"rslp.train.heads.{name}", "init_args": arguments}
    config["trainer"]["enable_progress_bar"] = False
    return config


def changed(config: dict[str, Any], **adapter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A copy of the config, and its model's arguments, with other settings of the adapters."""
    other = copy.deepcopy(config)
    model: dict[str, Any] = other["model"]["init_args"]["model"]["init_args"]
    model["adapter"] |= adapter
    return other, model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> RunDir:
    run = write_run(tmp_path_factory.mktemp("run"), config)
    assert fit(run) == 0
    return run


def test_the_adapters_alone_of_the_encoder_train(trained: RunDir) -> None:
    after = weights(trained.last)
    cli = build(trained, training=False)
    before = {f"model.{name}": value for name, value in cli.model.model.state_dict().items()}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    encoder = {name for name in after if name.startswith(ENCODER)}
    assert moved & encoder == {name for name in encoder if ".lora_" in name}
    assert {name.split(".")[-2] for name in moved & encoder} == {"of_classify", "of_segment"}
    cost = (trained.done() or {})["cost"]
    sizes = {f"model.{name}": parameter.numel() for name, parameter in cli.model.model.named_parameters()}
    trains = sum(size for name, size in sizes.items() if ".lora_" in name or not name.startswith(ENCODER))
    assert cost["trained"] == trains < cost["parameters"] == sum(sizes.values())


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, config: dict[str, Any], trained: RunDir) -> None:
    dying = copy.deepcopy(config)
    run = RunDir(tmp_path / "projects" / "tests" / "tiny")
    saving = {"run_dir": str(run.path), "every_n_steps": 2}
    dying["trainer"]["callbacks"] = [
        {"class_path": "rslp.train.checkpoints.RunCheckpoints", "init_args": saving},
        {"class_path": "tests.train.test_fit.DieAt", "init_args": {"step": 7}},
    ]
    write_run(tmp_path, dying)
    with pytest.raises(Killed):
        fit(run)
    assert read_checkpoint(run.last)["global_step"] == 6
    dying["trainer"]["callbacks"].pop()
    run.config.write_text(json.dumps(dying))
    assert fit(run) == 0
    assert same(weights(run.last), weights(trained.last))


def test_two_processes_give_the_weights_of_one(tmp_path: Path, config: dict[str, Any]) -> None:
    smooth, model = changed(config, dropout=0.0)
    # A dice or Lovasz loss of two halves is not that of the whole, see docs/joint_training.md.
    model["decoders"]["segment"][-1]["init_args"]["losses"] = {"cross_entropy": 1.0, "focal": 1.0}
    runs = {}
    for world in (1, 2):
        smooth["data"]["init_args"]["batch_sizes"] = 4 // world
        runs[world] = write_run(tmp_path / str(world), smooth)
    assert fit(runs[1]) == 0
    train_on(2, [runs[2].path])
    ours = weights(runs[2].last)
    for name, value in weights(runs[1].last).items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_merged_checkpoints_are_plain_and_give_the_same(
    tmp_path: Path, config: dict[str, Any], trained: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["helios", "merge_adapters", "--run_dir", str(trained.path), "--output", str(tmp_path / "out")]
    assert main([*words, "--checkpoint", "last"]) == 0
    files = [tmp_path / "out" / f"merged-{name}.ckpt" for name in ("classify", "segment")]
    assert capsys.readouterr().out.split() == list(map(str, files))
    cli = build(trained, training=False)
    load_weights(cli.model, read_checkpoint(trained.last), path=trained.last)
    plain_config, model = changed(config)
    del model["adapter"]
    plain = build(write_run(tmp_path, plain_config), training=False).model
    for file, name in zip(files, ("classify", "segment"), strict=True):
        load_weights(plain, read_checkpoint(file), path=file)
        source = cli.datamodule.sources("val")[name]
        samples = [source.sample(index) for index in range(len(source))]
        context = ModelContext(inputs=[s[0] for s in samples], metadatas=[s[2] for s in samples])
        outputs = [module.eval()(context).outputs for module in (cli.model, plain)]
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="has adapters, and the model has none; `helios merge_adapters` makes"):
        restoring.weights_of(RestoreConfig(str(trained.last), selector=["state_dict"]), plain.model)
    assert main(["helios", "merge_adapters", "--run_dir", str(tmp_path), "--output", str(tmp_path)]) == 2


def freezing(config: dict[str, Any], **freeze: Any) -> dict[str, Any]:
    callback = {"class_path": "rslp.train.Freeze", "init_args": freeze}
    return config | {"trainer": config["trainer"] | {"callbacks": [callback]}}


def test_a_freeze_for_ever_contradicts_and_a_thaw_thaws_the_adapters(tmp_path: Path, config: dict[str, Any]) -> None:
    shared, _ = changed(config, per_dataset=False, kind="lora")
    message = re.escape("Freeze: adapters would never train")
    with pytest.raises(ConfigError, match=message):
        fit(write_run(tmp_path / "never", freezing(shared, modules="model.encoder")))
    findings = parse(freezing(shared, modules="model.encoder")).findings
    assert [finding.what for finding in findings if re.match(message, finding.what)]
    run = write_run(tmp_path / "later", freezing(shared, modules="model.encoder", thaw_at_epoch=1))
    assert fit(run) == 0
    before = build(run, training=False).model.state_dict()
    moved = {name for name, value in weights(run.last).items() if not torch.equal(value, before[name])}
    assert {name for name in moved if name.startswith(ENCODER)} == {name for name in before if ".lora_" in name}
