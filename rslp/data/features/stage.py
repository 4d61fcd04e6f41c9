"""While the encoder is frozen: fill the feature caches before an epoch, and give them to the loaders.

Where only the first modules of the encoder are frozen, their outputs are cached; their number is called *depth*. Views
are the fixed random crops and augmentations that a sample has in that time, see ``docs/frozen_encoder.md``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from rslearn.train.callbacks.freeze_unfreeze import FreezeUnfreeze

from rslp import upstream
from rslp.data.cache.cache import cache_lock
from rslp.data.features import fingerprint
from rslp.data.features.cache import FOLDER, FeatureCache, FeatureSettings, delete_if_unused
from rslp.data.features.encoding import Block, Encoding, blocks
from rslp.data.samples import SampleSource
from rslp.errors import RunError
from rslp.io.terminal import print_message
from rslp.models.joint import JointModel
from rslp.models.optim import Freeze, freeze_callbacks
from rslp.runtime import collectives, preemption

log = logging.getLogger(__name__)

# Paths of modules, in a Freeze, that stand for all weights of the encoder (its first module has nearly all of them).
_WHOLE_ENCODER = {"model.encoder", "model.encoder.0"}
# By dataset the index and the view of samples.
Keys = Mapping[str, list[tuple[int, int]]]


def frozen_depth(encoder: Iterable[torch.nn.Module]) -> int:
    """How many of the encoder's first modules always have the same outputs for a sample.

    Those are modules that have parameters, none of which trains, and no part in training mode (such as dropout).
    """
    depth = 0
    for module in encoder:
        parameters = list(module.parameters())
        if not parameters or any(parameter.requires_grad for parameter in parameters):
            break
        if any(part.training for part in module.modules()):
            break
        depth += 1
    return depth


def frozen_epochs(trainer: Trainer, modules: Iterable[torch.nn.Module]) -> float:
    """The number of epochs, from the run's first, until a parameter of these modules thaws or the run ends.

    Infinite if none thaws and the run has no last epoch.
    """
    last = trainer.max_epochs
    end = math.inf if last is None or last < 0 else float(last)
    parameters = {parameter for module in modules for parameter in module.parameters()}
    thaws: dict[torch.nn.Parameter, int | None] = {}
    for callback in freeze_callbacks(trainer):  # where several freeze a parameter, the last one decides
        thaws |= {p: callback.thaw_at_epoch for p in callback.parameters if p in parameters}
    return min([end, *(float(epoch) for epoch in thaws.values() if epoch is not None)])


def validations(trainer: Trainer, epochs: float) -> float:
    """Roughly how often a run validates in a number of epochs."""
    interval = trainer.val_check_interval
    per_epoch = 1 / interval if isinstance(interval, float) and interval > 0 else 1
    return epochs * per_epoch / (trainer.check_val_every_n_epoch or 1)


def stays_frozen(config: Mapping[str, Any]) -> bool:
    """Whether a run config freezes the whole encoder and never thaws it, so that other runs can use its features."""
    for callback in (config.get("trainer") or {}).get("callbacks") or []:
        name = str(callback.get("class_path", "")).rpartition(".")[2]
        arguments = callback.get("init_args") or {}
        if name == FreezeUnfreeze.__name__:
            arguments = Freeze.settings_of(arguments)
        elif name != Freeze.__name__:
            continue
        modules = arguments.get("modules", "model.encoder")
        paths = {modules} if isinstance(modules, str) else set(modules)
        if arguments.get("thaw_at_epoch") is None and paths & _WHOLE_ENCODER:
            return True
    return False


@dataclass
class _Split:
    """The feature caches of a split.

    Attributes:
        depth: how many of the encoder's modules they are of.
        open: by dataset.
        without: datasets without one: caching does not pay, the features can't be cached, or there is no room.
        attempted: samples (dataset, index, view) that could not be encoded, mostly bad ones; not tried again.
    """

    depth: int
    open: dict[str, FeatureCache] = field(default_factory=dict)
    without: set[str] = field(default_factory=set)
    attempted: set[tuple[str, int, int]] = field(default_factory=set)

    def missing(self, name: str, drawn: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of the drawn samples (index and view) that are neither cached nor attempted."""
        return [key for key in self.open[name].missing(drawn) if (name, *key) not in self.attempted]


class FrozenStage:
    """Opens and fills the feature caches of a run while its encoder, or the first modules of it, are frozen.

    Args:
        settings: the user's choices.
        batch_sizes: samples per batch by dataset.

    Attributes:
        depth: how many of the encoder's first modules are frozen at present, see ``frozen_depth``.
    """

    def __init__(self, settings: FeatureSettings, batch_sizes: Mapping[str, int]) -> None:
        self.settings = settings
        self.depth = 0
        self._batch_sizes = batch_sizes
        self._config: Mapping[str, Any] = {}
        self._splits: dict[str, _Split] = {}
        self._weights: dict[int, str] = {}

    def describe(self, config: Mapping[str, Any]) -> None:
        """Set the run config of the run, on which fingerprints depend; without it nothing is cached."""
        self._config = config

    def views(self, sources: Mapping[str, SampleSource]) -> dict[str, int | None]:
        """How many views the samples of each dataset have at present.

        None means that each draw has its own random crop and augmentation, as while the encoder trains.
        """
        if not self.depth:
            return dict.fromkeys(sources)
        return {name: 1 if source.is_deterministic else self.settings.views for name, source in sources.items()}

    def feature_caches(
        self,
        split: str,
        *,
        sources: Mapping[str, SampleSource],
        keys: Callable[[], Keys],
        trainer: Trainer | None,
        workers: int,
    ) -> Mapping[str, FeatureCache]:
        """The feature caches of a split by dataset, opened, after missing features were computed.

        All ranks have to call it at the same points, since they wait for each other.

        Args:
            split: "train", "val" or "test".
            sources: the samples of the split, by dataset.
            keys: gives by dataset index and view of all samples that all ranks read in the coming epoch.
            trainer: the running trainer.
            workers: number of processes that read samples to encode.

        Raises:
            Preempted: the job was asked to stop; features computed so far are on disk.
        """
        model = None if trainer is None else upstream.model_of(trainer)
        if trainer is None or not isinstance(model, JointModel):
            return {}
        # In validation, test and prediction nothing trains.
        self.depth = frozen_depth(model.encoder) if upstream.is_fitting(trainer) else len(model.encoder)
        if split in self._splits and self._splits[split].depth != self.depth:
            self._delete(split)
        if not self.depth or not self.settings.keep or not self._config:
            return {}
        state = self._splits.setdefault(split, _Split(self.depth))
        views = {name: n for name, n in self.views(sources).items() if n is not None and name not in state.without}
        # Listing all that an epoch draws takes a while, and after the first epoch hardly anything is missing.
        if all(name in state.open and state.open[name].is_complete() for name in views):
            wanted: Keys = {}
        else:
            drawn = keys()
            for name in [name for name in views if name not in state.open]:
                draws = len(drawn[name])
                self._open(split, sources[name], views=views[name], draws=draws, model=model, trainer=trainer)
            wanted = {name: drawn[name] for name in sorted(state.open)}
        if any(collectives.all_gather(any(state.missing(name, drawn) for name, drawn in wanted.items()))):
            self._complete(split, wanted, model=model, trainer=trainer, workers=workers)
        return dict(state.open)

    def _open(
        self, split: str, source: SampleSource, *, views: int, draws: int, model: JointModel, trainer: Trainer
    ) -> None:
        """Open the feature cache of a dataset and split, if caching pays or the cache exists already.

        Args:
            split: the split.
            source: the samples.
            views: the number of their views.
            draws: how many of them all ranks together read in an epoch.
            model: the joint model.
            trainer: the running trainer.
        """
        name, state = source.name, self._splits[split]
        state.without.add(name)
        folder, pays = source.cache_folder, draws * self._times(split, model, trainer) > len(source) * views
        if folder is None or not (pays or (folder / FOLDER).exists()):
            return
        path = folder / FOLDER / self._fingerprint(source, split, model, trainer)
        if pays or path.exists():
            try:
                state.open[name] = FeatureCache(path, source=source, views=views, depth=self.depth)
                state.without.remove(name)
            except (OSError, RunError) as error:
                log.warning("%s %s: features of the frozen encoder are not cached: %s", name, split, error)

    def _times(self, split: str, model: JointModel, trainer: Trainer) -> float:
        """How often, roughly, a run goes through a split while the encoder is frozen."""
        if not upstream.is_fitting(trainer):
            return math.inf if stays_frozen(self._config) else 1
        epochs = frozen_epochs(trainer, model.encoder[: self.depth])
        return epochs if split == "train" else validations(trainer, epochs)

    def _fingerprint(self, source: SampleSource, split: str, model: JointModel, trainer: Trainer) -> str:
        """The fingerprint of all that a dataset's features depend on besides its windows."""
        encoder = self._config["model"]["init_args"]["model"]["init_args"]["encoder"][: self.depth]
        if self.depth not in self._weights:
            self._weights[self.depth] = fingerprint.weights_digest(model.encoder[: self.depth])
        return fingerprint.json_fingerprint(
            fingerprint.of_dataset(
                self._config["data"]["init_args"]["data_modules"][source.name], config=source.dataset_config()
            ),
            {"name": source.name, "split": split, "seed": source.seed, "block": self._batch_sizes[source.name]},
            {"encoder": encoder, "weights": self._weights[self.depth], "precision": str(trainer.precision)},
            {"adapter": self._config["model"]["init_args"]["model"]["init_args"].get("adapter")},
            {"device": trainer.strategy.root_device.type, "dtype": self.settings.dtype},
            {"content": upstream.reads_inputs(model.after_encoder(self.depth))},
            fingerprint.referenced_digests(encoder),
            fingerprint.software_versions(),
        )

    def _complete(self, split: str, wanted: Keys, *, model: JointModel, trainer: Trainer, workers: int) -> None:
        """Compute the missing features of a split, in blocks that are divided among the ranks.

        Args:
            split: the split.
            wanted: by dataset index and view of the samples that are drawn.
            model: the joint model.
            trainer: the running trainer.
            workers: number of processes that read samples.
        """
        state = self._splits[split]
        with ExitStack() as stack:
            todo: list[tuple[str, Block]] = []
            if collectives.is_rank_zero():
                # Rank 0 locks the caches for all ranks.
                for name, drawn in wanted.items():
                    stack.enter_context(cache_lock(state.open[name].folder))
                    # Another run may have computed them while this one waited for the lock.
                    state.open[name] = cache = state.open[name].reopened()
                    missing = state.missing(name, drawn)
                    size = self._batch_sizes[name]
                    todo += [(name, block) for block in blocks(missing, size=size, samples=len(cache.source))]
            todo = collectives.all_gather(todo)[0]
            encoding = Encoding(split, feature_caches=state.open, model=model, trainer=trainer, settings=self.settings)
            given_up = encoding.run(todo[trainer.global_rank :: trainer.world_size], workers=workers, say=_say)
            results = collectives.all_gather((preemption.preemption_flag.received is not None, given_up))
        state.without |= {name for _, names in results for name in names}
        for name, drawn in wanted.items():
            state.open[name] = state.open[name].reopened()
            state.attempted |= {(name, *key) for key in state.open[name].missing(drawn)}
            if name in state.without:
                state.open.pop(name).close()
        if any(preempted for preempted, _ in results):
            raise preemption.Preempted("while features of the frozen encoder were computed")

    def covers(self, split: str, datasets: Collection[str]) -> bool:
        """Whether all these datasets have an open feature cache for a split."""
        return split in self._splits and set(self._splits[split].open) >= set(datasets)

    def close(self) -> None:
        """Close all feature caches, so that they may be deleted when their room is needed."""
        for split in list(self._splits):
            self._close(split)
        self._weights = {}

    def _close(self, split: str) -> list[FeatureCache]:
        caches = list(self._splits.pop(split).open.values())
        for cache in caches:
            cache.close()
        return caches

    def _delete(self, split: str) -> None:
        """Delete the feature caches of a split: more of the encoder trains than before, so they are of no more use."""
        caches = self._close(split)
        collectives.all_gather(None)
        if collectives.is_rank_zero():
            for cache in caches:
                delete_if_unused(cache.folder)


def _say(text: str) -> None:
    if collectives.is_rank_zero():
        print_message(text)
