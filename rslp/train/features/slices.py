"""Take the features of a batch apart into samples."""

from __future__ import annotations

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
