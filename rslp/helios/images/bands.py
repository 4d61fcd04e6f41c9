"""How a dataset's bands become the encoder's: order, scale, substitutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from rslp.helios.images.statistics import Band

MissingBands = Literal["nearest", "mean", "zero"]

# A band replaces a missing one only if their wavelengths differ by less than this factor: SWIR 1 may replace SWIR 2,
# a reflective band never a thermal one.
_MAX_WAVELENGTH_RATIO = 1.5


@dataclass(frozen=True)
class BandPlan:
    """How the encoder's channels are computed from a dataset's.

    Attributes:
        given: the dataset's bands in its order.
        source: per band of the encoder its index in ``given``, or None for a constant.
        scale: per band of the encoder, ``1 / (max - min)``.
        offset: per band of the encoder, ``-min / (max - min)``.
        constant: the normalised value of bands without a source.
    """

    given: tuple[str, ...]
    source: tuple[int | None, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    constant: float

    def arrange(self, image: torch.Tensor) -> torch.Tensor:
        """Bring ``C T H W`` into the encoder's order; channels of constant bands hold arbitrary values."""
        index = [0 if source is None else source for source in self.source]
        if index == list(range(image.shape[0])):
            return image
        return image.index_select(0, torch.tensor(index, device=image.device))

    def apply(self, image: torch.Tensor) -> torch.Tensor:
        """Arrange and scale ``C T H W`` float32 raw values; returns a new tensor ``C' T H W``."""
        arranged = self.arrange(image)
        scale, offset = (factor.to(image) for factor in self._factors)
        # A re-ordered image is a copy, which may be changed in place.
        result = (arranged.mul(scale) if arranged is image else arranged.mul_(scale)).add_(offset)
        if self._absent:
            result[self._absent] = self.constant
        return result

    @cached_property
    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and offset, ``C' 1 1 1``."""
        scale, offset = (torch.tensor(factors, dtype=torch.float32) for factors in (self.scale, self.offset))
        return scale.view(-1, 1, 1, 1), offset.view(-1, 1, 1, 1)

    @cached_property
    def _absent(self) -> list[int]:
        """The encoder's bands without a source."""
        return [index for index, source in enumerate(self.source) if source is None]


def plan_bands(
    given: Sequence[str], wanted: Sequence[Band], *, std_multiplier: float, missing: MissingBands
) -> BandPlan:
    """Plan how the wanted bands are computed from the given ones.

    Args:
        given: the dataset's bands in its order; each is among ``wanted``.
        wanted: the encoder's bands in its order.
        std_multiplier: half of the range that becomes 0..1, in standard deviations.
        missing: how wanted bands that are not given are filled, see ``HeliosNormalize``.
    """
    have = [band for band in wanted if band.name in given]
    source: list[int | None] = []
    for band in wanted:
        used = band if band in have else (_nearest(band, have) if missing == "nearest" else None)
        source.append(None if used is None else list(given).index(used.name))
    widths = [2 * std_multiplier * band.std for band in wanted]
    return BandPlan(
        given=tuple(given),
        source=tuple(source),
        scale=tuple(1 / width for width in widths),
        offset=tuple(0.5 - band.mean / width for band, width in zip(wanted, widths, strict=True)),
        constant=0.0 if missing == "zero" else 0.5,
    )


def _nearest(band: Band, have: Sequence[Band]) -> Band | None:
    if band.nm is None:
        return None
    ratios = [(max(b.nm, band.nm) / min(b.nm, band.nm), b.nm, b) for b in have if b.nm is not None]
    if not ratios:
        return None
    ratio, _, nearest = min(ratios, key=lambda entry: entry[:2])
    return nearest if ratio < _MAX_WAVELENGTH_RATIO else None
