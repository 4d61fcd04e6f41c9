"""The Galileo encoder, with missing dates masked: real pixel series have gaps, and other gaps in each sensor."""

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

# Galileo's four kinds of input: which of them have dates, and how its groups of bands are called.
_IMAGES = {"s1": "S1", "s2": "S2"}
_SERIES = {"era5": "ERA5", "tc": "TC", "viirs": "VIIRS"}
_MAPS = {"srtm": "SRTM", "dw": "DW", "wc": "WC"}
_POINTS = {"landscan": "LS", "latlon": "location"}
_DATED = (*_IMAGES, *_SERIES)
_TOLERANCE = timedelta(days=15)


class Galileo(GalileoModel):
    """Rslearn's Galileo for series with gaps.

    rslearn's own wrapper needs the same number of dates in every sensor of every sample, and takes one sensor's dates
    for those of all. Here the dates of a sample's sensors are put on one row of time steps, each with its real month,
    and what is missing (a date, or an input that a sample lacks) is masked.

    Inputs, each ``C T H W``: ``s1`` (VV, VH in dB), ``s2`` (B2 B3 B4 B5 B6 B7 B8 B8A B11 B12 as digital numbers),
    ``era5`` (temperature in K, precipitation in m per month), ``tc``, ``viirs``: with timestamps; ``srtm`` (elevation
    in m, slope in degrees), ``dw``, ``wc``, ``landscan``, ``latlon``: without. Output: features ``B C H/p W/p``, the
    mean over the visible tokens of a patch of p x p px and over those that are the same for all patches.

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
                    raise CheckpointError(f"{file}: no such file; pretrained_path holds models/{size.value}/{name}")
                _refuse_damaged(Path(str(file)))
        super().__init__(size, patch_size, pretrained_path, autocast_dtype)

    def forward(self, context: ModelContext) -> FeatureMaps:
        """Encode a batch.

        Raises:
            DataError: a sample has no dated input, or one without dates.
        """
        samples: list[dict[str, Any]] = context.inputs
        timelines = [_timeline(inputs) for inputs in samples]
        steps = max(len(timeline.steps) for timeline in timelines)
        months = torch.zeros((len(timelines), steps), dtype=torch.long)
        for row, timeline in enumerate(timelines):
            months[row, : len(timeline.steps)] = torch.tensor([month for _, month, _ in timeline.steps])
        stacked: dict[str, Any] = {}
        there: dict[str, torch.Tensor] = {}
        for key in (*_IMAGES, *_SERIES, *_MAPS, *_POINTS):
            images = [None if (given := inputs.get(key)) is None else given.image for inputs in samples]
            if any(image is not None for image in images):
                rows = [timeline.position.get(key, (0,)) for timeline in timelines]
                stacked[key], there[key] = _stack(images, rows, steps=steps if key in _DATED else 1)
        device = self.model.norm.weight.device
        tokens = self.construct_galileo_input(
            **{key: _as_galileo(key, values) for key, values in stacked.items()},
            months=months.to(device),
            normalize=True,
        )
        _mask(tokens, there)
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
                raise DataError(f"the input {key!r} has no dates, and Galileo wants the month of each image")
            intervals[key] = image.timestamps
    if not intervals:
        raise DataError(f"a sample has none of Galileo's inputs {', '.join(_DATED)}; got {', '.join(inputs)}")
    return align(intervals, _TOLERANCE)


def _stack(
    images: Sequence[torch.Tensor | None], rows: Sequence[tuple[int, ...]], *, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One input of all samples ``B C T H W`` on the common steps, and ``B T``: where there is one."""
    first = next(image for image in images if image is not None)
    channels, _, height, width = first.shape
    values = first.new_zeros((len(images), channels, steps, height, width))
    there = torch.zeros((len(images), steps), dtype=torch.bool, device=first.device)
    for sample, (image, at) in enumerate(zip(images, rows, strict=True)):
        if image is not None:
            values[sample][:, list(at)] = image
            there[sample, list(at)] = True
    return values, there


def _as_galileo(key: str, values: torch.Tensor) -> torch.Tensor:
    """Bring ``B C T H W`` to the shape that Galileo has for this input."""
    if key in _IMAGES:
        return rearrange(values, "b c t h w -> b h w t c")
    if key in _MAPS:
        return rearrange(values[:, :, 0], "b c h w -> b h w c")
    averaged = values.nanmean(dim=(-1, -2))
    return rearrange(averaged, "b c t -> b t c") if key in _SERIES else averaged[..., 0]


def _mask(tokens: Any, there: Mapping[str, torch.Tensor]) -> None:
    """Mask (1) what is missing; ``construct_galileo_input`` takes every input that is given for complete."""
    for key, present in there.items():
        missing = (~present).to(tokens.s_t_m.dtype)
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
    return [index for index, name in enumerate(names) if part in name]
