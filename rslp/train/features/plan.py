"""Which samples have to be encoded, in which batches, and whether that pays. Pure arithmetic.

Features are computed in blocks: neighbours of one dataset and view, in the dataset's order. A block has the same
samples whenever it is computed, so its features have the same bits, whatever the mixture drew and wherever a run was
killed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Block:
    """Neighbouring samples in one view.

    Attributes:
        view: which view.
        start: index of the first sample.
        stop: index after the last.
    """

    view: int
    start: int
    stop: int

    def samples(self) -> list[tuple[int, int]]:
        """Index and view of each sample."""
        return [(index, self.view) for index in range(self.start, self.stop)]


def blocks(keys: Iterable[tuple[int, int]], *, size: int, samples: int) -> list[Block]:
    """The blocks that hold these samples, in order.

    Args:
        keys: index and view of samples.
        size: samples of a block.
        samples: samples of the dataset.
    """
    found = {(view, index // size) for index, view in keys}
    return [Block(view, at * size, min(samples, (at + 1) * size)) for view, at in sorted(found)]


def pays(*, samples: int, views: int, draws: float) -> bool:
    """Whether fewer samples are encoded if features are kept than if each draw is encoded.

    Args:
        samples: samples of the dataset.
        views: views of each sample.
        draws: how many samples are drawn while the encoder is frozen.
    """
    return draws > samples * views
