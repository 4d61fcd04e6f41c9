"""The encoder of olmoearth-pretrain-minimal 0.1.5: padding masked in evaluation, too."""

from __future__ import annotations

from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn.flexi_vit import Encoder
from torch import Tensor, nn


class PaddedEncoder(Encoder):  # type: ignore[misc]
    """The Helios encoder with padding masked in evaluation, too.

    Samples of a batch may have different numbers of tokens. The original masks the padding of shorter samples in
    training only; in evaluation, their features would depend on the length of the other samples.
    """

    def _maybe_get_attn_mask(self, new_mask: Tensor | None, fast_pass: bool) -> Tensor | None:
        """The attention mask ``B N`` of real tokens, or None where nothing is padded."""
        return None if fast_pass else new_mask


def mask_padding(encoder: nn.Module) -> nn.Module:
    """Turn an ``Encoder`` into a ``PaddedEncoder`` in place: same weights and names; other modules stay as they are."""
    if type(encoder) is Encoder:
        encoder.__class__ = PaddedEncoder
    return encoder
