"""The Galileo encoder for series with gaps, which are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from rslp.errors import DataError
from rslp.helios.checkpoint.published import weights_from
from rslp.helios.encoders import GALILEO
from rslp.helios.images.inputs import say_once
from rslp.helios.images.series import LATLON, SeriesBatch, checked_bands, group_present, stack_series
from rslp.helios.location import LocatedEncoder

# Galileo's kinds of input, by the name of their mask: the groups of bands, each input's name in these groups, and how
# B T 1 1 becomes the mask of a group.
_KINDS: Mapping[str, tuple[Mapping[str, Sequence[int]], Mapping[str, str], str]] = {
    "s_t_m": (SPACE_TIME_BANDS_GROUPS_IDX, {"s1": "S1", "s2": "S2"}, "b t h w -> b h w t"),
    "t_m": (TIME_BAND_GROUPS_IDX, {"era5": "ERA5", "tc": "TC", "viirs": "VIIRS"}, "b t 1 1 -> b t"),
    "sp_m": (SPACE_BAND_GROUPS_IDX, {"srtm": "SRTM", "dw": "DW", "wc": "WC"}, "b 1 h w -> b h w"),
    "st_m": (STATIC_BAND_GROUPS_IDX, {"landscan": "LS"}, "b 1 1 1 -> b"),
}


class Galileo(LocatedEncoder, GalileoModel):
    """rslearn's Galileo encoder, extended to series with gaps and to the place of windows.

    rslearn's own wrapper needs the same number of dates in every sensor of every sample, and uses one sensor's dates
    for all. Here the dates of a sample's sensors are aligned on common time steps, each with its real month, and
    missing dates, bands and inputs are masked.

    Inputs, each ``C T H W``: those that ``rslp.helios.encoders.GALILEO`` lists, raw values in the units listed there;
    those with dates have timestamps. A value that is not finite was not measured; a date on which a band was measured
    in no pixel is masked. An input of one pixel holds for the whole image. Output: features ``B C H/p W/p``, the
    mean over the visible tokens of a patch of p x p px and over the tokens that all patches share.

    Args:
        size: which of the published sizes.
        patch_size: edge of a patch, px.
        pretrained_path: a folder that holds ``models/<size>/`` with ``config.json`` and ``encoder.pt``; None downloads.
        autocast_dtype: ``bfloat16``, ``float32``, or None for the dtype of the weights.
        bands: for inputs that lack some of Galileo's bands, those that the dataset has, in its order.
        use_location: whether the latitude and longitude of windows are an input where samples have no ``latlon``.

    Raises:
        CheckpointError: the folder lacks these files, or they are damaged.
        ConfigError: ``bands`` names an input or a band that Galileo does not have.
    """

    def __init__(
        self,
        size: GalileoSize,
        patch_size: int = 4,
        pretrained_path: str | None = None,
        autocast_dtype: str | None = None,
        bands: dict[str, list[str]] | None = None,
        use_location: bool = True,
    ) -> None:
        given = checked_bands(GALILEO, bands)
        files = [f"{pretrained_weights[size]}/{name}" for name in ("config.json", "encoder.pt")]
        with weights_from(pretrained_path, files, f"Galileo {size}"):
            super().__init__(size, patch_size, pretrained_path, autocast_dtype)
        self.bands = given
        self.set_location(use_location)

    def forward(self, context: ModelContext) -> FeatureMaps:
        """Encode a batch; see the class for inputs and output.

        Raises:
            DataError: a sample has no input with dates, or one lacks its timestamps, or sizes or bands do not fit.
        """
        batch = stack_series(
            GALILEO, context.inputs, context.metadatas, bands=self.bands, use_location=self.use_location
        )
        device = self.model.norm.weight.device
        inputs = {key: _as_galileo(key, values) for key, values in batch.values.items()}
        if bool(batch.located.any()):
            inputs[LATLON] = batch.latlon.nan_to_num(nan=0.0)
        tokens = self.construct_galileo_input(**inputs, months=batch.months.to(device), normalize=True)
        _mask(tokens, batch)
        return self._encode(tokens, device=device)

    def _encode(self, tokens: Any, *, device: torch.device) -> FeatureMaps:
        _, height, width, *_ = tokens.s_t_x.shape
        patch = min(self.patch_size, height, width)
        if height % patch or width % patch:
            raise DataError(f"images of {height}x{width} px are no multiple of the patch size {patch}; pad them")
        with torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            encoded = self.model(**tokens._asdict(), patch_size=patch)
        pooled = self.model.apply_mask_and_average_tokens_per_patch(*encoded[:-1])
        return FeatureMaps([rearrange(pooled, "b (h w) d -> b d h w", h=height // patch).float()])

    def get_backbone_channels(self) -> list[tuple[int, int]]:
        """Patch size and embedding size of the one feature map."""
        return [(self.patch_size, int(self.model.embedding_size))]


def _as_galileo(key: str, values: torch.Tensor) -> torch.Tensor:
    """Rearrange ``B C T H W`` to the shape that Galileo takes for this input."""
    if key in _KINDS["s_t_m"][1]:
        return rearrange(values, "b c t h w -> b h w t c")
    if key in _KINDS["sp_m"][1]:
        return rearrange(values[:, :, 0], "b c h w -> b h w c")
    return rearrange(values, "b c t 1 1 -> b t c") if key in _KINDS["t_m"][1] else values[:, :, 0, 0, 0]


def _mask(tokens: Any, batch: SeriesBatch) -> None:
    """Set the masks of what is missing to 1, in place: ``construct_galileo_input`` takes every input as complete."""
    for kind, (groups, names, axes) in _KINDS.items():
        mask = getattr(tokens, kind)
        for key, present in batch.present.items():
            own = {index: bands for index, (group, bands) in enumerate(groups.items()) if names.get(key, " ") in group}
            first = min((min(bands) for bands in own.values()), default=0)
            # A date is there if a pixel was measured in it: B C T 1 1.
            dates = present.flatten(3).any(dim=3)[..., None, None]
            for index, bands in own.items():
                missing = ~group_present(dates, [band - first for band in bands])
                mask[..., index] = rearrange(missing.to(mask.dtype), axes)
    tokens.st_m[~batch.located, list(STATIC_BAND_GROUPS_IDX).index("location")] = 1
    masks = (tokens.s_t_m, tokens.sp_m, tokens.t_m, tokens.st_m)
    unseen = torch.stack([(mask == 1).flatten(1).all(dim=1) for mask in masks]).all(dim=0)
    if bool(unseen.any()):
        # Attention needs at least one token of each sample.
        say_once("a sample has no measurement in any of Galileo's inputs; it is encoded as a black image")
        tokens.s_t_m[unseen, :, :, 0, list(SPACE_TIME_BANDS_GROUPS_IDX).index("S2_RGB")] = 0
