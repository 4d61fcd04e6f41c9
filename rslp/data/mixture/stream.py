"""The samples of each batch: a dataset is an endless stream of shuffled passes, cut into batches.

The cut does not depend on epochs, and batch ``i`` of a stream is computed without those before it. So the state of a
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
    """A random generator that depends on the key alone, in any process and under any hash seed."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def shuffled(size: int, *, seed: int, dataset: str, number: int) -> npt.NDArray[np.int64]:
    """The order of samples in pass ``number`` of a dataset: a permutation of ``range(size)``."""
    return generator("pass", seed, dataset, number).permutation(size)


@dataclass(frozen=True)
class Stream:
    """The endless sequence of one dataset's global batches.

    The stream of samples (pass 0, pass 1, …, each ``size`` long) is cut into cycles of equal length, and each cycle
    into the same number of batches of nearly equal size. No batch extends over the end of a pass, so none has a sample
    twice, and all its samples have been drawn equally often before.

    Nearly equal: 9 samples with batch size 8 make 5 + 4, not 8 + 1. In a loss that is a mean over the batch, a single
    last sample would count eight times as much as the others.

    Attributes:
        size: number of samples in the dataset, and in a pass; at least 1.
        samples_per_cycle: 1 to ``size``; under ``stop: all`` an epoch takes one cycle.
        batch: the largest number of samples in a global batch.
    """

    size: int
    samples_per_cycle: int
    batch: int

    @property
    def batches(self) -> int:
        """The number of batches in a cycle.

        A cycle with the end of a pass inside may need one more batch than others; then all cycles have one more, so
        that every epoch has the same length.
        """
        common = math.gcd(self.size, self.samples_per_cycle)
        never_split = common == self.samples_per_cycle or common % self.batch == 0
        return -(-self.samples_per_cycle // self.batch) + (0 if never_split else 1)

    def span(self, number: int) -> tuple[int, int, int]:
        """The place of a batch: its pass, and its first and one-past-last position in the order of that pass.

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
            tail, cuts, index = self.samples_per_cycle - head, batches - cuts, index - cuts
            start, stop = head + tail * index // cuts, head + tail * (index + 1) // cuts
        number_of_pass, first = divmod(begin + start, self.size)
        return number_of_pass, first, first + stop - start

    def _cuts_of_head(self, head: int, batches: int) -> int:
        """The number of a cycle's batches before the end of the pass, in proportion to its samples if sizes allow."""
        tail = self.samples_per_cycle - head
        if tail == 0:
            return batches
        least = max(-(-head // self.batch), batches - tail)
        most = min(head, batches + (-tail // self.batch))
        return max(least, min(most, round(batches * head / self.samples_per_cycle)))
