"""The settings of the feature cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rslp.errors import ConfigError, Problem

Dtype = Literal["float32", "float16", "bfloat16"]
_DATA_KEY = "data.init_args"


@dataclass(frozen=True)
class FeatureSettings:
    """How features of a frozen encoder are cached.

    Attributes:
        views: number of fixed views from which a sample is drawn while the encoder is frozen; None draws a new view
            each time.
        keep: whether features are cached at all.
        dtype: floating point type in which they are stored.
        limit: bytes that one dataset's features may take; None means half of the free disk.

    Raises:
        ConfigError: ``views`` is below 1, or ``limit`` is not positive.
    """

    views: int | None = 1
    keep: bool = True
    dtype: Dtype = "float32"
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.views is not None and self.views < 1:
            raise ConfigError(Problem(f"is {self.views}; 1 or more, or null", key=f"{_DATA_KEY}.frozen_views"))
        if self.limit is not None and self.limit <= 0:
            raise ConfigError(Problem(f"is {self.limit / 1e9:g}; more than 0", key=f"{_DATA_KEY}.features_limit_gb"))

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as a torch type."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype
