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
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from rslearn.train.callbacks.freeze_unfreeze import FreezeUnfreeze

from rslp import upstream
from rslp.data.cache.cache import cache_lock
from rslp.data.features import fingerprint
from rslp.data.features.cache import FOLDER, FeatureCache, delete_if_unused
from rslp.data.features.encoding import Block, Encoding, blocks, caching_pays
from rslp.data.features.settings import FeatureSettings
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
FeatureCaches = Mapping[str, FeatureCache]
# A loader starts new workers when it is given another object than before, so that "none" has to be one object, too.
_NO_CACHES: FeatureCaches = {}


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


class DataModuleLike(Protocol):
    """The part of the data module that ``FrozenStage`` uses."""

    batch_sizes: dict[str, int]
    num_workers: int
    seed: int

    def sources(self, split: str) -> Mapping[str, SampleSource]:
        """The samples of a split by dataset."""

    def cache_folder(self, name: str) -> Path | None:
        """The folder of a dataset's sample cache; None if it has none."""

    def dataset_config(self, name: str) -> bytes:
        """The content of a dataset's ``config.json``."""


@dataclass
class _SplitCaches:
    """The open feature caches of a split.

    Attributes:
        feature_caches: by dataset.
        without: datasets without one: caching does not pay, the features can't be cached, or there is no room.
        attempted: samples (dataset, index, view) that could not be encoded, mostly bad ones; not tried again.
    """

    feature_caches: dict[str, FeatureCache] = field(default_factory=dict)
    without: set[str] = field(default_factory=set)
    attempted: set[tuple[str, int, int]] = field(default_factory=set)

    def is_complete(self, name: str, views: int | None) -> bool:
        """Whether no sample of a dataset can be missing: it has no feature cache, or one with all samples and views."""
        return name in self.without or (
            name in self.feature_caches and views is not None and self.feature_caches[name].has_all_views(views)
        )

    def missing(self, name: str, drawn: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of the drawn samples (index and view) that are neither cached nor attempted."""
        return [key for key in self.feature_caches[name].missing(drawn) if (name, *key) not in self.attempted]


class FrozenStage:
    """Opens and fills the feature caches of a run while its encoder, or the first modules of it, are frozen.

    Args:
        settings: the user's choices.

    Attributes:
        depth: how many of the encoder's first modules are frozen at present, see ``frozen_depth``.
    """

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings = settings
        self.depth = 0
        self._config: Mapping[str, Any] | None = None
        self._caches_by_split: dict[str, _SplitCaches] = {}
        self._fingerprints: dict[tuple[str, str], str] = {}
        self._weights: str | None = None

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
        self, split: str, *, data: DataModuleLike, trainer: Trainer | None, keys: Callable[[], Keys]
    ) -> FeatureCaches:
        """The feature caches of a split by dataset, opened, after missing features were computed.

        All ranks have to call it at the same points, since they wait for each other. The same object is returned while
        nothing has changed.

        Args:
            split: "train", "val" or "test".
            data: the data module.
            trainer: the running trainer.
            keys: gives by dataset index and view of all samples that all ranks read in the coming epoch.

        Raises:
            Preempted: the job was asked to stop; features computed so far are on disk.
        """
        model = None if trainer is None else upstream.model_of(trainer)
        if trainer is None or not isinstance(model, JointModel):
            return _NO_CACHES
        # In validation, test and prediction nothing trains.
        self.depth = frozen_depth(model.encoder) if upstream.is_fitting(trainer) else len(model.encoder)
        if not self.depth:
            self._delete_caches()
            return _NO_CACHES
        if not self.settings.keep or self._config is None:
            return _NO_CACHES
        return self._caches_of_split(split, data=data, trainer=trainer, model=model, keys=keys)

    def _caches_of_split(
        self, split: str, *, data: DataModuleLike, trainer: Trainer, model: JointModel, keys: Callable[[], Keys]
    ) -> FeatureCaches:
        caches = self._caches_by_split.setdefault(split, _SplitCaches())
        sources = data.sources(split)
        # Listing all that an epoch draws takes a while, and after the first epoch hardly anything is missing.
        views = self.views(sources)
        wanted = {} if all(caches.is_complete(name, count) for name, count in views.items()) else keys()
        wanted = {name: drawn for name, drawn in wanted.items() if name not in caches.without}
        for name, drawn in wanted.items():
            if name not in caches.feature_caches:
                opened = self._open(name, split=split, data=data, trainer=trainer, model=model, draws=len(drawn))
                if opened is None:
                    caches.without.add(name)
                else:
                    caches.feature_caches[name] = opened
        wanted = {name: drawn for name, drawn in wanted.items() if name in caches.feature_caches}
        for name, drawn in wanted.items():
            caches.feature_caches[name].load_views({view for _, view in drawn})
        if any(collectives.all_gather(any(caches.missing(name, drawn) for name, drawn in wanted.items()))):
            # A new object: the loader then makes new workers, which see the new features.
            caches.feature_caches = dict(caches.feature_caches)
            work = {name: (caches.feature_caches[name], sources[name], drawn) for name, drawn in sorted(wanted.items())}
            self._complete(split, work, data=data, trainer=trainer, model=model)
        return caches.feature_caches

    def _open(
        self, name: str, *, split: str, data: DataModuleLike, trainer: Trainer, model: JointModel, draws: int
    ) -> FeatureCache | None:
        """Open the feature cache of a dataset and split; None unless caching pays or the cache exists already.

        Args:
            name: the dataset's key.
            split: the split.
            data: the data module.
            trainer: the running trainer.
            model: the joint model.
            draws: how many samples of the dataset all ranks together read in an epoch.
        """
        source, folder = data.sources(split)[name], data.cache_folder(name)
        fingerprints = source.fingerprints()
        if folder is None or fingerprints is None:
            return None
        views = self.views({name: source})[name]
        pays = views is not None and self._caching_pays(
            split, source, views=views, draws=draws, trainer=trainer, model=model
        )
        if not pays and not (folder / FOLDER).exists():
            return None
        path = folder / FOLDER / self._fingerprint(name, split=split, data=data, trainer=trainer, model=model)
        if not pays and not path.exists():
            return None
        try:
            return FeatureCache(path, source=source, fingerprints=fingerprints, depth=self.depth)
        except (OSError, RunError) as error:
            log.warning("%s %s: features of the frozen encoder are not cached: %s", name, split, error)
            return None

    def _caching_pays(
        self, split: str, source: SampleSource, *, views: int, draws: int, trainer: Trainer, model: JointModel
    ) -> bool:
        if upstream.is_fitting(trainer):
            epochs = frozen_epochs(trainer, model.encoder[: self.depth])
            times = epochs if split == "train" else validations(trainer, epochs)
        else:
            times = math.inf if self._config is not None and stays_frozen(self._config) else 1
        return caching_pays(samples=len(source), views=views, draws=draws * times)

    def _fingerprint(self, name: str, *, split: str, data: DataModuleLike, trainer: Trainer, model: JointModel) -> str:
        """The fingerprint of all that a dataset's features depend on besides its windows."""
        if (name, split) not in self._fingerprints:
            config = self._config or {}
            dataset = config["data"]["init_args"]["data_modules"][name]
            encoder = config["model"]["init_args"]["model"]["init_args"]["encoder"][: self.depth]
            if self._weights is None:
                self._weights = fingerprint.weights_digest(model.encoder[: self.depth])
            self._fingerprints[name, split] = fingerprint.json_fingerprint(
                fingerprint.of_dataset(dataset, config=data.dataset_config(name)),
                {"name": name, "split": split, "seed": data.seed, "block": data.batch_sizes[name]},
                {"encoder": encoder, "weights": self._weights, "precision": str(trainer.precision)},
                {"device": trainer.strategy.root_device.type, "dtype": self.settings.dtype},
                {"content": upstream.reads_inputs(model.after_encoder(self.depth))},
                fingerprint.referenced_digests(encoder),
                fingerprint.software_versions(),
            )
        return self._fingerprints[name, split]

    def _complete(
        self,
        split: str,
        work: Mapping[str, tuple[FeatureCache, SampleSource, list[tuple[int, int]]]],
        *,
        data: DataModuleLike,
        trainer: Trainer,
        model: JointModel,
    ) -> None:
        """Compute the missing features of a split.

        They are encoded in blocks (see ``Block``), which are divided among the ranks.

        Args:
            split: the split.
            work: for each dataset its feature cache, its samples, and index and view of those that are drawn.
            data: the data module.
            trainer: the running trainer.
            model: the joint model.
        """
        is_rank_zero, caches = collectives.is_rank_zero(), self._caches_by_split[split]
        with ExitStack() as stack:
            todo: list[tuple[str, Block]] = []
            if is_rank_zero:
                # Rank 0 locks the caches for all ranks.
                for feature_cache, _, _ in work.values():
                    stack.enter_context(cache_lock(feature_cache.folder))
                for name, (feature_cache, source, drawn) in work.items():
                    # Another run may have computed them while this one waited for the lock.
                    feature_cache.reload_views({view for _, view in drawn})
                    missing = caches.missing(name, drawn)
                    todo += [(name, b) for b in blocks(missing, size=data.batch_sizes[name], samples=len(source))]
            todo = collectives.all_gather(todo)[0]
            encoding = Encoding(
                split,
                feature_caches={name: feature_cache for name, (feature_cache, _, _) in work.items()},
                sources=data.sources(split),
                model=model,
                depth=self.depth,
                settings=self.settings,
            )
            own_blocks = todo[trainer.global_rank :: trainer.world_size]
            given_up = encoding.run(own_blocks, trainer=trainer, workers=data.num_workers, say=_say)
            results = collectives.all_gather((preemption.preemption_flag.received is not None, given_up))
        for name, (feature_cache, _, drawn) in work.items():
            feature_cache.reload_views({view for _, view in drawn})
            caches.attempted |= {(name, *key) for key in feature_cache.missing(drawn)}
        caches.without |= {name for _, names in results for name in names}
        for name in sorted(caches.without & set(caches.feature_caches)):
            caches.feature_caches.pop(name).close()
        if any(preempted for preempted, _ in results):
            raise preemption.Preempted("while features of the frozen encoder were computed")

    def covers(self, split: str, datasets: Collection[str]) -> bool:
        """Whether all these datasets have an open feature cache for a split."""
        return split in self._caches_by_split and set(self._caches_by_split[split].feature_caches) >= set(datasets)

    def close(self) -> None:
        """Close all feature caches, so that they may be deleted when their room is needed."""
        for feature_cache in self._open_caches():
            feature_cache.close()
        self._caches_by_split, self._fingerprints, self._weights = {}, {}, None

    def _open_caches(self) -> list[FeatureCache]:
        return [cache for caches in self._caches_by_split.values() for cache in caches.feature_caches.values()]

    def _delete_caches(self) -> None:
        """Delete the feature caches of this run: the encoder trains again, so they are of no more use."""
        if not self._caches_by_split:
            return
        folders = [feature_cache.folder for feature_cache in self._open_caches()]
        self.close()
        collectives.all_gather(None)
        if collectives.is_rank_zero():
            for folder in folders:
                delete_if_unused(folder)


def _say(text: str) -> None:
    if collectives.is_rank_zero():
        print_message(text)
