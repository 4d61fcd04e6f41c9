"""The Presto encoder (Tseng et al. 2023, arXiv 2304.14065) for series with gaps, which are masked.

rslearn's own wrapper needs the same dates in every sensor of every sample. Presto itself needs as many masked tokens in
each pixel of a batch, so that samples are encoded one by one.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from einops import rearrange
from rslearn.models.component import FeatureMaps
from rslearn.models.presto.presto import INPUT_PRESTO_BANDS, INPUT_PRESTO_S2_BANDS, Presto
from rslearn.models.presto.single_file_presto import (
    ERA5_BANDS,
    NUM_DYNAMIC_WORLD_CLASSES,
    PRESTO_ADD_BY,
    PRESTO_DIV_BY,
    PRESTO_S1_BANDS,
    SRTM_BANDS,
)
from rslearn.train.model_context import ModelContext

from rslp.errors import DataError
from rslp.helios.images.dates import align

_BANDS = {"s1": PRESTO_S1_BANDS, "s2": INPUT_PRESTO_S2_BANDS, "era5": ERA5_BANDS, "srtm": SRTM_BANDS}
_DATED = ("s1", "s2", "era5")


class MaskedPresto(Presto):
    """Presto with missing dates and sensors masked.

    Inputs, each ``C T H W``: ``s1`` (VV, VH in dB), ``s2`` (ten bands as digital numbers), ``era5`` (temperature in K,
    precipitation in m per month), with timestamps; ``srtm`` (elevation in m, slope in degrees). Output: features
    ``B 128 H W``.
    """

    def forward(self, context: ModelContext) -> FeatureMaps:
        """Encode a batch."""
        return FeatureMaps([torch.cat([self._encode(inputs) for inputs in context.inputs])])

    def _encode(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The features of one sample, ``1 128 H W``."""
        given = {key: inputs[key] for key in _BANDS if inputs.get(key) is not None}
        dated = {key: image.timestamps for key, image in given.items() if key in _DATED}
        if not dated or any(timestamps is None for timestamps in dated.values()):
            raise DataError(f"Presto needs a series with timestamps of one of {', '.join(_DATED)}")
        timeline = align(dated, timedelta(days=15))
        steps = len(timeline.steps)
        first = next(iter(given.values())).image
        height, width = first.shape[2:]
        x = first.new_zeros((steps, height, width, len(INPUT_PRESTO_BANDS)), dtype=torch.float32)
        mask = torch.ones_like(x)
        for key, image in given.items():
            at = list(timeline.position[key]) if key in dated else list(range(steps))
            bands = [INPUT_PRESTO_BANDS.index(band) for band in _BANDS[key]]
            values = rearrange(image.image.float(), "c t h w -> t h w c")
            for position, step in enumerate(at):
                x[step][..., bands] = values[position if key in dated else 0]
                mask[step][..., bands] = 0
        x = (x + PRESTO_ADD_BY.to(x.device)) / PRESTO_DIV_BY.to(x.device)
        months = torch.tensor([month for _, month, _ in timeline.steps], device=x.device).expand(height * width, steps)
        no_classes = torch.full((height * width, steps), NUM_DYNAMIC_WORLD_CLASSES, device=x.device)
        features = self.model(
            x=rearrange(x, "t h w c -> (h w) t c"),
            mask=rearrange(mask, "t h w c -> (h w) t c"),
            dynamic_world=no_classes,
            month=months,
            eval_task=True,
        )
        return rearrange(features, "(h w) d -> 1 d h w", h=height, w=width)
