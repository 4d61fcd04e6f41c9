"""The touch of a private part of the encoder: its attention mask (see ``upstream.fix_token_order`` for its package)."""

from __future__ import annotations

from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn.flexi_vit import Encoder
from torch import Tensor, nn


class PaddedEncoder(Encoder):  # type: ignore[misc]
    """The Helios encoder, whose samples of a batch may have unlike numbers of tokens also outside training.

    The original masks the padding of shorter samples in training only; in evaluation they attend to it, so that a
    sample's features depend on what else is in its batch.
    """

    def _maybe_get_attn_mask(self, new_mask: Tensor | None, fast_pass: bool) -> Tensor | None:
        """Give the mask ``B N`` of real tokens, or None where nothing is padded."""
        return None if fast_pass else new_mask


def masks_padding(encoder: nn.Module) -> nn.Module:
    """Make an encoder mask its padding, in place: same weights and names, only the class changes.

    Args:
        encoder: the encoder; anything but an ``Encoder`` itself is left as it is.

    Returns:
        The same object.
    """
    if type(encoder) is Encoder:
        encoder.__class__ = PaddedEncoder
    return encoder
