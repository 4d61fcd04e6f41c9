"""Take the features of a batch apart into samples, and put samples' features together into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rslearn.models.component import FeatureMaps, FeatureVector, TokenFeatureMaps

from rslp.train.features.codec import Unfit


def sample_of(features: Any, i: int) -> Any:
    """The features of one sample of a batch, still with a batch dimension, of 1.

    Raises:
        Unfit: features of an unknown type.
    """
    if type(features) is FeatureVector:
        return FeatureVector(features.feature_vector[i : i + 1])
    if type(features) is FeatureMaps:
        return FeatureMaps([one[i : i + 1] for one in features.feature_maps])
    if type(features) is TokenFeatureMaps:
        masks = None if features.masks is None else [one[i : i + 1] for one in features.masks]
        return TokenFeatureMaps([one[i : i + 1] for one in features.feature_maps], masks)
    raise Unfit(f"features that are a {type(features).__name__}")


def together(samples: Sequence[Any]) -> Any | None:
    """The features of a batch, float32; None if the samples' features are of unlike shapes.

    Args:
        samples: as ``sample_of`` gives them, all of one type.
    """
    first = samples[0]
    if type(first) is FeatureVector:
        vectors = _joined([one.feature_vector for one in samples])
        return None if vectors is None else FeatureVector(vectors)
    tried = [_joined(parts) for parts in zip(*(one.feature_maps for one in samples), strict=True)]
    maps = [whole for whole in tried if whole is not None]
    if len(maps) < len(tried):
        return None
    if type(first) is FeatureMaps:
        return FeatureMaps(maps)
    # Masks are all there or all absent: with none, every token counts.
    if any((one.masks is None) != (first.masks is None) for one in samples):
        return None
    masks = None if first.masks is None else [torch.cat(p) for p in zip(*(one.masks for one in samples), strict=True)]
    return TokenFeatureMaps(maps, masks)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    if len({part.shape for part in parts}) != 1:
        return None
    whole = torch.cat(list(parts))
    return whole.float() if whole.is_floating_point() else whole


def narrowed(features: Any, dtype: torch.dtype) -> Any:
    """Features in another type of floating point numbers.

    Args:
        features: as ``sample_of`` gives them.
        dtype: ``torch.float32`` or narrower.
    """
    if type(features) is FeatureVector:
        return FeatureVector(features.feature_vector.to(dtype))
    maps = [one.to(dtype) for one in features.feature_maps]
    return FeatureMaps(maps) if type(features) is FeatureMaps else TokenFeatureMaps(maps, features.masks)
