"""Which samples: each dataset is an endless stream of shuffled passes, cut into batches once and for all.

The cut does not know of epochs, and batch number ``i`` of a stream is found without those before it. So the state of a
run is one number per dataset, and any position of any epoch can be reached at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def generator(*key: str | int) -> np.random.Generator:
    """Make a random generator that depends on the key alone, in any process and under any hash seed."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def shuffled(size: int, *, seed: int, dataset: str, number: int) -> npt.NDArray[np.int64]:
    """Give the order of samples in pass ``number`` of a dataset: a permutation of ``range(size)``."""
    return generator("pass", seed, dataset, number).permutation(size)


@dataclass(frozen=True)
class Stream:
    """The endless sequence of one dataset's global batches.

    The stream of samples (pass 0, pass 1, …, each ``size`` long) is cut into cycles of equal length, and each cycle
    into the same number of batches of nearly equal size. No batch reaches over the end of a pass, so none holds a
    sample twice, and all its samples have been drawn equally often before.

    Nearly equal: 9 samples with batch size 8 make 5 + 4, not 8 + 1. With losses that are means over the batch, a lone
    last sample would count eight times as much as the others.

    Attributes:
        size: samples in the dataset, hence in a pass; at least 1.
        samples_per_cycle: samples in a cycle, 1 to ``size``: what one epoch takes under ``stop: all``.
        batch: the largest number of samples in a global batch.
    """

    size: int
    samples_per_cycle: int
    batch: int

    @property
    def batches(self) -> int:
        """How many batches make a cycle.

        A cycle that holds the end of a pass may need one more batch than another; then all cycles have one more, so
        that every epoch has the same length.
        """
        common = math.gcd(self.size, self.samples_per_cycle)
        never_split = common == self.samples_per_cycle or common % self.batch == 0
        return -(-self.samples_per_cycle // self.batch) + (0 if never_split else 1)

    def span(self, number: int) -> tuple[int, int, int]:
        """Find a batch: its pass, and the first and one-past-last position in that pass's order.

        Args:
            number: the batch's number in the stream, from 0.
        """
        batches = self.batches
        cycle, index = divmod(number, batches)
        begin = cycle * self.samples_per_cycle
        head = min(self.size - begin % self.size, self.samples_per_cycle)  # samples before the end of the pass
        cuts = self._cuts_of_head(head, batches)
        if index < cuts:
            start, stop = head * index // cuts, head * (index + 1) // cuts
        else:
            tail, rest, index = self.samples_per_cycle - head, batches - cuts, index - cuts
            start, stop = head + tail * index // rest, head + tail * (index + 1) // rest
        number_of_pass, first = divmod(begin + start, self.size)
        return number_of_pass, first, first + stop - start

    def _cuts_of_head(self, head: int, batches: int) -> int:
        """How many of a cycle's batches lie before the end of the pass: its part of them, where sizes allow."""
        tail = self.samples_per_cycle - head
        if tail == 0:
            return batches
        least = max(-(-head // self.batch), batches - tail)
        most = min(head, batches + (-tail // self.batch))
        return max(least, min(most, round(batches * head / self.samples_per_cycle)))
