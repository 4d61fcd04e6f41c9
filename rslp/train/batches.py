"""From sample keys to the batches of an optimiser step: the torch dataset over all sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rslearn.train.model_context import SampleMetadata
from torch.utils.data import Dataset, Sampler

from rslp.errors import DataError
from rslp.train import mixture
from rslp.train.samples import Sample, SampleKey, SampleSource


class Batch(NamedTuple):
    """Samples of one dataset: this process's part of a global batch.

    Attributes:
        dataset: the key of the dataset that all samples are of.
        inputs: for each sample its inputs, rasters ``C T H W``; empty for a process without a share in the batch.
        targets: for each sample its targets by task.
        metadatas: for each sample where it comes from; ``dataset_source`` is the dataset's key.
    """

    dataset: str
    inputs: list[dict[str, Any]]
    targets: list[dict[str, Any]]
    metadatas: list[SampleMetadata]


@dataclass(frozen=True)
class Fault:
    """A sample that could not be read, on its way from a worker to the process that can stop the run."""

    message: str


@dataclass(frozen=True)
class BatchKey:
    """Which samples make a batch.

    Attributes:
        dataset: the key of their dataset.
        samples: their keys; none for a process without a share in the batch.
    """

    dataset: str
    samples: tuple[SampleKey, ...]

    @classmethod
    def of(cls, planned: mixture.Batch) -> BatchKey:
        """The real samples of a planned batch: what a filler stands for is not even read."""
        drawn = zip(planned.indices[: planned.real], planned.draws[: planned.real], strict=True)
        return cls(planned.dataset, tuple(SampleKey(planned.dataset, index, draw) for index, draw in drawn))


class JointDataset(Dataset[Batch | Fault]):
    """All datasets of a split behind one ``__getitem__`` that takes a ``BatchKey``.

    Whole batches, not samples, are its items, so that an item of the loader is the list of an optimiser step's batches.
    """

    def __init__(self, sources: Mapping[str, SampleSource]) -> None:
        self._sources = sources

    def __getitem__(self, key: BatchKey) -> Batch | Fault:
        """The batch, or the fault of one of its samples."""
        return collate([self._sample(sample) for sample in key.samples], dataset=key.dataset)

    def _sample(self, key: SampleKey) -> Sample | Fault:
        """A sample, or its fault: an exception raised in a worker would arrive as pages of traceback."""
        try:
            return self._sources[key.dataset].sample(key.index, draw=key.draw)
        except DataError as error:
            return Fault(str(error))


def collate(samples: Sequence[Sample | Fault], *, dataset: str) -> Batch | Fault:
    """Put samples of a dataset side by side; nothing is stacked, since decoders stack what they need."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, Fault):
            return sample
        good.append(sample)
    return Batch(dataset, [s[0] for s in good], [s[1] for s in good], [s[2] for s in good])


class StepSampler(Sampler[list[BatchKey]]):
    """Yields the batches of each optimiser step, from where the run stands.

    Args:
        length: number of steps of an epoch.
        steps: called at each start of an iteration; gives the steps that are still to come.
    """

    def __init__(self, length: int, steps: Callable[[], Iterator[list[BatchKey]]]) -> None:
        self._length = length
        self._steps = steps

    def __len__(self) -> int:
        """Steps of a full epoch, also when the iteration starts inside one."""
        return self._length

    def __iter__(self) -> Iterator[list[BatchKey]]:
        """Iterate over what is still to come."""
        return self._steps()
