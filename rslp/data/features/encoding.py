"""Run a frozen encoder over blocks of samples and write the features into the feature caches.

A block holds neighbouring samples of one dataset and view, in the dataset's order. It has the same samples whenever it
is computed, so its features have the same bits, whatever the mixture drew and wherever a run was killed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from rslearn.train.model_context import ModelContext, RasterImage
from torch.utils.data import DataLoader

from rslp import upstream
from rslp.data.batches import Batch, BatchKey, JointDataset, tensors_to
from rslp.data.cache.cache import free_bytes
from rslp.data.features.cache import FeatureCache, FeatureCacheWriter, evict_unused
from rslp.data.features.codec import CachedSample, UncacheableSample, narrowed, sample_of, shape_of
from rslp.data.features.settings import FeatureSettings
from rslp.data.samples import SampleKey, SampleSource
from rslp.models.joint import JointModel
from rslp.runtime import preemption
from rslp.runtime.children import FORKED


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


def caching_pays(*, samples: int, views: int, draws: float) -> bool:
    """Whether a cache of all samples in all views needs fewer encodings than all draws while the encoder is frozen."""
    return draws > samples * views


# Features take at most this share of the disk's free room.
_SHARE_OF_FREE = 0.5
_PROGRESS_SECONDS = 20.0

log = logging.getLogger(__name__)


class Encoding:
    """One pass over the blocks of a split that have to be encoded.

    Args:
        split: the split's name, for messages.
        feature_caches: the feature caches to write to, by dataset.
        sources: the samples of the split, by dataset.
        model: the joint model.
        depth: how many of its encoder's modules are run.
        settings: the user's choices.
    """

    def __init__(
        self,
        split: str,
        *,
        feature_caches: Mapping[str, FeatureCache],
        sources: Mapping[str, SampleSource],
        model: JointModel,
        depth: int,
        settings: FeatureSettings,
    ) -> None:
        self._split = split
        self._feature_caches = feature_caches
        self._sources = sources
        self._model = model
        self._depth = depth
        self._settings = settings
        self._reads_content = upstream.reads_inputs(model.after_encoder(depth))
        self._samples: dict[str, int] = {}
        self._given_up: set[str] = set()

    def run(
        self, blocks: Sequence[tuple[str, Block]], *, trainer: Trainer, workers: int, say: Callable[[str], None]
    ) -> set[str]:
        """Encode blocks until all are done, or the job is preempted.

        Args:
            blocks: pairs of a dataset and a block.
            trainer: the running trainer.
            workers: number of processes that read samples.
            say: prints a line for the user.

        Returns:
            The datasets whose features can't be cached.
        """
        blocks = [(name, block) for name, block in blocks if name in self._feature_caches]
        for name, block in blocks:
            self._samples[name] = self._samples.get(name, 0) + len(block.samples())
        for name, count in self._samples.items():
            say(f"encoding {count} samples of {name} {self._split} once, for all epochs with a frozen encoder")
        writers = {name: feature_cache.writer() for name, feature_cache in self._feature_caches.items()}
        began = reported = time.monotonic()
        try:
            for done, ((name, block), parts) in enumerate(zip(blocks, self._read(blocks, workers), strict=True), 1):
                if preemption.preemption_flag.received:
                    break
                if name not in self._given_up:
                    feature_cache = self._feature_caches[name]
                    self._cache(block, parts, writer=writers[name], feature_cache=feature_cache, trainer=trainer)
                if (now := time.monotonic()) - reported > _PROGRESS_SECONDS:
                    reported, left = now, (now - began) / done * (len(blocks) - done)
                    say(f"encoded {done} of {len(blocks)} batches, about {left / 60:.0f} min left")
            self._finish(writers)
        finally:
            for writer in writers.values():
                writer.abandon()
        return self._given_up

    def _read(self, blocks: Sequence[tuple[str, Block]], workers: int) -> Iterator[list[Batch]]:
        """The samples of each block, each as a batch of one; a bad sample gives an empty batch."""
        keys = [
            [BatchKey(name, (SampleKey(name, index, view),)) for index, view in block.samples()]
            for name, block in blocks
        ]
        loader: Iterable[list[Batch]] = DataLoader(
            JointDataset(self._sources, replace=False),
            batch_sampler=keys,
            num_workers=min(workers, len(keys)),
            multiprocessing_context=FORKED if workers and keys else None,
            prefetch_factor=4 if workers and keys else None,
            collate_fn=list,
            # Without its own generator the loader would draw from the run's.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _cache(
        self,
        block: Block,
        parts: Sequence[Batch],
        *,
        writer: FeatureCacheWriter,
        feature_cache: FeatureCache,
        trainer: Trainer,
    ) -> None:
        good = [(key, part) for key, part in zip(block.samples(), parts, strict=True) if part.inputs]
        if not good:
            return
        batch = Batch(
            good[0][1].dataset,
            [part.inputs[0] for _, part in good],
            [part.targets[0] for _, part in good],
            [part.metadatas[0] for _, part in good],
        )
        features = tensors_to(self._features(batch, trainer), torch.device("cpu"))
        try:
            for i, (index, view) in enumerate(key for key, _ in good):
                sample = CachedSample(
                    narrowed(sample_of(features, i), self._settings.torch_dtype),
                    self._inputs(batch.inputs[i]),
                    batch.targets[i],
                    batch.metadatas[i],
                )
                size = writer.add(index, view, sample)
                needed = size * self._samples[batch.dataset] * trainer.world_size
                if writer.written == 1 and not self._fits(feature_cache, needed=needed):
                    self._give_up(batch.dataset, "there is no room for them")
                    return
        except UncacheableSample as error:
            self._give_up(batch.dataset, f"they hold {error}")
        except OSError as error:
            self._give_up(batch.dataset, str(error))

    def _features(self, batch: Batch, trainer: Trainer) -> Any:
        moved = tensors_to(batch.inputs, trainer.strategy.root_device)
        # Lightning does this between the loader and a step.
        moved = trainer.precision_plugin.convert_input(moved)
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            return self._model.encode(ModelContext(inputs=moved, metadatas=batch.metadatas), depth=self._depth)

    def _inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that decoders need: all, if one reads their content, else images of the same size without data."""
        if self._reads_content:
            return dict(inputs)
        return {name: shape_of(value) for name, value in inputs.items() if isinstance(value, RasterImage)}

    def _fits(self, feature_cache: FeatureCache, *, needed: int) -> bool:
        """Whether there is room for ``needed`` more bytes, if need be after unused caches of other runs are deleted."""
        folder = feature_cache.folder.parent
        allowed = int(free_bytes(folder) * _SHARE_OF_FREE) + sum(
            path.stat().st_size for path in folder.glob("*/data/*.seg")
        )
        if self._settings.limit is not None:
            allowed = min(allowed, self._settings.limit)
        return evict_unused(folder, needed=needed, allowed=allowed, keep=feature_cache.folder) >= needed

    def _give_up(self, name: str, why: str) -> None:
        self._given_up.add(name)
        log.warning("%s %s: features of the frozen encoder are not cached: %s", name, self._split, why)

    def _finish(self, writers: Mapping[str, FeatureCacheWriter]) -> None:
        for name, writer in writers.items():
            try:
                writer.close()
            except OSError as error:
                self._give_up(name, str(error))
