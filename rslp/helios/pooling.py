"""Turn the Helios encoder's tokens into feature maps for decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rslearn.models.component import FeatureMaps, TokenFeatureMaps


def pool_tokens(tokens: Any, valid: Mapping[str, torch.Tensor | None]) -> FeatureMaps:
    """Average the tokens of each patch: over dates and band sets, then over modalities.

    Only valid dates count, and only modalities of which the sample has a valid date, so that a sample's features do
    not depend on the other samples of its batch.

    Args:
        tokens: per modality an attribute ``B H W T S D``.
        valid: per modality bool ``B T``, or None where all dates are valid.

    Returns:
        One feature map ``B D H W``, float32.
    """
    total: torch.Tensor | float = 0.0
    count: torch.Tensor | float = 0.0
    for modality, is_valid in valid.items():
        of_modality = getattr(tokens, modality).float()
        if is_valid is None:
            total = total + of_modality.mean(dim=(3, 4))
            count = count + 1.0
            continue
        # torch.where instead of a product with the mask: tokens of masked dates may hold NaN.
        mask = is_valid[:, None, None, :, None]
        dates = is_valid.sum(dim=1).clamp(min=1)
        total = total + torch.where(mask, of_modality.mean(dim=4), 0.0).sum(dim=3) / dates[:, None, None, None]
        count = count + is_valid.any(dim=1).float()[:, None, None, None]
    assert isinstance(total, torch.Tensor)
    return FeatureMaps([(total / count).permute(0, 3, 1, 2).contiguous()])


def concatenate_tokens(tokens: Any, valid: Mapping[str, torch.Tensor | None]) -> TokenFeatureMaps:
    """Concatenate the tokens of each patch over modalities, dates and band sets, with a mask of the valid ones.

    Args:
        tokens: per modality an attribute ``B H W T S D``.
        valid: per modality bool ``B T``, or None where all dates are valid.

    Returns:
        One map ``B D H W N``, float32, and its mask ``B H W N``.
    """
    maps, masks = [], []
    for modality, is_valid in valid.items():
        of_modality = getattr(tokens, modality).float()
        batch, height, width, dates, band_sets, _ = of_modality.shape
        maps.append(of_modality.flatten(3, 4).permute(0, 4, 1, 2, 3))
        if is_valid is None:
            is_valid = torch.ones((batch, dates), dtype=torch.bool, device=of_modality.device)
        per_token = is_valid.repeat_interleave(band_sets, dim=1)
        masks.append(per_token[:, None, None].expand(-1, height, width, -1))
    return TokenFeatureMaps([torch.cat(maps, dim=4)], masks=[torch.cat(masks, dim=3)])
