"""From sample keys to batches: the torch dataset over all sources, and what a batch is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rslearn.train.model_context import SampleMetadata
from torch.utils.data import Dataset, Sampler

from rslp.errors import DataError
from rslp.train.samples import Sample, SampleKey, SampleSource


class Batch(NamedTuple):
    """Samples of one dataset.

    Attributes:
        inputs: for each sample its inputs, rasters ``C T H W``.
        targets: for each sample its targets by task.
        metadatas: for each sample where it comes from; ``dataset_source`` is the dataset's key.
    """

    inputs: list[dict[str, Any]]
    targets: list[dict[str, Any]]
    metadatas: list[SampleMetadata]

    @property
    def dataset(self) -> str:
        """The key of the dataset that all samples are of."""
        return str(self.metadatas[0].dataset_source)


@dataclass(frozen=True)
class Fault:
    """A sample that could not be read, on its way from a worker to the process that can stop the run."""

    message: str


class JointDataset(Dataset[Sample | Fault]):
    """All datasets of a split behind one ``__getitem__`` that takes a ``SampleKey``."""

    def __init__(self, sources: Mapping[str, SampleSource]) -> None:
        self._sources = sources

    def __getitem__(self, key: SampleKey) -> Sample | Fault:
        """The sample, or its fault: an exception raised in a worker would arrive as pages of traceback."""
        try:
            return self._sources[key.dataset].sample(key.index, draw=key.draw)
        except DataError as error:
            return Fault(str(error))


def collate(samples: Sequence[Sample | Fault]) -> Batch | Fault:
    """Put samples side by side; nothing is stacked, since decoders stack what they need."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, Fault):
            return sample
        good.append(sample)
    inputs, targets, metadatas = zip(*good, strict=True)
    return Batch(list(inputs), list(targets), list(metadatas))


class KeySampler(Sampler[list[SampleKey]]):
    """Yields the keys of each batch, from where the run stands.

    Args:
        length: number of batches of an epoch.
        batches: called at each start of an iteration; gives the batches that are still to come.
    """

    def __init__(self, length: int, batches: Callable[[], Iterator[list[SampleKey]]]) -> None:
        self._length = length
        self._batches = batches

    def __len__(self) -> int:
        """Batches of a full epoch, also when the iteration starts inside one."""
        return self._length

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Iterate over what is still to come."""
        return self._batches()
