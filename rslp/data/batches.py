"""Batches: which samples a batch has, how a worker reads and collates them, and how they get to the device."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from rslearn.train.model_context import SampleMetadata
from torch.utils.data import Dataset, Sampler

from rslp import upstream
from rslp.data.bad_samples import BadSample
from rslp.data.features.cache import FeatureCache
from rslp.data.mixture import mixture
from rslp.data.samples import Sample, SampleKey, SampleSource
from rslp.errors import DataError, MachineError
from rslp.models.joint import Features
from rslp.runtime import memory
from rslp.runtime.seeds import stable_seed

# At most this many other samples are tried in place of a bad one; where all are bad, the dataset is broken.
_TRIES = 20
_LESS_MEMORY = "set data.init_args.num_workers lower, or make batches smaller"
# By dataset.
FeatureCaches = Mapping[str, FeatureCache]


class Batch(NamedTuple):
    """Samples of one dataset: this process's part of a global batch.

    Attributes:
        dataset: the key of the dataset that all samples are of.
        inputs: for each sample its inputs, rasters ``C T H W``; empty for a process without a share in the batch, and
            if all of the batch's samples are bad.
        targets: for each sample its targets by task.
        metadatas: for each sample its window, crop and times; ``dataset_source`` is the dataset's key.
        bad_samples: bad samples that were met while the batch was read; they are not part of it.
        features: cached outputs of the frozen encoder for the samples; the inputs were then not read.
    """

    dataset: str
    inputs: list[dict[str, Any]]
    targets: list[dict[str, Any]]
    metadatas: list[SampleMetadata]
    bad_samples: tuple[BadSample, ...] = ()
    features: Features | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch with inputs, targets and features on a device."""
        return self if device.type == "cpu" else self._map(lambda value: tensors_to(value, device))

    def pin_memory(self) -> Batch:
        """The batch with inputs, targets and features in page-locked memory; torch's loader calls this."""
        return self._map(tensors_pinned)

    def _map(self, act: Callable[[Any], Any]) -> Batch:
        return self._replace(inputs=act(self.inputs), targets=act(self.targets), features=act(self.features))


@dataclass(frozen=True)
class BatchKey:
    """The samples of a batch, before they are read.

    Attributes:
        dataset: the key of their dataset.
        samples: their keys; none for a process without a share in the batch.
    """

    dataset: str
    samples: tuple[SampleKey, ...]

    @classmethod
    def of(cls, planned: mixture.PlannedBatch, *, views: Mapping[str, int | None] | None = None) -> BatchKey:
        """The key of a planned batch; its filler sample is left out, so it is not even read.

        Args:
            planned: the batch.
            views: for each dataset how many fixed views its samples have: draw d is then view d modulo this number.
        """
        count = (views or {}).get(planned.dataset)
        drawn = zip(planned.indices[: planned.real], planned.draws[: planned.real], strict=True)
        keys = (SampleKey(planned.dataset, index, draw if count is None else draw % count) for index, draw in drawn)
        return cls(planned.dataset, tuple(keys))

    def among(self, indices: Sequence[int]) -> BatchKey:
        """The key with each sample index i replaced by ``indices[i]``, for a plan over a selection of samples."""
        return replace(self, samples=tuple(replace(key, index=indices[key.index]) for key in self.samples))


class JointDataset(Dataset[Batch]):
    """All datasets of a split behind one ``__getitem__`` that takes a ``BatchKey``.

    Its items are whole batches, not samples, so that an item of the loader is the list of an optimiser step's batches.

    Args:
        sources: the datasets.
        replace: whether another sample takes the place of a bad one.
        feature_caches: by dataset; the samples of other datasets are read from their files.
    """

    def __init__(
        self, sources: Mapping[str, SampleSource], *, replace: bool, feature_caches: FeatureCaches | None = None
    ) -> None:
        self._sources = sources
        self._replace = replace
        self._feature_caches = feature_caches or {}

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch, with the bad samples that were met while it was read."""
        cache = self._feature_caches.get(key.dataset)
        if cache is not None and (batch := _from_features(cache, key)) is not None:
            return batch
        source = self._sources[key.dataset]
        samples = [read_or_replace(source, sample, replace=self._replace) for sample in key.samples]
        return collate(samples, dataset=key.dataset)


def _from_features(cache: FeatureCache, key: BatchKey) -> Batch | None:
    """A batch with features in place of inputs; None unless the features of all its samples are cached."""
    cached = cache.read([(sample.index, sample.draw) for sample in key.samples]) if key.samples else None
    if cached is None:
        return None
    features = Features(cache.depth, cached.features)
    return Batch(key.dataset, cached.inputs, cached.targets, cached.metadatas, features=features)


def read_or_replace(
    source: SampleSource, key: SampleKey, *, replace: bool
) -> tuple[Sample | None, tuple[BadSample, ...]]:
    """Read a sample; bad samples are returned, since an exception from a worker would arrive as pages of traceback.

    The sample that takes a bad one's place is drawn by hash(seed, dataset, window, draw, try): like every sample a
    pure function of the key, so that a resumed run and any number of workers read the same.

    Args:
        source: the dataset.
        key: which sample.
        replace: whether to read another sample in place of a bad one.

    Returns:
        The sample, or None if no try gave a good one, and all bad samples that were met.
    """
    bad_samples: list[BadSample] = []
    index = key.index
    for number in range(1 + (_TRIES if replace else 0)):
        try:
            return source.sample(index, draw=key.draw), tuple(bad_samples)
        except DataError as error:
            bad_samples.append(BadSample(source.split, source.identity(index), " ".join(str(error).split())))
        seed = stable_seed(source.seed, "instead of", source.identity(key.index), key.draw, number)
        index = random.Random(seed).randrange(len(source))
    return None, tuple(bad_samples)


def collate(read: Sequence[tuple[Sample | None, tuple[BadSample, ...]]], *, dataset: str) -> Batch:
    """A batch of samples of one dataset; nothing is stacked, since decoders stack what they need.

    Args:
        read: for each sample what ``read_or_replace`` returns.
        dataset: the dataset's key.
    """
    good = [sample for sample, _ in read if sample is not None]
    bad_samples = tuple(bad for _, bad_of_sample in read for bad in bad_of_sample)
    return Batch(dataset, [s[0] for s in good], [s[1] for s in good], [s[2] for s in good], bad_samples)


class StagedLoader:
    """One loader for Lightning, which makes a new inner loader when the feature caches change.

    Args:
        length: number of steps of an epoch.
        feature_caches: called at each start of an iteration; the inner loader stays as long as it returns the same.
        make: makes an inner loader that reads from feature caches.
    """

    def __init__(
        self,
        length: int,
        *,
        feature_caches: Callable[[], FeatureCaches],
        make: Callable[[FeatureCaches], Iterable[list[Batch]]],
    ) -> None:
        self._length = length
        self._feature_caches = feature_caches
        self._make = make
        self._current: tuple[FeatureCaches, Iterable[list[Batch]]] | None = None

    def __len__(self) -> int:
        """Steps of a full epoch, also when the iteration starts inside one."""
        return self._length

    def __iter__(self) -> Iterator[list[Batch]]:
        """Iterate over the remaining steps; the inner loader is made when the first item is taken."""
        feature_caches = self._feature_caches()
        if self._current is None or self._current[0] != feature_caches:
            # The former loader's workers end with it, before new ones start.
            self._current = None
            self._current = feature_caches, self._make(feature_caches)
        yield from self._current[1]

    def close(self) -> None:
        """End the workers."""
        self._current = None


class StepSampler(Sampler[list[BatchKey]]):
    """Yields the batch keys of each remaining optimiser step, which ``steps`` returns at each start of an iteration."""

    def __init__(self, length: int, steps: Callable[[], Iterator[list[BatchKey]]]) -> None:
        self._length = length
        self._steps = steps

    def __len__(self) -> int:
        """Steps of a full epoch, also when the iteration starts inside one."""
        return self._length

    def __iter__(self) -> Iterator[list[BatchKey]]:
        """Iterate over the remaining steps."""
        return self._steps()


def tensors_to(value: Any, device: torch.device) -> Any:
    """Copy the tensors in containers and dataclasses to a device; other values are shared.

    Quicker than Lightning's way, which copies every object of a batch, down to the projections in its metadata.
    """
    # To the CPU the copy has to be waited for: the values would be read before they are there.
    return _map_tensors(value, lambda tensor: tensor.to(device, non_blocking=device.type != "cpu"))


def tensors_pinned(value: Any) -> Any:
    """Copy the tensors in containers and dataclasses, which torch's way would leave out, to page-locked memory."""
    return _map_tensors(value, torch.Tensor.pin_memory)


def _map_tensors(value: Any, act: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.numel() > 1 and not any(value.stride()):
            # One value that is expanded to the shape of an image: only the value is copied.
            return act(value[(0,) * value.ndim]).expand(value.shape)
        return act(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(item, act) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, act) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Raster images and features; their values that are not tensors (dates) are shared.
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _map_tensors(item, act) for name, item in fields.items()})
    return value


@contextmanager
def explain_worker_death() -> Iterator[None]:
    """Turn the death of a worker process, in a block, into one line that says how it died and what helps.

    Raises:
        MachineError: a worker that read samples was killed, or memory ran out in one.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        if (death := upstream.worker_death(error)) is not None:
            message = f"a process that reads samples {_explanation(death)}"
        elif memory.is_out_of_memory(error):
            message = f"memory ran out (limit: {memory.limits()}): {_LESS_MEMORY}"
        else:
            raise
        raise MachineError(f"{message}; the same command goes on from its last checkpoint, if there is one") from error


def _explanation(death: str) -> str:
    if "Terminated" in death:
        return f"was ended from outside ({death})"
    if "Killed" in death:
        why = f"was killed (SIGKILL), as the kernel does when memory runs out (limit: {memory.limits()})"
    elif "signal: Bus" in death:
        shared = shutil.disk_usage("/dev/shm").total / 2**20
        why = f"died ({death}), as happens when shared memory is full (/dev/shm: {shared:.0f} MiB)"
    else:
        why = f"died ({death}), as happens when memory runs out (limit: {memory.limits()})"
    return f"{why}: {_LESS_MEMORY}"
