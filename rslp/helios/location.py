"""Encoders that read where a sample lies, and checkpoints that say whether they did."""

from __future__ import annotations

import logging
from typing import Any

import torch
from rslearn.models.component import FeatureExtractor

logger = logging.getLogger(__name__)
_KEY = "uses_location"


class LocatedEncoder(FeatureExtractor):
    """An encoder that takes the place of a sample's window where its inputs do not give one.

    Checkpoints say whether it did, under ``uses_location``: those from before this was possible did not, and whoever
    loads them must not either.
    """

    def set_location(self, use_location: bool) -> None:
        """Say whether windows' places are taken; to be called in the constructor."""
        self.use_location = use_location
        self.register_buffer(_KEY, torch.tensor(use_location))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = bool(state_dict.setdefault(prefix + _KEY, torch.tensor(False)))
        if stored != self.use_location:
            logger.warning(
                "%s: these weights were trained %s the location of windows, so use_location is %s from now on",
                *(type(self).__name__, "with" if stored else "without", str(stored).lower()),
            )
        self.use_location = stored
        super()._load_from_state_dict(state_dict, prefix, *rest)
