"""The joint model: which decoders run, what is weighted, what is shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rslearn.models.component import FeatureMaps, FeatureVector
from rslearn.models.conv import Conv
from rslearn.models.faster_rcnn import FasterRCNN
from rslearn.models.multitask import MultiTaskModel
from rslearn.models.pooling_decoder import PoolingDecoder
from rslearn.models.task_embedding import TaskChannelEmbedding
from rslearn.models.trunk import DecoderTrunk
from rslearn.train.model_context import ModelContext, RasterImage, SampleMetadata
from rslearn.train.tasks.classification import ClassificationHead
from rslearn.train.tasks.regression import RegressionHead
from rslearn.train.tasks.segmentation import SegmentationHead

from rslp.errors import ConfigError
from rslp.models.heads import LabelRange
from rslp.models.joint import JointModel
from tests.tiny import _PROJECTION, TinyEncoder


def context(dataset: str, samples: int = 2) -> ModelContext:
    torch.manual_seed(0)
    metadata = SampleMetadata("g", "w", (0, 0, 8, 8), (0, 0, 8, 8), 0, 1, None, _PROJECTION, dataset)
    inputs: list[dict[str, Any]] = [{"image": RasterImage(torch.randn(2, 1, 8, 8))} for _ in range(samples)]
    return ModelContext(inputs=inputs, metadatas=[metadata] * samples)


def classify(classes: int) -> list[Any]:
    return [PoolingDecoder(8, classes), ClassificationHead()]


def label(value: int) -> dict[str, torch.Tensor]:
    return {"class": torch.tensor(value), "valid": torch.tensor(1.0)}


def decoders() -> dict[str, list[Any]]:
    return {"crops": classify(3), "moisture": [PoolingDecoder(8, 1), RegressionHead()]}


TARGETS = [{"crops": label(1)}, {"crops": label(2)}]


def test_a_batch_runs_through_its_own_datasets_decoder_alone() -> None:
    model = JointModel([TinyEncoder()], decoders())
    output = model(context("crops"), TARGETS)
    assert [set(entry) for entry in output.outputs] == [{"crops"}] * 2
    assert set(output.loss_dict) == {"crops_cls"}
    output.loss_dict["crops_cls"].backward()
    assert all(p.grad is None for p in model.decoders["moisture"].parameters())


def test_stock_joint_decoding_crashes_where_ours_runs() -> None:
    """rslearn 0.1.19: lazily an attribute is missing, eagerly the targets of absent datasets are."""
    with pytest.raises(AttributeError, match="target_to_decoder"):
        MultiTaskModel([TinyEncoder()], decoders(), lazy_decode=True)(context("crops"), TARGETS)
    with pytest.raises(KeyError, match="moisture"):
        MultiTaskModel([TinyEncoder()], decoders(), lazy_decode=False)(context("crops"), TARGETS)


def test_a_dataset_with_two_tasks_yields_both() -> None:
    model = JointModel([TinyEncoder()], decoders())
    model.set_datasets({"fields": ["crops", "moisture"]})
    targets = [{**t, "moisture": {"value": torch.tensor(1.0), "valid": torch.tensor(1.0)}} for t in TARGETS]
    output = model(context("fields"), targets)
    assert [set(entry) for entry in output.outputs] == [{"crops", "moisture"}] * 2
    assert set(output.loss_dict) == {"crops_cls", "moisture_regress"}


def test_a_loss_weight_is_applied_once() -> None:
    torch.manual_seed(1)
    model = JointModel([TinyEncoder()], decoders())
    plain = model(context("crops"), TARGETS).loss_dict["crops_cls"]
    model.loss_weights["crops"] = 3.0
    assert torch.allclose(model(context("crops"), TARGETS).loss_dict["crops_cls"], 3 * plain)


def test_parameters_do_not_depend_on_the_order_of_a_mapping() -> None:
    forward = JointModel([TinyEncoder()], decoders())
    backward = JointModel([TinyEncoder()], dict(reversed(decoders().items())))
    assert [name for name, _ in forward.named_parameters()] == [name for name, _ in backward.named_parameters()]


def test_a_task_embedding_changes_the_output_and_leaves_the_features() -> None:
    torch.manual_seed(1)
    model = JointModel([TinyEncoder()], decoders(), trunk=DecoderTrunk(task_embedding=TaskChannelEmbedding(8)))
    assert model.trunk is not None
    features = FeatureMaps([torch.zeros(2, 8, 8, 8)])
    conditioned = {task: model._condition(features, task=task, samples=2).feature_maps[0] for task in decoders()}
    assert not torch.equal(conditioned["crops"], conditioned["moisture"])
    assert torch.equal(features.feature_maps[0], torch.zeros(2, 8, 8, 8))


def test_two_tasks_in_one_head_learn_their_own_labels() -> None:
    torch.manual_seed(0)
    offsets = {
        "a": {"outputs_key": "class", "offset": 0, "num_outputs": 2},
        "b": {"outputs_key": "class", "offset": 2, "num_outputs": 3},
    }
    model = JointModel(
        [TinyEncoder()], {"head": classify(5)}, decoder_to_target={"head": ["a", "b"]}, task_label_offsets=offsets
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        for task, labels in (("a", (0, 1)), ("b", (2, 0))):
            losses = model(context(task), [{task: label(value)} for value in labels]).loss_dict
            sum(losses.values()).backward()
        optimizer.step()
    for task, labels, classes in (("a", (0, 1), 2), ("b", (2, 0), 3)):
        outputs = [entry[task].detach() for entry in model(context(task)).outputs]
        assert [len(output) for output in outputs] == [classes] * 2
        assert [int(output.argmax()) for output in outputs] == list(labels)
        assert all(abs(output.sum().item() - 1) < 1e-5 for output in outputs)


@given(offset=st.integers(0, 9), count=st.integers(1, 9), labels=st.lists(st.integers(0, 8), max_size=6))
def test_labels_come_back_from_a_shared_head(offset: int, count: int, labels: list[int]) -> None:
    labels = [value % count for value in labels]
    span = LabelRange("labels", offset, count)
    target = {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": torch.zeros(len(labels), 4)}
    shifted = span.shifted(target)
    assert torch.equal(target["labels"], torch.tensor(labels, dtype=torch.int64))
    strangers = torch.tensor([offset + count, offset - 1])
    detections = {
        "labels": torch.cat([shifted["labels"], strangers]),
        "boxes": torch.zeros(len(labels) + 2, 4),
        "scores": torch.zeros(len(labels) + 2),
    }
    own = span.select(detections)
    assert own["labels"].tolist() == labels
    assert len(own["boxes"]) == len(own["scores"]) == len(labels)


def test_raster_labels_are_shifted_too() -> None:
    target = {"classes": RasterImage(torch.zeros(1, 1, 2, 2, dtype=torch.int32)), "valid": None}
    assert LabelRange("classes", 4, 2).shifted(target)["classes"].image.unique().tolist() == [4]
    assert target["classes"].image.unique().tolist() == [0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weights": {"crops": -1.0}}, "got -1.0; 0 or more"),
        ({"loss_weights": {"crops": float("nan")}}, "got nan; 0 or more"),
        ({"loss_weights": {"nothing": 1.0}}, "loss_weights: names the task 'nothing'"),
        ({"decoder_to_target": {"nothing": ["a"]}}, "decoder_to_target: names the decoder 'nothing'"),
        ({"task_label_offsets": {"crops": {"offset": 1}}}, "needs outputs_key, offset and num_outputs"),
        ({"task_label_offsets": {"crops": {"outputs_key": "value", "offset": 0, "num_outputs": 1}}}, "must be one of"),
        ({"task_label_offsets": {"nothing": {}}}, "names the task 'nothing'"),
    ],
)
def test_options_that_fit_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JointModel([TinyEncoder()], decoders(), **options)


def test_a_task_without_a_decoder_is_named() -> None:
    with pytest.raises(ConfigError, match="no decoder for task 'roads' of dataset 'osm'"):
        JointModel([TinyEncoder()], decoders()).set_datasets({"osm": ["roads"]})


def test_feature_vectors_pass_without_a_trunk() -> None:
    """Nothing between encoder and decoder looks into the features."""

    class Vector(TinyEncoder):
        def forward(self, context: ModelContext) -> FeatureVector:  # type: ignore[override]
            return FeatureVector(torch.zeros(len(context.inputs), 3))

    model = JointModel([Vector()], {"crops": [ClassificationHead()]})
    assert len(list(model(context("crops"), TARGETS).outputs)) == 2


def raster(values: torch.Tensor) -> RasterImage:
    return RasterImage(values[None, None])


def test_two_segmentations_in_one_head_learn_their_own_labels() -> None:
    torch.manual_seed(0)
    offsets = {name: {"outputs_key": "classes", "offset": 2 * i, "num_outputs": 2} for i, name in enumerate("ab")}
    model = JointModel(
        [TinyEncoder()],
        {"head": [Conv(8, 4, 1, activation=torch.nn.Identity()), SegmentationHead()]},
        decoder_to_target={"head": ["a", "b"]},
        task_label_offsets=offsets,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    images = torch.stack([entry["image"].image[0, 0] for entry in context("a").inputs])
    labels = {"a": (images > 0).long(), "b": (images < 0).long()}
    for _ in range(60):
        optimizer.zero_grad()
        for task, truth in labels.items():
            targets = [{task: {"classes": raster(t), "valid": raster(torch.ones(8, 8))}} for t in truth]
            sum(model(context(task), targets).loss_dict.values()).backward()
        optimizer.step()
    for task, truth in labels.items():
        outputs = torch.stack([entry[task] for entry in model(context(task)).outputs])
        assert outputs.shape == (2, 2, 8, 8)
        assert (outputs.argmax(dim=1) == truth).float().mean() > 0.95
        torch.testing.assert_close(outputs.sum(dim=1), torch.ones(2, 8, 8))


def test_two_detections_in_one_head_are_told_apart() -> None:
    torch.manual_seed(0)
    offsets = {name: {"outputs_key": "labels", "offset": 2 * i, "num_outputs": 2} for i, name in enumerate("ab")}
    head = FasterRCNN(downsample_factors=[1], num_channels=8, num_classes=4, anchor_sizes=[[4]])
    model = JointModel(
        [TinyEncoder()], {"head": [head]}, decoder_to_target={"head": ["a", "b"]}, task_label_offsets=offsets
    )
    seen: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, args: seen.extend(target["labels"] for target in args[2] or []))
    box = {"boxes": torch.tensor([[2.0, 2.0, 6.0, 6.0]]), "labels": torch.tensor([1]), "valid": torch.tensor(1)}
    for task, label_in_head in (("a", 1), ("b", 3)):
        seen.clear()
        assert model(context(task), [{task: box}, {task: box}]).loss_dict
        assert [int(labels) for labels in seen] == [label_in_head] * 2
        model.eval()
        for entry in model(context(task)).outputs:
            assert set(entry[task]["labels"].tolist()) <= {0, 1}
        model.train()


def test_two_regressions_share_a_head_without_ranges_and_keep_their_values() -> None:
    """rslearn 0.1.19 renormalises every shared output as if it were a probability: all values would be 1."""
    model = JointModel(
        [TinyEncoder()], {"head": [PoolingDecoder(8, 1), RegressionHead()]}, decoder_to_target={"head": ["a", "b"]}
    )
    targets = {name: [{name: {"value": torch.tensor(2.0), "valid": torch.tensor(1.0)}}] * 2 for name in "ab"}
    values = {name: [float(entry[name].detach()) for entry in model(context(name)).outputs] for name in "ab"}
    assert values["a"] == values["b"]
    assert all(abs(value - 1) > 1e-3 for value in values["a"])
    assert set(model(context("b"), targets["b"]).loss_dict) == {"b_regress"}


def test_the_index_of_a_task_embedding_does_not_depend_on_the_order_of_a_mapping() -> None:
    orders = (decoders(), dict(reversed(decoders().items())))
    embeddings = [TaskChannelEmbedding(8) for _ in orders]
    for order, embedding in zip(orders, embeddings, strict=True):
        JointModel([TinyEncoder()], order, trunk=DecoderTrunk(task_embedding=embedding))
    assert embeddings[0].target_to_embed_idx == embeddings[1].target_to_embed_idx == {"crops": 0, "moisture": 1}


def test_a_task_embedding_conditions_what_a_decoder_says() -> None:
    torch.manual_seed(1)
    model = JointModel(
        [TinyEncoder()],
        {"head": classify(3)},
        trunk=DecoderTrunk(task_embedding=TaskChannelEmbedding(8)),
        decoder_to_target={"head": ["a", "b"]},
    )
    a, b = (torch.stack([entry[name] for entry in model(context(name)).outputs]) for name in "ab")
    assert (a - b).abs().max() > 1e-3
