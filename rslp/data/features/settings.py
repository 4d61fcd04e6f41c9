"""What a person can choose about the features of a frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rslp.errors import ConfigError, Problem

Dtype = Literal["float32", "float16", "bfloat16"]
_DATA_KEY = "data.init_args"


@dataclass(frozen=True)
class FeatureSettings:
    """How features are kept.

    Attributes:
        views: while the encoder is frozen, each sample is drawn as one of so many fixed views; None draws afresh each
            time.
        keep: whether features are kept at all.
        dtype: in which floating point numbers.
        limit: bytes that one dataset's features may take; None means half of the free disk.

    Raises:
        ConfigError: a value that can't be.
    """

    views: int | None = 1
    keep: bool = True
    dtype: Dtype = "float32"
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be."""
        if self.views is not None and self.views < 1:
            raise ConfigError(Problem(f"is {self.views}; 1 or more, or null", key=f"{_DATA_KEY}.frozen_views"))
        if self.limit is not None and self.limit <= 0:
            raise ConfigError(Problem(f"is {self.limit / 1e9:g}; more than 0", key=f"{_DATA_KEY}.features_limit_gb"))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch names it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype
