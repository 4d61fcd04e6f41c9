"""The Galileo encoder, with missing dates masked: real pixel series have gaps, and other gaps in each sensor."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from einops import rearrange
from rslearn.models.component import FeatureMaps
from rslearn.models.galileo.galileo import GalileoModel, GalileoSize, pretrained_weights
from rslearn.models.galileo.single_file_galileo import SPACE_TIME_BANDS_GROUPS_IDX
from rslearn.train.model_context import ModelContext
from upath import UPath

from rslp.errors import CheckpointError, DataError
from rslp.helios.images.dates import Timeline, align

_SENSORS = {"s1": "S1", "s2": "S2"}
_TOLERANCE = timedelta(days=15)


class Galileo(GalileoModel):
    """Rslearn's Galileo for series with gaps of Sentinel-1 and Sentinel-2.

    rslearn's own wrapper takes every sensor of every sample to have the same number of dates, and the dates of one
    sensor for those of both. Here the dates of a sample's sensors are put on one row of time steps, each with its real
    month, and what is missing is masked. Without gaps, both give the same features.

    Inputs: ``s1`` (VV, VH in dB) and ``s2`` (B2 B3 B4 B5 B6 B7 B8 B8A B11 B12 as digital numbers), each ``C T H W``
    with timestamps; a sample may lack one of them. Output: features ``B C H/p W/p``, the mean over the visible tokens
    of a patch of p x p px.

    Args:
        size: which of the published sizes.
        patch_size: edge of a patch, px.
        pretrained_path: a folder that holds ``models/<size>/`` with ``config.json`` and ``encoder.pt``; None downloads.
        autocast_dtype: ``bfloat16``, ``float32``, or None for the dtype of the weights.

    Raises:
        CheckpointError: the folder holds no such weights.
    """

    def __init__(
        self,
        size: GalileoSize,
        patch_size: int = 4,
        pretrained_path: str | None = None,
        autocast_dtype: str | None = None,
    ) -> None:
        if pretrained_path is not None:
            # rslearn would go and download what a mistyped folder lacks.
            for name in ("config.json", "encoder.pt"):
                file = UPath(pretrained_path) / pretrained_weights[size] / name
                if not file.exists():
                    raise CheckpointError(
                        f"{file}: no such file; Galileo's weights lie in <folder>/models/{size.value}/"
                    )
        super().__init__(size, patch_size, pretrained_path, autocast_dtype)

    def forward(self, context: ModelContext) -> FeatureMaps:
        """Encode a batch.

        Raises:
            DataError: a sample has neither sensor, or an image has no dates.
        """
        timelines = [_timeline(inputs) for inputs in context.inputs]
        steps = max(len(timeline.steps) for timeline in timelines)
        device = self.model.norm.weight.device
        months = torch.zeros((len(timelines), steps), dtype=torch.long, device=device)
        for row, timeline in enumerate(timelines):
            months[row, : len(timeline.steps)] = torch.tensor([month for _, month, _ in timeline.steps])
        stacked: dict[str, Any] = {}
        seen: dict[str, torch.Tensor] = {}
        for sensor in _SENSORS:
            images = [inputs.get(sensor) for inputs in context.inputs]
            if any(image is not None for image in images):
                stacked[sensor], seen[sensor] = _stack(images, timelines, sensor=sensor, steps=steps)
        tokens = self.construct_galileo_input(**stacked, months=months, normalize=True)
        for sensor, there in seen.items():
            groups = [i for i, name in enumerate(SPACE_TIME_BANDS_GROUPS_IDX) if _SENSORS[sensor] in name]
            tokens.s_t_m[..., groups] = (~there)[:, None, None, :, None].to(tokens.s_t_m.dtype)
        return self._encode(tokens, device=device)

    def _encode(self, tokens: Any, *, device: torch.device) -> FeatureMaps:
        _, height, width, *_ = tokens.s_t_x.shape
        patch = min(self.patch_size, height, width)
        with torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            encoded = self.model(**tokens._asdict(), patch_size=patch)
        pooled = self.model.apply_mask_and_average_tokens_per_patch(*encoded[:-1])
        return FeatureMaps([rearrange(pooled, "b (h w) d -> b d h w", h=height // patch).float()])

    def get_backbone_channels(self) -> list[tuple[int, int]]:
        """Patch size and embedding size of the one feature map."""
        return [(self.patch_size, int(self.model.embedding_size))]


def _timeline(inputs: dict[str, Any]) -> Timeline:
    intervals = {}
    for sensor in _SENSORS:
        if (image := inputs.get(sensor)) is not None:
            if image.timestamps is None:
                raise DataError(f"the input {sensor!r} has no dates, and Galileo wants the month of each image")
            intervals[sensor] = image.timestamps
    if not intervals:
        raise DataError(f"a sample has neither of Galileo's inputs {', '.join(_SENSORS)}; got {', '.join(inputs)}")
    return align(intervals, _TOLERANCE)


def _stack(
    images: Sequence[Any], timelines: Sequence[Timeline], *, sensor: str, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sensor's images ``B H W T C`` on the common steps, and ``B T``: whether there is one."""
    first = next(image.image for image in images if image is not None)
    channels, _, height, width = first.shape
    values = first.new_zeros((len(images), height, width, steps, channels))
    there = torch.zeros((len(images), steps), dtype=torch.bool, device=first.device)
    for row, image in enumerate(images):
        if image is not None:
            at = list(timelines[row].position[sensor])
            values[row][:, :, at] = rearrange(image.image, "c t h w -> h w t c")
            there[row, at] = True
    return values, there
