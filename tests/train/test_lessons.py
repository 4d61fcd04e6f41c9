"""What upstream's joint training got wrong, line by line.

``UPSTREAM`` says of each fault of rslearn 0.1.19 that concerns training which test shows it there, and ours without it.
``AUTHORS`` says of each bug that the authors of joint training met which check finds it: the check passes on our code,
and fails on a variant of it that has the bug again.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from rslearn.models.component import FeatureMaps
from rslearn.models.embedding_cache import EmbeddingCache
from rslearn.models.faster_rcnn import FasterRCNN
from rslearn.models.galileo import GalileoModel, GalileoSize
from rslearn.models.multitask import MultiTaskMergedModel, MultiTaskModel
from rslearn.models.pooling_decoder import PoolingDecoder
from rslearn.models.task_embedding import TaskChannelEmbedding
from rslearn.models.trunk import DecoderTrunk
from rslearn.train import data_module as stock_data
from rslearn.train.callbacks.freeze_unfreeze import FreezeUnfreeze
from rslearn.train.data_module import collate_fn
from rslearn.train.dataset import IndexMode, SplitConfig
from rslearn.train.lightning_module import RslearnLightningModule
from rslearn.train.model_context import ModelContext, ModelOutput, RasterImage, SampleMetadata
from rslearn.train.tasks.classification import ClassificationHead
from rslearn.train.tasks.multi_task import MetricWrapper
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torchmetrics.classification import MulticlassAccuracy

from rslp.data.batches import StepSampler
from rslp.data.mixture import mixture
from rslp.data.samples import SampleSource
from rslp.errors import CheckpointError, ConfigError, RunError
from rslp.evaluate.evaluation import evaluate
from rslp.io import paths
from rslp.models.optim import Freeze, split_groups
from rslp.rundir import RunDir
from rslp.train import JointModel, MultiDatasetDataModule, build
from rslp.train.callbacks import MetricsLog
from rslp.train.checkpoints import load_weights
from rslp.train.instantiate import Construction
from rslp.train.metrics import normalised
from tests.data.test_bad_samples import source
from tests.tiny import TinyEncoder, add_window, run_config, write_dataset, write_run

CONFIGS = Path(__file__).parents[2] / "rslp/example/configs"

UPSTREAM = {
    "A1 joint training does not run: AttributeError, KeyError": (
        "../models/test_joint",
        "test_stock_joint_decoding_crashes_where_ours_runs",
    ),
    "A2 no worker crashes; 32 workers by default": ("test_lessons", "test_stock_needs_workers_and_ours_does_not"),
    "A2 every dataset in memory, in each process": (
        "test_lessons",
        "test_stock_holds_what_it_has_read_and_ours_does_not",
    ),
    "A4 half precision meets float32 decoders": (
        "../helios/test_model",
        "test_stock_features_in_half_precision_break_the_decoder_and_ours_do_not",
    ),
    "A5 detector and encoder want one input by two names": (
        "test_lessons",
        "test_a_detector_wants_an_input_called_image_and_the_example_gives_it_one",
    ),
    "A6 ten bands can't be normalised": (
        "../helios/test_norm",
        "test_stock_can_not_normalise_ten_bands_and_ours_can",
    ),
    "A7 validation without a checkpoint prints random metrics": (
        "test_lessons",
        "test_stock_scores_random_weights_and_ours_wants_a_checkpoint",
    ),
    "A8 the cache of features mixes up datasets": (
        "test_lessons",
        "test_stock_tells_samples_by_window_and_ours_by_dataset_too",
    ),
    "A9 the index misses windows that came": (
        "test_lessons",
        "test_a_stock_index_misses_new_windows_and_ours_does_not",
    ),
    "A10 small Galileo models don't know their width": (
        "test_lessons",
        "test_stock_does_not_know_the_width_of_small_galileo_models",
    ),
    "A11 the loudest loss chooses the checkpoint": (
        "test_lessons",
        "test_stock_follows_the_loudest_loss_and_ours_the_mean_score",
    ),
    "B refill draws evaluation samples again": (
        "../data/test_mixture",
        "test_the_stock_sampler_repeats_evaluation_samples_and_ours_does_not",
    ),
    "B limits grow with processes": (
        "../data/test_mixture",
        "test_the_stock_sampler_lets_limits_grow_with_processes_and_ours_does_not",
    ),
    "B padded validation": (
        "../data/test_mixture",
        "test_the_stock_sampler_repeats_evaluation_samples_and_ours_does_not",
    ),
    "B MiniPCGrad reads a field that moved": ("test_lessons", "test_stock_surgery_can_not_read_a_batch"),
    "B an unknown task gets embedding 0": (
        "test_lessons",
        "test_stock_takes_an_unknown_task_for_the_first_and_ours_refuses_it",
    ),
    "B merged heads renormalise regression": (
        "test_lessons",
        "test_a_stock_merged_head_makes_every_quantity_1_and_ours_keeps_regression_apart",
    ),
    "B metrics hide errors of keys": ("test_lessons", "test_stock_metrics_hide_a_missing_task_and_ours_do_not"),
    "callbacks of one type collide": ("../models/test_freezing", "test_two_of_the_stock_callbacks_collide"),
    "a thaw breaks the scheduler": ("test_lessons", "test_a_stock_thaw_breaks_schedulers_and_ours_does_not"),
    "a thaw forgets parameters": (
        "test_lessons",
        "test_a_stock_thaw_forgets_parameters_that_look_alike_and_ours_does_not",
    ),
}


@pytest.mark.parametrize(("module", "name"), sorted(set(UPSTREAM.values())))
def test_every_line_has_its_test(module: str, name: str) -> None:
    place = module.removeprefix("../").replace("/", ".") if module.startswith("../") else f"train.{module}"
    assert callable(getattr(importlib.import_module(f"tests.{place}"), name))


def test_stock_needs_workers_and_ours_does_not(data: MultiDatasetDataModule) -> None:
    assert inspect.signature(stock_data.MultiDatasetDataModule).parameters["num_workers"].default == 32
    with pytest.raises(ValueError, match="persistent_workers option needs num_workers > 0"):
        torch.utils.data.DataLoader(TARGETS, num_workers=0, persistent_workers=True)
    assert "persistent_workers=True," in inspect.getsource(stock_data.MultiDatasetDataModule._get_dataloader)
    assert data.num_workers == 0
    assert len(list(data.train_dataloader())) == len(data.train_dataloader())


def test_stock_holds_what_it_has_read_and_ours_does_not(data: MultiDatasetDataModule) -> None:
    sources = data.sources("train")
    sources["a"].sample(0)  # what all windows share is remembered then
    before = len(pickle.dumps(sources["a"]))
    assert len([sources["a"].sample(index) for index in range(len(sources["a"]))]) == 6
    # Flags about the windows, and no images.
    assert len(pickle.dumps(sources["a"])) < before + 6 * 8
    stock = stock_data.MultiDatasetDataModule(dict(data.data_modules), num_workers=1)
    stock.setup("fit")
    held = stock.data_modules["a"].datasets["train"]
    assert "InMemory" in type(held).__name__
    empty = len(pickle.dumps(held))
    assert len([held[index] for index in range(6)]) == 6
    assert len(pickle.dumps(held)) > empty + 6 * 2 * 8 * 8 * 4


def test_a_detector_wants_an_input_called_image_and_the_example_gives_it_one() -> None:
    detector = FasterRCNN([1], num_channels=8, num_classes=2, anchor_sizes=[[4]])
    only = ModelContext(inputs=[{"landsat": RasterImage(torch.rand(11, 1, 8, 8))}], metadatas=[metadata("a")])
    with pytest.raises(KeyError, match="image"):
        detector(FeatureMaps([torch.zeros(1, 8, 8, 8)]), only)
    vessels = yaml.safe_load((CONFIGS / "vessel_detection.yaml").read_text().replace("{", "'").replace("}", "'"))
    transforms = vessels["data"]["init_args"]["default_config"]["transforms"]
    assert "image" in {transform["init_args"].get("output_selector") for transform in transforms}


def test_stock_scores_random_weights_and_ours_wants_a_checkpoint(
    data: MultiDatasetDataModule, config: dict[str, Any], tmp_path: Path
) -> None:
    module = data.data_modules["a"]
    stock = RslearnLightningModule(MultiTaskModel([TinyEncoder()], decoders(["a"])), module.task)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=1)
    module.num_workers = 0
    module.setup("validate")
    loader = torch.utils.data.DataLoader(module.datasets["val"], batch_size=3, collate_fn=collate_fn)
    (metrics,) = trainer.validate(stock, loader, verbose=False)
    assert "val_a/accuracy" in metrics
    with pytest.raises(RunError, match="train the run first"):
        evaluate(write_run(tmp_path / "untrained", config), splits=("val",))


def test_a_stock_index_misses_new_windows_and_ours_does_not(tmp_path: Path, data: MultiDatasetDataModule) -> None:
    path = write_dataset(tmp_path / "data", "classify", train=2)
    modules = [stock_data.RslearnDataModule(
        path=str(path), inputs=of.inputs, task=of.task, index_mode=IndexMode.USE, train_config=SplitConfig()
    ) for of in (data.data_modules["a"],) * 2]  # fmt: skip

    def seen() -> tuple[int, int]:
        modules[0].setup("fit")
        ours = MultiDatasetDataModule({"a": modules[1]}, num_workers=0)
        return len(modules[0].datasets["train"]), len(ours.sources("train")["a"])

    assert seen() == (8, 8)
    add_window(path, "classify", index=8)
    assert seen() == (8, 9)


def test_stock_does_not_know_the_width_of_small_galileo_models() -> None:
    from rslp.helios.galileo import Galileo

    for size in ("nano", "tiny"):
        bare: Any = object.__new__(GalileoModel)
        nn.Module.__init__(bare)
        bare.size, bare.patch_size = GalileoSize(size), 4
        with pytest.raises(AttributeError):
            bare.get_backbone_channels()
    ours: Any = object.__new__(Galileo)
    nn.Module.__init__(ours)
    ours.patch_size, ours.model = 4, nn.Module()
    ours.model.embedding_size = 128
    assert ours.get_backbone_channels() == [(4, 128)]


def test_stock_follows_the_loudest_loss_and_ours_the_mean_score() -> None:
    """Of two models, one is nearly perfect at classes, the other is better at a quantity of large values."""
    losses = {"classes": {"a_cls": 0.01, "b_regress": 100.0}, "quantity": {"a_cls": 5.0, "b_regress": 90.0}}
    logged = {}
    for name, given in losses.items():
        stock: Any = object.__new__(RslearnLightningModule)
        L.LightningModule.__init__(stock)
        output = ModelOutput(outputs=[{}], loss_dict={key: torch.tensor(value) for key, value in given.items()})
        stock.forward, stock.on_val_forward = lambda *_, output=output: output, lambda *_: None
        stock.log_dict, stock.val_metrics = lambda *_, **__: None, type("None", (), {"update": lambda *_: None})
        stock.log = lambda _, value, name=name, **__: logged.__setitem__(name, float(value))
        stock.validation_step(([{}], [{}], [metadata("a")]), 0)
    assert logged["quantity"] < logged["classes"]
    # Accuracy 0.99 and R2 0.50 against accuracy 0.4 and R2 0.55, over floors of 0.5 and 0.
    scores = {
        name: (normalised(accuracy, floor=0.5, best=1) + normalised(r2, floor=0, best=1)) / 2
        for name, accuracy, r2 in (("classes", 0.99, 0.50), ("quantity", 0.40, 0.55))
    }
    assert scores["classes"] > scores["quantity"]


def test_a_stock_merged_head_makes_every_quantity_1_and_ours_keeps_regression_apart() -> None:
    stock: Any = object.__new__(MultiTaskMergedModel)
    stock.task_label_offsets = {"a": {"offset": 0, "num_outputs": 1, "outputs_key": "value"}}
    (wrong,) = stock.unmerge_output_labels([{"a": torch.tensor([37.5])}], "a")
    assert wrong["a"].tolist() == [1.0]
    offsets = {"a": {"offset": 0, "num_outputs": 1, "outputs_key": "value"}}
    with pytest.raises(ConfigError, match="outputs_key must be one of"):
        model("a", task_label_offsets=offsets)


def metadata(dataset: str) -> SampleMetadata:
    return SampleMetadata(
        window_group="g", window_name="w", window_bounds=(0, 0, 8, 8), crop_bounds=(0, 0, 8, 8), crop_idx=0,
        num_crops_in_window=1, time_range=None, projection=None, dataset_source=dataset,  # type: ignore[arg-type]
    )  # fmt: skip


def test_stock_tells_samples_by_window_and_ours_by_dataset_too(data: MultiDatasetDataModule) -> None:
    cache = EmbeddingCache([TinyEncoder()])
    assert cache._get_cache_key(metadata("a")) == cache._get_cache_key(metadata("b"))
    of = data.sources("train")
    assert {of["a"].identity(i) for i in range(6)}.isdisjoint(of["b"].identity(i) for i in range(6))


def test_stock_surgery_can_not_read_a_batch() -> None:
    from rslearn.train.callbacks.gradients import MiniPCGrad

    context = ModelContext(inputs=[{}], metadatas=[metadata("a")])
    with pytest.raises((KeyError, TypeError)):
        MiniPCGrad(["encoder"]).on_train_batch_start(None, None, (context.inputs, [{}]), 0)


def test_stock_takes_an_unknown_task_for_the_first_and_ours_refuses_it() -> None:
    embedding = TaskChannelEmbedding(4)
    embedding.register_tasks(["a", "b"])
    features = [torch.zeros(1, 4, 1, 1)]
    unknown, first = (embedding.compute_embeds(features, [{"dataset_source": name}]) for name in ("c", "a"))
    assert torch.equal(unknown, first)
    with pytest.raises(ConfigError, match="no decoder for task 'c'"):
        model("a", "b").set_datasets({"fields": ["c"]})


def test_stock_metrics_hide_a_missing_task_and_ours_do_not() -> None:
    MetricWrapper("a", MulticlassAccuracy(2)).update([{"b": 1}], [{"b": 1}])
    with pytest.raises(KeyError, match="a"):
        model("a", "b")(context("a"), [{"b": {}}])


def test_a_stock_thaw_breaks_schedulers_and_ours_does_not() -> None:
    toy, optimizer, scheduler = thawing(CosineAnnealingWarmRestarts)
    nn.init.ones_(toy.body.bias)
    FreezeUnfreeze.unfreeze_and_add_param_group(toy.body, optimizer, initial_denom_lr=2.0)
    optimizer.step()
    with pytest.raises(ValueError, match="zip"):
        scheduler.step()
    toy, optimizer, scheduler = thawing(CosineAnnealingWarmRestarts, stage=stage_of)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[1]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"] / 2)


def test_a_stock_thaw_forgets_parameters_that_look_alike_and_ours_does_not() -> None:
    """Lightning takes a parameter for one that the optimiser has if their values are the same: two fresh biases."""
    for stage, trained in ((None, 1), (stage_of, 2)):
        toy, optimizer, _ = thawing(CosineAnnealingWarmRestarts, stage=stage)
        if stage is None:
            with pytest.warns(UserWarning, match="already exist within another group"):
                FreezeUnfreeze.unfreeze_and_add_param_group(toy.body, optimizer, initial_denom_lr=2.0)
        known = {p for group in optimizer.param_groups for p in group["params"]}
        assert len(known.intersection(toy.body.parameters())) == trained


def stage_of(toy: Any) -> Freeze:
    stage = Freeze("body", thaw_at_epoch=1, lr_factor=0.5)
    stage.parameters = list(toy.body.parameters())
    return stage


def thawing(scheduler: Any, *, stage: Callable[[Any], Freeze] | None = None) -> tuple[Any, Any, Any]:
    """A body and a head whose biases are alike; without a stage, the optimiser begins with the head alone."""
    toy: Any = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    toy.body, toy.head = toy["body"], toy["head"]
    for bias in (toy.body.bias, toy.head.bias):
        nn.init.zeros_(bias)
    toy.body.weight.data[:] = 1.0
    if stage is None:
        for parameter in toy.body.parameters():
            parameter.requires_grad = False
    optimizer = torch.optim.AdamW([p for p in (*toy.head.parameters(), *toy.body.parameters()) if p.requires_grad])
    if stage is not None:
        split_groups(optimizer, [stage(toy)])
    return toy, optimizer, scheduler(optimizer, 4)


# The authors' own bugs: what is checked, then our code with the bug again.

SIZES = {"a": 7, "b": 12}
TARGETS: list[dict[str, Any]] = [{"a": {"class": torch.tensor(1), "valid": torch.tensor(1.0)}}] * 2
Plan = Callable[..., Sequence[mixture.PlannedBatch]]


def context(dataset: str) -> ModelContext:
    images = [RasterImage(torch.rand(2, 1, 8, 8)) for _ in range(2)]
    return ModelContext(inputs=[{"image": image} for image in images], metadatas=[metadata(dataset)] * 2)


def decoders(names: Iterable[str]) -> dict[str, list[Any]]:
    return {name: [PoolingDecoder(8, 2), ClassificationHead()] for name in names}


def model(*names: str, cls: type[JointModel] = JointModel, **options: Any) -> JointModel:
    torch.manual_seed(0)
    return cls([TinyEncoder()], decoders(names), **options)


def training(*, epoch: int = 0, world: int = 1, rank: int = 0) -> Sequence[mixture.PlannedBatch]:
    sizes = dict.fromkeys(SIZES, 4)
    return list(mixture.plan_epoch(SIZES, sizes, mixture.Mixture(), seed=0, epoch=epoch, world=world, rank=rank))


def evaluation(*, world: int, rank: int) -> Sequence[mixture.PlannedBatch]:
    return list(mixture.plan_evaluation(SIZES, dict.fromkeys(SIZES, 4), world=world, rank=rank))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lessons")


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    return run_config({name: (str(write_dataset(folder / name, "classify")), "classify") for name in ("a", "b")})


@pytest.fixture
def data(config: dict[str, Any], folder: Path, tmp_path: Path) -> MultiDatasetDataModule:
    return build.build(write_run(tmp_path, config), training=False).datamodule


class Epochs(MultiDatasetDataModule):
    """The second epoch empty: the sampler holds one iterator."""

    def train_dataloader(self) -> Any:
        once = self._training_steps()
        steps = StepSampler(self._epoch(0).steps, lambda: once)
        return self._stage_loader("train", steps, {})


def second_epoch(made: type[MultiDatasetDataModule], config: dict[str, Any]) -> None:
    init_args = config["data"]["init_args"]
    parsed = build.build(write_run_once(init_args["data_modules"]["a"], config), training=False).datamodule
    again = made(parsed.data_modules, num_workers=0)
    loader = again.train_dataloader()
    first, second = len(list(loader)), len(list(loader))
    assert first == second > 0


def write_run_once(module: dict[str, Any], config: dict[str, Any]) -> RunDir:
    place = Path(module["init_args"]["path"]).parent / "run"
    run = RunDir(place / "projects" / "tests" / "tiny")
    return run if run.config.exists() else write_run(place, config)


def reshuffled(plan: Plan) -> None:
    drawn = [[(b.dataset, b.indices) for b in plan(epoch=epoch)] for epoch in (0, 1)]
    assert drawn[0] != drawn[1]


def always_the_first(*, epoch: int) -> Sequence[mixture.PlannedBatch]:
    return training(epoch=0)


def as_many_batches(plan: Plan) -> None:
    assert len({len(plan(world=3, rank=rank)) for rank in range(3)}) == 1


def dealt_out(*, world: int, rank: int) -> Sequence[mixture.PlannedBatch]:
    return training()[rank::world]


def every_sample_once(plan: Plan) -> None:
    drawn = Counter((b.dataset, i) for rank in (0, 1) for b in plan(world=2, rank=rank) for i in b.indices[: b.real])
    assert drawn == Counter((name, i) for name, size in SIZES.items() for i in range(size))


def without_last(*, world: int, rank: int) -> Sequence[mixture.PlannedBatch]:
    return evaluation(world=world, rank=rank)[:-1]


def wrapping(config: Mapping[str, Any]) -> dict[str, Any]:
    with patch.dict(build.TRAINER_DEFAULTS, use_distributed_sampler=True):
        return build.plan_run(config)


def own_sampler(made: Callable[[Mapping[str, Any]], dict[str, Any]], config: dict[str, Any]) -> None:
    planned = made(build._for_run(config, run=RunDir(Path("unused")), training=False))
    trainer = Construction().make(planned["trainer"])
    assert not trainer._accelerator_connector.use_distributed_sampler


class Lonely(MultiDatasetDataModule):
    def _ranks(self) -> tuple[int, int]:
        assert self.trainer is not None, "no trainer"
        return super()._ranks()


def without_trainer(made: type[MultiDatasetDataModule], config: dict[str, Any]) -> None:
    second_epoch(made, config)


class Again(Freeze):
    """Freezes at each start, and thaws at the begin of an epoch alone."""

    def on_train_start(self, trainer: Trainer, pl_module: L.LightningModule) -> None:
        for parameter in self.parameters:
            parameter.requires_grad = False


def stays_thawed(made: type[Freeze]) -> None:
    module = L.LightningModule()
    module.body = nn.Linear(2, 2)
    stage = made("body", thaw_at_epoch=1)
    trainer: Any = type("Resumed", (), {"callbacks": [stage], "current_epoch": 2})()
    stage.setup(trainer, module, "fit")
    assert not any(p.requires_grad for p in module.parameters())
    stage.on_train_start(trainer, module)
    assert all(p.requires_grad for p in module.parameters())


class Stateful(Freeze):
    def state_dict(self) -> dict[str, Any]:
        return {"frozen": True}


def side_by_side(made: type[Freeze]) -> None:
    callbacks: list[Any] = [made("model.encoder", 1), made("model.trunk", 2)]
    Trainer(callbacks=callbacks, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


class Squared(JointModel):
    def forward(self, context: ModelContext, targets: Any = None) -> ModelOutput:
        output = super().forward(context, targets)
        for name in output.loss_dict:
            output.loss_dict[name] = output.loss_dict[name] * self.loss_weights[name.partition("_")[0]]
        return output


def weighted_once(made: type[JointModel]) -> None:
    of = context("a")
    plain, heavy = (model("a", cls=made, loss_weights={"a": w})(of, TARGETS).loss_dict["a_cls"] for w in (1.0, 3.0))
    torch.testing.assert_close(heavy, 3 * plain)


def surgery(scale: float) -> None:
    """Yu et al. 2020: of a gradient, what works against another one is taken away, and nothing else."""
    pcgrad = pytest.importorskip("rslp.train.surgery").MiniPCGrad(["shared"])
    module = L.LightningModule()
    module.shared = nn.Parameter(torch.zeros(2))
    pcgrad.on_train_batch_start(None, module, None, 0)
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    module.shared.grad = first.clone()
    pcgrad.on_after_backward(None, module)
    module.shared.grad += second * scale
    pcgrad.on_after_backward(None, module)
    torch.testing.assert_close(module.shared.grad, torch.tensor([1.0, 1.0]))


class SameCrop(SampleSource):
    def sample(self, index: int, *, draw: int = 0) -> Any:
        return super().sample(index)


def crops_change(made: type[SampleSource], folder: Path) -> None:
    path = folder / "large"
    path = path if path.exists() else write_dataset(path, "classify", size=16, train=2)
    found = source(path, "classify", cls=made, crop_size=8)
    assert len({found.sample(0, draw=draw)[2].crop_bounds for draw in range(6)}) > 1


def silently(module: nn.Module, checkpoint: Any, *, path: Path) -> None:
    module.load_state_dict(checkpoint["state_dict"], strict=False)


def fits_whole(load: Callable[..., None]) -> None:
    part = {"state_dict": {"weight": torch.zeros(2, 2), "more": torch.zeros(1)}}
    try:
        load(nn.Linear(2, 2), part, path=Path("part.ckpt"))
    except CheckpointError as error:
        assert "bias" in str(error) and "more" in str(error)
    else:
        raise AssertionError("a part of a checkpoint was loaded")


class AsGiven(TaskChannelEmbedding):
    def register_tasks(self, task_names: list[str]) -> None:
        super().register_tasks(random.Random(len(AsGiven.orders)).sample(task_names, len(task_names)))
        AsGiven.orders.append(task_names)

    orders: list[list[str]] = []  # noqa: RUF012


def embeddings_in_order(embedding: Callable[..., Any]) -> None:
    names = ["a", "b", "c", "d"]
    trunks = []
    for order in (names, names[::-1]):
        made = model(*order, trunk=DecoderTrunk(task_embedding=embedding(8)))
        assert made.trunk is not None
        trunks.append(made.trunk.task_embedding.target_to_embed_idx)
    assert trunks[0] == trunks[1]


class Overwriting(MetricsLog):
    def rewind(self, step: int) -> None:
        self._path.unlink(missing_ok=True)


def history_kept(made: type[MetricsLog], folder: Path) -> None:
    path = folder / made.__name__ / "metrics.csv"
    for first, steps in ((0, range(4)), (2, range(2, 5))):
        log = made(str(path))
        log.rewind(first)
        for step in steps:
            log.log_metrics({"loss": 1.0}, step)
    assert [row.partition(",")[0] for row in path.read_text().splitlines()] == ["step", "0", "1", "2", "3", "4"]


def as_written(tree: Any, base_dir: Path) -> Any:
    return tree


def variables_expanded(resolve: Callable[..., Any], folder: Path) -> None:
    with pytest.raises(ConfigError, match="RSLP_NOT_SET is not set"):
        resolve({"data": {"init_args": {"path": "${RSLP_NOT_SET}/data"}}}, folder)


def curtly(run: RunDir, *, splits: Sequence[str]) -> None:
    raise RunError("no checkpoint")


def folder_named(look: Callable[..., Any], folder: Path) -> None:
    run = RunDir(folder / "projects" / "tests" / "untrained")
    with pytest.raises(RunError) as caught:
        look(run, splits=("val",))
    assert str(run.checkpoints) in str(caught.value)


AUTHORS: dict[str, tuple[Callable[..., None], Any, Any]] = {
    "second epoch empty": (second_epoch, MultiDatasetDataModule, Epochs),
    "epoch never re-shuffled": (reshuffled, training, always_the_first),
    "unequal batch counts per rank": (as_many_batches, training, dealt_out),
    "Lightning re-wraps the batch sampler": (own_sampler, build.plan_run, wrapping),
    "no trainer on one GPU": (without_trainer, MultiDatasetDataModule, Lonely),
    "resume freezes the encoder again": (stays_thawed, Freeze, Again),
    "two callbacks of one type collide": (side_by_side, Freeze, Stateful),
    "loss weights applied twice": (weighted_once, JointModel, Squared),
    "PCGrad formula wrong": (surgery, 1.0, 0.5),
    "last batch lost in prediction": (every_sample_once, evaluation, without_last),
    "the same crop in every epoch": (crops_change, SampleSource, SameCrop),
    "partial checkpoint loads silently": (fits_whole, load_weights, silently),
    "task embedding by dict order": (embeddings_in_order, TaskChannelEmbedding, AsGiven),
    "history overwritten on preemption": (history_kept, MetricsLog, Overwriting),
    "unexpanded variable in a path": (variables_expanded, paths.resolve_paths, as_written),
    "missing checkpoint without its folder": (folder_named, evaluate, curtly),
}


@pytest.mark.parametrize("line", AUTHORS)
def test_a_bug_of_the_authors_is_not_here_and_would_be_found(line: str, config: dict[str, Any], folder: Path) -> None:
    check, ours, broken = AUTHORS[line]
    needs = {"config": config, "folder": folder}
    check = partial(check, **{name: needs[name] for name in inspect.signature(check).parameters if name in needs})
    check(ours)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check(broken)
