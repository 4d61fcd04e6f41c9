"""The Presto encoder of pixel series, for series with gaps, which are masked."""

from __future__ import annotations

import torch
from einops import rearrange
from rslearn.models.component import FeatureMaps
from rslearn.models.presto.presto import INPUT_PRESTO_BANDS, MODEL_FILENAME
from rslearn.models.presto.presto import Presto as RslearnPresto
from rslearn.models.presto.single_file_presto import (
    BANDS_GROUPS_IDX,
    NUM_DYNAMIC_WORLD_CLASSES,
    PRESTO_ADD_BY,
    PRESTO_DIV_BY,
)
from rslearn.train.model_context import ModelContext

from rslp.helios.checkpoint.published import weights_from
from rslp.helios.encoders import PRESTO
from rslp.helios.images.inputs import say_once
from rslp.helios.images.series import SeriesBatch, checked_bands, stack_series
from rslp.helios.location import LocatedEncoder

_CLASSES = "dynamic_world"
# The first of Presto's bands that an input has; the others follow it.
_FIRST = {"s1": "vv", "s2": "B02", "era5": "temperature_2m", "srtm": "elevation"}


class Presto(LocatedEncoder, RslearnPresto):
    """rslearn's Presto encoder, extended to series with gaps and to the place of windows.

    Presto encodes the series of each pixel by itself. rslearn's own wrapper needs the same dates and bands in every
    input of every sample. Here the dates of a sample's inputs are aligned on common time steps, each with its real
    month, and missing dates, bands and inputs are masked, for each pixel by itself.

    Inputs, each ``C T H W``: those that ``rslp.helios.encoders.PRESTO`` lists, raw values in the units listed there;
    those with dates have timestamps, 24 dates at most. A value that is not finite was not measured. Presto makes one
    token of several bands: if one of them is missing, all of them are masked. An input of one pixel holds for the whole
    image. Output: features ``B 128 H W``.

    Args:
        pretrained_path: a folder that holds ``default_model.pt``; None downloads it.
        pixel_batch_size: how many pixels are encoded at once.
        bands: for inputs that lack some of Presto's bands, those that the dataset has, in its order.
        use_location: whether the latitude and longitude of windows are an input where samples have no ``latlon``.

    Raises:
        CheckpointError: the folder lacks the file, or it is damaged.
        ConfigError: ``bands`` names an input or a band that Presto does not have.
    """

    def __init__(
        self,
        pretrained_path: str | None = None,
        pixel_batch_size: int = 128,
        bands: dict[str, list[str]] | None = None,
        use_location: bool = True,
    ) -> None:
        given = checked_bands(PRESTO, bands)
        with weights_from(pretrained_path, [MODEL_FILENAME], "Presto"):
            super().__init__(pretrained_path, pixel_batch_size)
        self.bands = given
        self.set_location(use_location)

    def forward(self, context: ModelContext) -> FeatureMaps:
        """Encode a batch; see the class for inputs and output.

        Raises:
            DataError: a sample has no input with dates, or one lacks its timestamps, or sizes or bands do not fit.
        """
        batch = stack_series(
            PRESTO, context.inputs, context.metadatas, bands=self.bands, use_location=self.use_location
        )
        height, width = next(iter(batch.values.values())).shape[-2:]
        pixels = _Pixels(batch, height, width)
        features = torch.zeros((len(pixels.tokens), self.model.embedding_size), device=pixels.tokens.device)
        # Presto takes pixels together only if they have equally many tokens.
        for count, located in pixels.kinds():
            if count == 0 and not located:
                say_once("a pixel has no measurement in any of Presto's inputs; its features are 0")
                continue
            chosen = ((pixels.tokens == count) & (pixels.located == located)).nonzero()[:, 0]
            for part in torch.split(chosen, self.pixel_batch_size):
                features[part] = self.model(
                    x=pixels.values[part],
                    dynamic_world=pixels.classes[part],
                    mask=pixels.missing[part],
                    month=pixels.months[part],
                    latlons=pixels.latlon[part] if located else None,
                    eval_task=True,
                ).to(features.dtype)
        return FeatureMaps([rearrange(features, "(b h w) d -> b d h w", h=height, w=width)])

    def get_backbone_channels(self) -> list[tuple[int, int]]:
        """Patch size and embedding size of the one feature map."""
        return [(1, int(self.model.embedding_size))]


class _Pixels:
    """The pixels of a batch as Presto takes them, N of them.

    Attributes:
        values: normalised, ``N T C``.
        missing: 1 where a value was not measured, ``N T C``.
        classes: the class of Dynamic World, 9 for none, ``N T``.
        months: ``N T``.
        latlon: degrees, ``N 2``.
        located: whether these are known, ``N``.
        tokens: number of tokens besides that of the place, ``N``.
    """

    def __init__(self, batch: SeriesBatch, height: int, width: int) -> None:
        samples, steps = batch.months.shape
        device = batch.months.device
        count = height * width
        shape = (samples, len(INPUT_PRESTO_BANDS), steps, height, width)
        values, missing = torch.zeros(shape, device=device), torch.ones(shape, device=device)
        for key, first in _FIRST.items():
            if key in batch.values:
                at = INPUT_PRESTO_BANDS.index(first)
                bands = slice(at, at + batch.values[key].shape[1])
                values[:, bands] = batch.values[key]
                missing[:, bands] = (~batch.present[key]).float()
        self.missing = rearrange(missing, "b c t h w -> (b h w) t c")
        self.values = rearrange(values, "b c t h w -> (b h w) t c")
        self.values = (self.values + PRESTO_ADD_BY.to(device)) / PRESTO_DIV_BY.to(device)
        classes = torch.full((samples, steps, height, width), NUM_DYNAMIC_WORLD_CLASSES, device=device)
        if _CLASSES in batch.values:
            given = batch.values[_CLASSES][:, 0].round().long().clamp(0, NUM_DYNAMIC_WORLD_CLASSES)
            classes = torch.where(batch.present[_CLASSES][:, 0], given, classes)
        self.classes = rearrange(classes, "b t h w -> (b h w) t")
        self.months = batch.months.repeat_interleave(count, dim=0)
        self.latlon = batch.latlon.repeat_interleave(count, dim=0)
        self.located = batch.located.repeat_interleave(count, dim=0)
        self.tokens = (self.classes != NUM_DYNAMIC_WORLD_CLASSES).sum(dim=1)
        for group, members in BANDS_GROUPS_IDX.items():
            visible = self.missing[:, :, members].amax(dim=2) == 0
            # Terrain is one token, not one for each date.
            self.tokens = self.tokens + (visible[:, :1] if group == "SRTM" else visible).sum(dim=1)

    def kinds(self) -> list[tuple[int, bool]]:
        """The numbers of tokens that occur, each with and without a place."""
        numbers = sorted(set((self.tokens * 2 + self.located).tolist()))
        return [(number // 2, number % 2 == 1) for number in numbers]
