"""Each argument of rslearn's heads, and of the decoders under them, changes what the joint model gives."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import torch
from rslearn.models.component import FeatureExtractor, FeatureMaps, TokenFeatureMaps
from rslearn.train.model_context import ModelContext, RasterImage, SampleMetadata

from rslp.errors import ConfigError
from rslp.models.joint import JointModel
from tests.arguments.effects import Effects, cases, made, outcome, pair

_M, _T = "rslearn.models", "rslearn.train.tasks"
SIZE = 8
_OF_TOKENS = ("TemporalTransformer", "TokensToChannels", "BreakpointScan", "SimpleAttentionPool", "AttentionPool")
# Heads over pixels, with the channels they take here.
_DENSE = {"SegmentationHead": 3, "PerPixelRegressionHead": 1}
_RELU = {"class_path": "torch.nn.ReLU"}
_TANH = {"class_path": "torch.nn.Tanh"}
_DETR: dict[str, Any] = {
    "predictor": {"in_channels": 8, "num_classes": 2, "num_queries": 4, "transformer": {"d_model": 8, "nhead": 2,
                  "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 8}},
    "criterion": {"num_classes": 2},
}  # fmt: skip
EFFECTS = {
    f"{_T}.classification.ClassificationHead": Effects({}, {}),
    f"{_T}.regression.RegressionHead": Effects(
        {}, {"loss_mode": "l1", "use_sigmoid": True, "huber_delta": 0.01}, {"huber_delta": {"loss_mode": "huber"}}
    ),
    f"{_T}.per_pixel_regression.PerPixelRegressionHead": Effects(
        {}, {"loss_mode": "l1", "use_sigmoid": True, "huber_delta": 0.01}, {"huber_delta": {"loss_mode": "huber"}}
    ),
    f"{_T}.segmentation.SegmentationHead": Effects(
        {}, {"weights": [1.0, 5.0, 1.0], "dice_loss": True, "temperature": 3.0}
    ),
    f"{_M}.faster_rcnn.FasterRCNN": Effects(
        {"downsample_factors": [1], "num_channels": 8, "num_classes": 2, "anchor_sizes": [[4]]},
        {
            "downsample_factors": [1, 2],
            "num_channels": 4,
            "num_classes": 3,
            "anchor_sizes": [[2]],
            "box_score_thresh": 0.99,
        },
    ),
    f"{_M}.detr.detr.Detr": Effects(
        _DETR,
        {
            "predictor": {**_DETR["predictor"], "num_queries": 5},
            "criterion": {**_DETR["criterion"], "eos_coef": 0.9},
        },
    ),
    f"{_M}.pooling_decoder.PoolingDecoder": Effects(
        {"in_channels": 8, "out_channels": 2},
        {
            "in_channels": 4,
            "out_channels": 3,
            "num_conv_layers": 1,
            "num_fc_layers": 1,
            "conv_channels": 5,
            "fc_channels": 5,
        },
        {"conv_channels": {"num_conv_layers": 1}, "fc_channels": {"num_fc_layers": 1}},
    ),
    f"{_M}.pooling_decoder.SegmentationPoolingDecoder": Effects(
        {"in_channels": 8, "out_channels": 3}, {"in_channels": 4, "out_channels": 2, "image_key": "small"}
    ),
    f"{_M}.conv.Conv": Effects(
        {"in_channels": 8, "out_channels": 3, "kernel_size": 3, "activation": _TANH},
        {
            "in_channels": 4,
            "out_channels": 2,
            "kernel_size": 1,
            "padding": 0,
            "stride": 2,
            "activation": _RELU,
            "batch_norm": True,
        },
        {"stride": {"padding": 1}},
    ),
    f"{_M}.unet.UNetDecoder": Effects(
        {"in_channels": [[1, 8], [2, 8]], "out_channels": 3},
        {
            "in_channels": [[1, 8], [2, 4]],
            "out_channels": 2,
            "conv_layers_per_resolution": 2,
            "kernel_size": 5,
            "num_channels": {1: 6},
            "target_resolution_factor": 2,
            "original_size_to_interpolate": [5, 5],
            "use_batch_norm": True,
        },
    ),
    f"{_M}.upsample.Upsample": Effects({"scale_factor": 2}, {"scale_factor": 3, "mode": "nearest"}),
    f"{_M}.feature_center_crop.FeatureCenterCrop": Effects({"sizes": [[4, 4], [2, 2]]}, {"sizes": [[2, 2], [2, 2]]}),
    f"{_M}.pick_features.PickFeatures": Effects({"indexes": [0]}, {"indexes": [1]}),
    f"{_M}.pixel_shuffle.PixelShuffle": Effects({"upscale_factor": 2}, {"upscale_factor": 1}),
    f"{_M}.resize_features.ResizeFeatures": Effects(
        {"out_sizes": [[4, 4], [4, 4]]}, {"out_sizes": [[3, 3], [4, 4]], "mode": "nearest"}
    ),
    f"{_M}.fpn.Fpn": Effects(
        {"in_channels": [8, 8], "out_channels": 4}, {"in_channels": [8, 4], "out_channels": 3, "prepend": True}
    ),
    f"{_M}.concatenate_features.ConcatenateFeatures": Effects(
        {"key": "image", "num_conv_layers": 0},
        {
            "key": "small",
            "in_channels": 3,
            "conv_channels": 5,
            "out_channels": 3,
            "num_conv_layers": 2,
            "kernel_size": 1,
            "final_relu": True,
        },
        {
            "in_channels": {"num_conv_layers": 1, "in_channels": 2, "out_channels": 2},
            "conv_channels": {"num_conv_layers": 2, "in_channels": 2, "out_channels": 2},
            "out_channels": {"num_conv_layers": 1, "in_channels": 2, "out_channels": 2},
            "num_conv_layers": {"num_conv_layers": 1, "in_channels": 2, "out_channels": 2},
            "kernel_size": {"num_conv_layers": 1, "in_channels": 2, "out_channels": 2},
            "final_relu": {"num_conv_layers": 1, "in_channels": 2, "out_channels": 2},
        },
    ),
    f"{_M}.temporal_transformer.TemporalTransformer": Effects(
        {"dim": 8, "depth": 1, "num_heads": 2},
        {
            "dim": 4,
            "depth": 2,
            "num_heads": 4,
            "dim_feedforward": 16,
            "dropout": 0.5,
            "positional_embedding_num_tokens": 3,
        },
    ),
    f"{_M}.attention_pooling.SimpleAttentionPool": Effects({"in_dim": 8}, {"in_dim": 4, "hidden_linear": True}),
    f"{_M}.attention_pooling.AttentionPool": Effects(
        {"in_dim": 8, "num_heads": 2}, {"in_dim": 4, "num_heads": 4, "linear_on_kv": False}
    ),
    f"{_M}.tokens_to_channels.TokensToChannels": Effects(
        {"in_dim": 8, "out_dim": 2}, {"in_dim": 4, "out_dim": 3, "mask_fill_value": -9.0}
    ),
    f"{_M}.breakpoint_scan.BreakpointScan": Effects(
        {"in_dim": 8, "output": "EVIDENCE"}, {"in_dim": 4, "output": "BEFORE", "hidden": 5}
    ),
}


class Features(FeatureExtractor):
    """Feature maps of two scales, or tokens of three dates."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, context: ModelContext) -> Any:
        draw = torch.Generator().manual_seed(1)
        count = len(context.inputs)
        if self.tokens:
            masks = torch.ones(count, SIZE, SIZE, 3)
            masks[:, :2, :, 1] = 0
            return TokenFeatureMaps([torch.randn(count, 8, SIZE, SIZE, 3, generator=draw)], [masks.bool()])
        sizes = (SIZE, SIZE // 2)
        return FeatureMaps([torch.randn(count, 8, size, size, generator=draw) for size in sizes])


def _seen(path: str, arguments: dict[str, Any]) -> list[Any]:
    """Outputs and losses of a head, or what a decoder makes of features, in training and in evaluation."""
    torch.manual_seed(0)
    last = made(path, arguments)
    name = path.rpartition(".")[2]
    tokens = name in _OF_TOKENS
    if not name.endswith("Head") and name not in ("FasterRCNN", "Detr"):
        context, _ = _batch()
        looks = []
        for training in (True, False):
            torch.manual_seed(1)
            last.train(training)
            looks.append(outcome(lambda: last(Features(tokens)(context), context)))
        return looks
    model = JointModel(encoder=[Features(tokens)], decoders={"t": [*_under(name, arguments), last]})
    model.set_datasets({"d": ["t"]})
    looks = []
    for training in (True, False):
        torch.manual_seed(1)
        model.train(training)
        context, targets = _batch(dense=name in _DENSE)
        looks.append(outcome(lambda: model(context, targets)))  # noqa: B023 - called at once
    return looks


def _under(name: str, arguments: dict[str, Any]) -> list[torch.nn.Module]:
    """What brings features to the form that a head takes."""
    torch.manual_seed(2)
    flat = {"ClassificationHead": 2, "RegressionHead": 1}
    if name in flat:
        return [made(f"{_M}.pooling_decoder.PoolingDecoder", {"in_channels": 8, "out_channels": flat[name]})]
    pick = made(f"{_M}.pick_features.PickFeatures", {"indexes": [0]})
    if name in _DENSE:
        own = {"in_channels": 8, "out_channels": _DENSE[name], "kernel_size": 1, "activation": _TANH}
        return [pick, made(f"{_M}.conv.Conv", own)]
    return [] if len(arguments.get("downsample_factors", [])) == 2 else [pick]


def _batch(*, dense: bool = False) -> tuple[ModelContext, list[dict[str, Any]]]:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    draw = torch.Generator().manual_seed(4)
    metadata = SampleMetadata(
        window_group="g", window_name="w", window_bounds=(0, 0, SIZE, SIZE), crop_bounds=(0, 0, SIZE, SIZE), crop_idx=0,
        num_crops_in_window=1, time_range=(start, start + timedelta(days=9)), projection=None, dataset_source="d",
    )  # fmt: skip
    inputs, targets = [], []
    for _ in range(2):
        image = torch.rand(2, 1, SIZE, SIZE, generator=draw)
        inputs.append({"image": RasterImage(image, None), "small": RasterImage(image[:, :, ::2, ::2], None)})
        valid = RasterImage(torch.ones(1, 1, SIZE, SIZE), None) if dense else torch.tensor(1.0)
        maps = {
            "classes": RasterImage(torch.randint(0, 3, (1, 1, SIZE, SIZE), generator=draw), None),
            "values": RasterImage(torch.rand(1, 1, SIZE, SIZE, generator=draw), None),
        }
        flat = {"class": torch.tensor(1), "value": torch.tensor(0.3)}
        boxes = {"boxes": torch.tensor([[1.0, 1.0, 5.0, 6.0]]), "labels": torch.tensor([1])}
        side = torch.tensor(float(SIZE))
        targets.append({**maps, **flat, **boxes, "width": side, "height": side, "valid": valid})
    return ModelContext(inputs=inputs, metadatas=[metadata, metadata]), [{"t": target} for target in targets]


@pytest.mark.parametrize("case", cases(EFFECTS))
def test_effect(case: str) -> None:
    path, base, changed = pair(EFFECTS, case)
    one, other = _seen(path, base), _seen(path, changed)
    assert not any(isinstance(look, tuple) for look in one), one
    assert one != other


def test_masks_of_objects_are_refused() -> None:
    with pytest.raises(ConfigError, match="instance_segmentation"):
        arguments = dict(EFFECTS[f"{_M}.faster_rcnn.FasterRCNN"].base)
        JointModel(
            encoder=[Features(False)],
            decoders={"t": [made(f"{_M}.faster_rcnn.FasterRCNN", {**arguments, "instance_segmentation": True})]},
        )
