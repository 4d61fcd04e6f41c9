"""The Galileo encoder for series with gaps, which are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from rslearn.models.component import FeatureMaps
from rslearn.models.galileo.galileo import GalileoModel, GalileoSize, pretrained_weights
from rslearn.models.galileo.single_file_galileo import (
    SPACE_BAND_GROUPS_IDX,
    SPACE_TIME_BANDS_GROUPS_IDX,
    STATIC_BAND_GROUPS_IDX,
    TIME_BAND_GROUPS_IDX,
)
from rslearn.train.model_context import ModelContext
from upath import UPath

from rslp.errors import CheckpointError, DataError
from rslp.helios.images.dates import Timeline, align
from rslp.io import archive_damage, read_json

# Galileo's four kinds of input (the first two have dates): name of the input -> name in Galileo's groups of bands.
_IMAGES = {"s1": "S1", "s2": "S2"}
_SERIES = {"era5": "ERA5", "tc": "TC", "viirs": "VIIRS"}
_MAPS = {"srtm": "SRTM", "dw": "DW", "wc": "WC"}
_POINTS = {"landscan": "LS", "latlon": "location"}
_DATED = (*_IMAGES, *_SERIES)
_TOLERANCE = timedelta(days=15)


class Galileo(GalileoModel):
    """rslearn's Galileo encoder, extended to series with gaps.

    rslearn's own wrapper needs the same number of dates in every sensor of every sample, and uses one sensor's dates
    for all. Here the dates of a sample's sensors are aligned on common time steps, each with its real month, and
    missing dates and inputs are masked.

    Inputs, each ``C T H W``: ``s1`` (VV, VH in dB), ``s2`` (B2 B3 B4 B5 B6 B7 B8 B8A B11 B12 as digital numbers),
    ``era5`` (temperature in K, precipitation in m per month), ``tc``, ``viirs``: with timestamps; ``srtm`` (elevation
    in m, slope in degrees), ``dw``, ``wc``, ``landscan``, ``latlon``: without. Output: features ``B C H/p W/p``, the
    mean over the visible tokens of a patch of p x p px and over the tokens that all patches share.

    Args:
        size: which of the published sizes.
        patch_size: edge of a patch, px.
        pretrained_path: a folder that holds ``models/<size>/`` with ``config.json`` and ``encoder.pt``; None downloads.
        autocast_dtype: ``bfloat16``, ``float32``, or None for the dtype of the weights.

    Raises:
        CheckpointError: the folder lacks these files, or they are damaged.
    """

    def __init__(
        self,
        size: GalileoSize,
        patch_size: int = 4,
        pretrained_path: str | None = None,
        autocast_dtype: str | None = None,
    ) -> None:
        if pretrained_path is not None:
            # rslearn would download the weights if the folder is mistyped.
            for name in ("config.json", "encoder.pt"):
                file = UPath(pretrained_path) / pretrained_weights[size] / name
                if not file.exists():
                    raise CheckpointError(f"{file}: no such file; pretrained_path holds models/{size.value}/{name}")
                _refuse_damaged(Path(str(file)))
        super().__init__(size, patch_size, pretrained_path, autocast_dtype)

    def forward(self, context: ModelContext) -> FeatureMaps:
        """Encode a batch; see the class for inputs and output.

        Raises:
            DataError: a sample has no input with dates, or one lacks its timestamps.
        """
        samples: list[dict[str, Any]] = context.inputs
        timelines = [_timeline(inputs) for inputs in samples]
        steps = max(len(timeline.steps) for timeline in timelines)
        months = torch.zeros((len(timelines), steps), dtype=torch.long)
        for row, timeline in enumerate(timelines):
            months[row, : len(timeline.steps)] = torch.tensor([month for _, month, _ in timeline.steps])
        stacked: dict[str, Any] = {}
        present: dict[str, torch.Tensor] = {}
        for key in (*_IMAGES, *_SERIES, *_MAPS, *_POINTS):
            images = [None if (image := inputs.get(key)) is None else image.image for inputs in samples]
            if any(image is not None for image in images):
                positions = [timeline.position.get(key, (0,)) for timeline in timelines]
                stacked[key], present[key] = _stack(images, positions, steps=steps if key in _DATED else 1)
        device = self.model.norm.weight.device
        tokens = self.construct_galileo_input(
            **{key: _as_galileo(key, values) for key, values in stacked.items()},
            months=months.to(device),
            normalize=True,
        )
        _mask(tokens, present)
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


def _refuse_damaged(file: Path) -> None:
    if file.suffix == ".json":
        read_json(file)
    elif damage := archive_damage(file, older=True):
        raise CheckpointError(f"{file} can't be read as weights: {damage}")


def _timeline(inputs: Mapping[str, Any]) -> Timeline:
    intervals = {}
    for key in _DATED:
        if (image := inputs.get(key)) is not None:
            if image.timestamps is None:
                raise DataError(f"the input {key!r} has no timestamps, but Galileo needs the month of each image")
            intervals[key] = image.timestamps
    if not intervals:
        raise DataError(f"a sample has none of Galileo's inputs {', '.join(_DATED)}; got {', '.join(inputs)}")
    return align(intervals, _TOLERANCE)


def _stack(
    images: Sequence[torch.Tensor | None], positions: Sequence[tuple[int, ...]], *, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack one input of all samples to ``B C T H W`` on the common steps; also returns a mask ``B T`` of its dates."""
    first = next(image for image in images if image is not None)
    channels, _, height, width = first.shape
    values = first.new_zeros((len(images), channels, steps, height, width))
    present = torch.zeros((len(images), steps), dtype=torch.bool, device=first.device)
    for sample, (image, position) in enumerate(zip(images, positions, strict=True)):
        if image is not None:
            values[sample][:, list(position)] = image
            present[sample, list(position)] = True
    return values, present


def _as_galileo(key: str, values: torch.Tensor) -> torch.Tensor:
    """Rearrange ``B C T H W`` to the shape that Galileo takes for this input."""
    if key in _IMAGES:
        return rearrange(values, "b c t h w -> b h w t c")
    if key in _MAPS:
        return rearrange(values[:, :, 0], "b c h w -> b h w c")
    averaged = values.nanmean(dim=(-1, -2))
    return rearrange(averaged, "b c t -> b t c") if key in _SERIES else averaged[..., 0]


def _mask(tokens: Any, present: Mapping[str, torch.Tensor]) -> None:
    """Set the mask of missing dates to 1, in place: ``construct_galileo_input`` takes every given input as complete."""
    for key, dates in present.items():
        missing = (~dates).to(tokens.s_t_m.dtype)
        if key in _IMAGES:
            groups = _groups(SPACE_TIME_BANDS_GROUPS_IDX, _IMAGES[key])
            tokens.s_t_m[..., groups] = missing[:, None, None, :, None]
        elif key in _SERIES:
            tokens.t_m[..., _groups(TIME_BAND_GROUPS_IDX, _SERIES[key])] = missing[:, :, None]
        elif key in _MAPS:
            tokens.sp_m[..., _groups(SPACE_BAND_GROUPS_IDX, _MAPS[key])] = missing[:, None, None, :1]
        else:
            tokens.st_m[..., _groups(STATIC_BAND_GROUPS_IDX, _POINTS[key])] = missing[:, :1]


def _groups(names: Mapping[str, Any], part: str) -> list[int]:
    """The indices of the groups of bands whose name contains ``part``."""
    return [index for index, name in enumerate(names) if part in name]
