"""Run a frozen encoder over blocks of samples and write the features into the feature caches.

A block holds neighbouring samples of one dataset and view, in the dataset's order. It has the same samples whenever it
is computed, so its features have the same bits, whatever the mixture drew and wherever a run was killed.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from rslearn.train.model_context import ModelContext, RasterImage
from torch.utils.data import DataLoader

from rslp import upstream
from rslp.data.batches import Batch, BatchKey, JointDataset, collate, tensors_to
from rslp.data.features.cache import FeatureCache, FeatureCacheWriter, FeatureSettings, make_room
from rslp.data.features.codec import CachedSample, UncacheableSample, sample_of, shape_of
from rslp.data.samples import SampleKey
from rslp.errors import DiskError
from rslp.models.joint import JointModel
from rslp.runtime import preemption
from rslp.runtime.children import FORKED

_PROGRESS_SECONDS = 20.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Block:
    """Samples ``start`` to ``stop - 1`` of a dataset in one view."""

    view: int
    start: int
    stop: int

    def samples(self) -> list[tuple[int, int]]:
        """Index and view of each sample."""
        return [(index, self.view) for index in range(self.start, self.stop)]


def blocks(keys: Iterable[tuple[int, int]], *, size: int, samples: int) -> list[Block]:
    """The blocks of ``size`` samples with these keys (index and view), in order; ``samples`` are in the dataset."""
    numbers = {(view, index // size) for index, view in keys}
    return [Block(view, n * size, min(samples, (n + 1) * size)) for view, n in sorted(numbers)]


class Encoding:
    """One pass over the blocks of a split that have to be encoded.

    Args:
        split: the split's name, for messages.
        feature_caches: the feature caches to write to, by dataset.
        model: the joint model.
        trainer: the running trainer.
        settings: the user's choices.
    """

    def __init__(
        self,
        split: str,
        *,
        feature_caches: Mapping[str, FeatureCache],
        model: JointModel,
        trainer: Trainer,
        settings: FeatureSettings,
    ) -> None:
        self._split = split
        self._caches = feature_caches
        self._model = model
        self._trainer = trainer
        self._settings = settings
        self._samples: Counter[str] = Counter()
        self._given_up: set[str] = set()

    def run(self, blocks: Sequence[tuple[str, Block]], *, workers: int, say: Callable[[str], None]) -> set[str]:
        """Encode blocks until all are done, or the job is preempted.

        Args:
            blocks: pairs of a dataset and a block.
            workers: number of processes that read samples.
            say: prints a line for the user.

        Returns:
            The datasets whose features can't be cached.
        """
        for name, block in blocks:
            self._samples[name] += len(block.samples())
        for name, count in self._samples.items():
            say(f"encoding {count} samples of {name} {self._split} once, for all epochs with a frozen encoder")
        writers = {name: FeatureCacheWriter(self._caches[name]) for name in self._samples}
        began = reported = time.monotonic()
        try:
            for done, ((name, block), parts) in enumerate(zip(blocks, self._read(blocks, workers), strict=True), 1):
                if preemption.preemption_flag.received:
                    break
                if name not in self._given_up:
                    with self._giving_up(name):
                        self._cache(block, parts, writer=writers[name])
                if (now := time.monotonic()) - reported > _PROGRESS_SECONDS:
                    reported, left = now, (now - began) / done * (len(blocks) - done)
                    say(f"encoded {done} of {len(blocks)} batches, about {left / 60:.0f} min left")
            for name, writer in writers.items():
                with self._giving_up(name):
                    writer.publish()
        finally:
            for writer in writers.values():
                writer.close()
        return self._given_up

    @contextmanager
    def _giving_up(self, name: str) -> Iterator[None]:
        """Give up the feature cache of a dataset, with a warning, if this block can't write features."""
        try:
            yield
        except (UncacheableSample, OSError) as error:
            why = f"they hold {error}" if isinstance(error, UncacheableSample) else error
            log.warning("%s %s: features of the frozen encoder are not cached: %s", name, self._split, why)
            self._given_up.add(name)

    def _read(self, blocks: Sequence[tuple[str, Block]], workers: int) -> Iterator[list[Batch]]:
        """The samples of each block, each as a batch of one; a bad sample gives an empty batch."""
        keys = [
            [BatchKey(name, (SampleKey(name, index, view),)) for index, view in block.samples()]
            for name, block in blocks
        ]
        loader: Iterable[list[Batch]] = DataLoader(
            JointDataset({name: cache.source for name, cache in self._caches.items()}, replace=False),
            batch_sampler=keys,
            num_workers=min(workers, len(keys)),
            multiprocessing_context=FORKED if workers and keys else None,
            prefetch_factor=4 if workers and keys else None,
            collate_fn=list,
            # Without its own generator the loader would draw from the run's.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _cache(self, block: Block, parts: Sequence[Batch], *, writer: FeatureCacheWriter) -> None:
        good = [(key, part) for key, part in zip(block.samples(), parts, strict=True) if part.inputs]
        if not good:
            return
        samples = [(part.inputs[0], part.targets[0], part.metadatas[0]) for _, part in good]
        batch = collate([(sample, ()) for sample in samples], dataset=parts[0].dataset)
        features = tensors_to(self._features(batch), torch.device("cpu"))
        reads_content = upstream.reads_inputs(self._model.after_encoder(writer.feature_cache.depth))
        for i, ((index, view), _) in enumerate(good):
            inputs, targets, metadata = samples[i]
            if not reads_content:
                # Decoders need the sizes of images alone.
                inputs = {name: shape_of(value) for name, value in inputs.items() if isinstance(value, RasterImage)}
            own = sample_of(features, i, dtype=self._settings.torch_dtype)
            size = writer.add(index, view, CachedSample(own, inputs, targets, metadata))
            if writer.written == 1:
                needed = size * self._samples[batch.dataset] * self._trainer.world_size
                if lack := make_room(writer.feature_cache.folder, needed=needed, limit=self._settings.limit):
                    raise DiskError(errno.ENOSPC, f"there is no room for them: {lack}")

    def _features(self, batch: Batch) -> Any:
        plugin, depth = self._trainer.precision_plugin, self._caches[batch.dataset].depth
        # Lightning converts inputs between the loader and a step.
        moved = plugin.convert_input(tensors_to(batch.inputs, self._trainer.strategy.root_device))
        with plugin.forward_context(), torch.no_grad():
            return self._model.encode(ModelContext(inputs=moved, metadatas=batch.metadatas), depth=depth)
