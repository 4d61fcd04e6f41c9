"""Encode blocks of samples and keep what comes out.

Features are computed in blocks: neighbours of one dataset and view, in the dataset's order. A block has the same
samples whenever it is computed, so its features have the same bits, whatever the mixture drew and wherever a run was
killed.
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


def caching_pays(*, samples: int, views: int, draws: float) -> bool:
    """Whether fewer samples are encoded if features are kept than if each draw is encoded.

    Args:
        samples: samples of the dataset.
        views: views of each sample.
        draws: how many samples are drawn while the encoder is frozen.
    """
    return draws > samples * views


# Of the disk's free room, features take at most this share.
_SHARE_OF_FREE = 0.5
_TELL_SECONDS = 20.0

log = logging.getLogger(__name__)


class Encoding:
    """One pass over blocks that have to be encoded.

    Args:
        split: names the split in messages.
        feature_caches: where the features go, by dataset.
        sources: the samples of the split, by dataset.
        model: the joint model.
        depth: how many of its encoder's modules are run.
        settings: what a person chose.
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
        self._banks = feature_caches
        self._sources = sources
        self._model = model
        self._depth = depth
        self._settings = settings
        self._content = upstream.reads_inputs(model.after_encoder(depth))
        self._samples: dict[str, int] = {}
        self._given_up: set[str] = set()

    def run(
        self, blocks: Sequence[tuple[str, Block]], *, trainer: Trainer, workers: int, say: Callable[[str], None]
    ) -> set[str]:
        """Encode blocks, until a scheduler wants the machine.

        Args:
            blocks: datasets and their blocks.
            trainer: the trainer that is at work.
            workers: processes that read samples.
            say: tells the user a line.

        Returns:
            The datasets whose features can't be kept.
        """
        blocks = [(name, block) for name, block in blocks if name in self._banks]
        for name, block in blocks:
            self._samples[name] = self._samples.get(name, 0) + len(block.samples())
        for name, count in self._samples.items():
            say(f"encoding {count} samples of {name} {self._split} once, for all epochs with a frozen encoder")
        writers = {name: feature_cache.writer() for name, feature_cache in self._banks.items()}
        began = told = time.monotonic()
        try:
            for done, ((name, block), parts) in enumerate(zip(blocks, self._read(blocks, workers), strict=True), 1):
                if preemption.preemption_flag.received:
                    break
                if name not in self._given_up:
                    self._keep(block, parts, writer=writers[name], feature_cache=self._banks[name], trainer=trainer)
                if (now := time.monotonic()) - told > _TELL_SECONDS:
                    told, left = now, (now - began) / done * (len(blocks) - done)
                    say(f"encoded {done} of {len(blocks)} batches, about {left / 60:.0f} min left")
            self._finish(writers)
        finally:
            for writer in writers.values():
                writer.abandon()
        return self._given_up

    def _read(self, blocks: Sequence[tuple[str, Block]], workers: int) -> Iterator[list[Batch]]:
        """The samples of each block, each as a batch of its own: one that can't be used leaves a batch of none."""
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
            # A generator of its own: the loader would draw from the run's.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _keep(
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
                kept = CachedSample(
                    narrowed(sample_of(features, i), self._settings.torch_dtype),
                    self._inputs(batch.inputs[i]),
                    batch.targets[i],
                    batch.metadatas[i],
                )
                size = writer.add(index, view, kept)
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
        # What Lightning does between the loader and a step.
        moved = trainer.precision_plugin.convert_input(moved)
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            return self._model.encode(ModelContext(inputs=moved, metadatas=batch.metadatas), depth=self._depth)

    def _inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What decoders read of the inputs: as a rule nothing, or the size of an image."""
        if self._content:
            return dict(inputs)
        return {name: shape_of(value) for name, value in inputs.items() if isinstance(value, RasterImage)}

    def _fits(self, feature_cache: FeatureCache, *, needed: int) -> bool:
        """Whether there is room for so many bytes more; unused features of other runs make way."""
        folder = feature_cache.folder.parent
        allowed = int(free_bytes(folder) * _SHARE_OF_FREE) + sum(
            path.stat().st_size for path in folder.glob("*/data/*.seg")
        )
        if self._settings.limit is not None:
            allowed = min(allowed, self._settings.limit)
        return evict_unused(folder, needed=needed, allowed=allowed, keep=feature_cache.folder) >= needed

    def _give_up(self, name: str, why: str) -> None:
        self._given_up.add(name)
        log.warning("%s %s: features of the frozen encoder are not kept: %s", name, self._split, why)

    def _finish(self, writers: Mapping[str, FeatureCacheWriter]) -> None:
        for name, writer in writers.items():
            try:
                writer.close()
            except OSError as error:
                self._give_up(name, str(error))
