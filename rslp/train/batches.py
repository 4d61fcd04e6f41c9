"""From sample keys to batches: the torch dataset over all sources, and what a batch is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rslearn.train.model_context import SampleMetadata
from torch.utils.data import Dataset, Sampler

from rslp.train.faults import Fault
from rslp.train.reading import read
from rslp.train.samples import Sample, SampleKey, SampleSource


class Batch(NamedTuple):
    """Samples of one dataset.

    Attributes:
        dataset: the key of the dataset that all samples are of.
        inputs: for each sample its inputs, rasters ``C T H W``; empty if none of the batch's samples can be used.
        targets: for each sample its targets by task.
        metadatas: for each sample where it comes from; ``dataset_source`` is the dataset's key.
        faults: samples that can't be used, which are not in it.
    """

    dataset: str
    inputs: list[dict[str, Any]]
    targets: list[dict[str, Any]]
    metadatas: list[SampleMetadata]
    faults: tuple[Fault, ...] = ()


class JointDataset(Dataset[tuple[str, Sample | None, tuple[Fault, ...]]]):
    """All datasets of a split behind one ``__getitem__`` that takes a ``SampleKey``.

    Args:
        sources: the datasets.
        replace: whether another sample takes the place of one that can't be used.
    """

    def __init__(self, sources: Mapping[str, SampleSource], *, replace: bool) -> None:
        self._sources = sources
        self._replace = replace

    def __getitem__(self, key: SampleKey) -> tuple[str, Sample | None, tuple[Fault, ...]]:
        """The sample of a dataset, with the faults that were met on the way to it."""
        return key.dataset, *read(self._sources[key.dataset], key, replace=self._replace)


def collate(read: Sequence[tuple[str, Sample | None, tuple[Fault, ...]]]) -> Batch:
    """Put samples side by side; nothing is stacked, since decoders stack what they need."""
    good = [sample for _, sample, _ in read if sample is not None]
    faults = tuple(fault for _, _, of_sample in read for fault in of_sample)
    return Batch(read[0][0], [s[0] for s in good], [s[1] for s in good], [s[2] for s in good], faults)


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
