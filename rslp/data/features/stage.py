"""The frozen stage: while nothing in the encoder trains, each sample is encoded once and read afterwards."""

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
from rslp.data.features import fingerprint
from rslp.data.features.cache import FOLDER, FeatureCache, cache_writer_lock, delete_if_unused
from rslp.data.features.encoding import Block, Encoding, blocks, caching_pays
from rslp.data.features.settings import FeatureSettings
from rslp.data.samples import SampleSource
from rslp.errors import RunError
from rslp.io.terminal import print_message
from rslp.models.joint import JointModel
from rslp.models.optim import Freeze, freeze_callbacks
from rslp.runtime import collectives, preemption

_WHOLE = {"model.encoder", "model.encoder.0"}


def frozen_depth(encoder: Iterable[torch.nn.Module]) -> int:
    """How many of the encoder's modules, from the first, give the same features whenever they are asked.

    Nothing in them trains or is in training mode; a module without parameters ends the row.
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
    """In how many epochs of the run nothing in these modules trains; infinite if the run has no last epoch."""
    last = trainer.max_epochs
    end = math.inf if last is None or last < 0 else float(last)
    parameters = {parameter for module in modules for parameter in module.parameters()}
    thaws: dict[torch.nn.Parameter, int | None] = {}
    for stage in freeze_callbacks(trainer):  # of several stages the last one counts
        thaws |= {p: stage.thaw_at_epoch for p in stage.parameters if p in parameters}
    return min([end, *(float(epoch) for epoch in thaws.values() if epoch is not None)])


def validations(trainer: Trainer, epochs: float) -> float:
    """How often a run validates in so many epochs, about."""
    inside = trainer.val_check_interval
    often = 1 / inside if isinstance(inside, float) and inside > 0 else 1
    return epochs * often / (trainer.check_val_every_n_epoch or 1)


def stays_frozen(config: Mapping[str, Any]) -> bool:
    """Whether a run config freezes the whole encoder and never thaws it: its features serve other heads too."""
    for callback in (config.get("trainer") or {}).get("callbacks") or []:
        name = str(callback.get("class_path", "")).rpartition(".")[2]
        given = callback.get("init_args") or {}
        if name == FreezeUnfreeze.__name__:
            given = Freeze.settings_of(given)
        elif name != Freeze.__name__:
            continue
        modules = given.get("modules", "model.encoder")
        paths = {modules} if isinstance(modules, str) else set(modules)
        if given.get("thaw_at_epoch") is None and paths & _WHOLE:
            return True
    return False


log = logging.getLogger(__name__)

Keys = Mapping[str, list[tuple[int, int]]]
FeatureCaches = Mapping[str, FeatureCache]
# One object for all stages without banks: stages are told apart by identity, and another one costs new workers.
_NONE: FeatureCaches = {}


class DataModuleLike(Protocol):
    """What the stage needs of the data module."""

    batch_sizes: dict[str, int]
    num_workers: int
    seed: int

    def sources(self, split: str) -> Mapping[str, SampleSource]:
        """The samples of a split by dataset."""

    def store_folder(self, name: str) -> Path | None:
        """Where a dataset's store lies."""

    def dataset_config(self, name: str) -> bytes:
        """What is in a dataset's ``config.json``."""


@dataclass
class _SplitCaches:
    """What is open of a split.

    Attributes:
        feature_caches: by dataset.
        without: datasets for which it is not worth it, or for which there is no room.
        tried: samples (dataset, index, view) that were encoded, or can't be.
    """

    feature_caches: dict[str, FeatureCache] = field(default_factory=dict)
    without: set[str] = field(default_factory=set)
    tried: set[tuple[str, int, int]] = field(default_factory=set)

    def settled(self, name: str, views: int | None) -> bool:
        """Whether nothing of a dataset has to be looked for."""
        return name in self.without or (
            name in self.feature_caches and views is not None and self.feature_caches[name].full(views)
        )

    def missing(self, name: str, drawn: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of some samples those that are worth a try."""
        return [key for key in self.feature_caches[name].missing(drawn) if (name, *key) not in self.tried]


class FrozenStage:
    """Keeps the features of a run's frozen encoder.

    Args:
        settings: what a person chose.
    """

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings = settings
        self.depth = 0
        self._config: Mapping[str, Any] | None = None
        self._held: dict[str, _SplitCaches] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._weights: str | None = None

    def describe(self, config: Mapping[str, Any]) -> None:
        """Say from which config the run was made; without it nothing is kept."""
        self._config = config

    def views(self, sources: Mapping[str, SampleSource]) -> dict[str, int | None]:
        """How many views the samples of each dataset have now; None means that each draw is another."""
        if not self.depth:
            return dict.fromkeys(sources)
        return {name: 1 if source.is_deterministic else self.settings.views for name, source in sources.items()}

    def feature_caches(
        self, split: str, *, data: DataModuleLike, trainer: Trainer | None, keys: Callable[[], Keys]
    ) -> FeatureCaches:
        """The banks to read a split's samples from, with what is wanted of them computed first.

        All processes of a run call it at the same places. The same object is returned while nothing has changed.

        Args:
            split: "train", "val" or "test".
            data: the data module.
            trainer: the trainer that is at work.
            keys: gives index and view of all samples that are read next, of all processes, by dataset.

        Raises:
            Preempted: a scheduler wants the machine; what was computed is kept.
        """
        model = None if trainer is None else upstream.model_of(trainer)
        if trainer is None or not isinstance(model, JointModel):
            return _NONE
        # Outside of a training, nothing trains.
        self.depth = frozen_depth(model.encoder) if upstream.is_fitting(trainer) else len(model.encoder)
        if not self.depth:
            self._delete_caches()
            return _NONE
        if not self.settings.keep or self._config is None:
            return _NONE
        return self._banks(split, data=data, trainer=trainer, model=model, keys=keys)

    def _banks(
        self, split: str, *, data: DataModuleLike, trainer: Trainer, model: JointModel, keys: Callable[[], Keys]
    ) -> FeatureCaches:
        held = self._held.setdefault(split, _SplitCaches())
        sources = data.sources(split)
        # Listing all that an epoch draws takes a while; after the first one there is as a rule nothing to look for.
        views = self.views(sources)
        wanted = {} if all(held.settled(name, count) for name, count in views.items()) else keys()
        wanted = {name: drawn for name, drawn in wanted.items() if name not in held.without}
        for name, drawn in wanted.items():
            if name not in held.feature_caches:
                feature_cache = self._open(name, split=split, data=data, trainer=trainer, model=model, draws=len(drawn))
                if feature_cache is None:
                    held.without.add(name)
                else:
                    held.feature_caches[name] = feature_cache
        wanted = {name: drawn for name, drawn in wanted.items() if name in held.feature_caches}
        for name, drawn in wanted.items():
            held.feature_caches[name].learn({view for _, view in drawn})
        if any(collectives.all_gather(any(held.missing(name, drawn) for name, drawn in wanted.items()))):
            held.feature_caches = dict(held.feature_caches)
            work = {name: (held.feature_caches[name], sources[name], drawn) for name, drawn in sorted(wanted.items())}
            self._complete(split, work, data=data, trainer=trainer, model=model)
        return held.feature_caches

    def _open(
        self, name: str, *, split: str, data: DataModuleLike, trainer: Trainer, model: JointModel, draws: int
    ) -> FeatureCache | None:
        """The bank of a dataset and split, if it is worth it or there is one already."""
        source, folder = data.sources(split)[name], data.store_folder(name)
        fingerprints = source.fingerprints()
        if folder is None or fingerprints is None:
            return None
        views = self.views({name: source})[name]
        worth = views is not None and self._caching_pays(
            split, source, views=views, draws=draws, trainer=trainer, model=model
        )
        if not worth and not (folder / FOLDER).exists():
            return None
        place = folder / FOLDER / self._name(name, split=split, data=data, trainer=trainer, model=model)
        if not worth and not place.exists():
            return None
        try:
            return FeatureCache(place, source=source, fingerprints=fingerprints, depth=self.depth)
        except (OSError, RunError) as error:
            log.warning("%s %s: features of the frozen encoder are not kept: %s", name, split, error)
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

    def _name(self, name: str, *, split: str, data: DataModuleLike, trainer: Trainer, model: JointModel) -> str:
        """The fingerprint of a dataset's features."""
        if (name, split) not in self._names:
            config = self._config or {}
            dataset = config["data"]["init_args"]["data_modules"][name]
            encoder = config["model"]["init_args"]["model"]["init_args"]["encoder"][: self.depth]
            if self._weights is None:
                self._weights = fingerprint.weights_digest(model.encoder[: self.depth])
            self._names[name, split] = fingerprint.json_fingerprint(
                fingerprint.of_dataset(dataset, config=data.dataset_config(name)),
                {"name": name, "split": split, "seed": data.seed, "block": data.batch_sizes[name]},
                {"encoder": encoder, "weights": self._weights, "precision": str(trainer.precision)},
                {"device": trainer.strategy.root_device.type, "dtype": self.settings.dtype},
                {"content": upstream.reads_inputs(model.after_encoder(self.depth))},
                fingerprint.referenced_digests(encoder),
                fingerprint.software_versions(),
            )
        return self._names[name, split]

    def _complete(
        self,
        split: str,
        work: Mapping[str, tuple[FeatureCache, SampleSource, list[tuple[int, int]]]],
        *,
        data: DataModuleLike,
        trainer: Trainer,
        model: JointModel,
    ) -> None:
        """Compute what is missing, shared out among the processes."""
        first, held = collectives.is_rank_zero(), self._held[split]
        with ExitStack() as stack:
            for feature_cache, _, _ in work.values():
                stack.enter_context(cache_writer_lock(feature_cache.folder, first=first))
            told: list[tuple[str, Block]] = []
            if first:
                for name, (feature_cache, source, drawn) in work.items():
                    # Another run may have computed it while this one waited.
                    feature_cache.look({view for _, view in drawn})
                    lost = blocks(held.missing(name, drawn), size=data.batch_sizes[name], samples=len(source))
                    told += [(name, block) for block in lost]
            told = collectives.all_gather(told)[0]
            feature_caches = {name: feature_cache for name, (feature_cache, _, _) in work.items()}
            encoding = Encoding(
                split,
                feature_caches=feature_caches,
                sources=data.sources(split),
                model=model,
                depth=self.depth,
                settings=self.settings,
            )
            mine = told[trainer.global_rank :: trainer.world_size]
            full = encoding.run(mine, trainer=trainer, workers=data.num_workers, say=_say)
            notices = collectives.all_gather((preemption.preemption_flag.received is not None, full))
        for name, (feature_cache, _, drawn) in work.items():
            feature_cache.look({view for _, view in drawn})
            held.tried |= {(name, *key) for key in feature_cache.missing(drawn)}
        held.without |= {name for _, names in notices for name in names}
        for name in sorted(held.without & set(held.feature_caches)):
            held.feature_caches.pop(name).close()
        if any(asked for asked, _ in notices):
            raise preemption.Preempted("while features of the frozen encoder were computed")

    def covers(self, split: str, datasets: Collection[str]) -> bool:
        """Whether features of all these datasets are kept now."""
        return split in self._held and set(self._held[split].feature_caches) >= set(datasets)

    def close(self) -> None:
        """Let go of what is kept, so that it may be deleted when its room is needed."""
        for held in self._held.values():
            for feature_cache in held.feature_caches.values():
                feature_cache.close()
        self._held, self._names, self._weights = {}, {}, None

    def _delete_caches(self) -> None:
        """The encoder trains again: what was kept is of no use any more."""
        if not self._held:
            return
        folders = [
            feature_cache.folder for held in self._held.values() for feature_cache in held.feature_caches.values()
        ]
        self.close()
        collectives.all_gather(None)
        if collectives.is_rank_zero():
            for folder in folders:
                delete_if_unused(folder)


def _say(text: str) -> None:
    if collectives.is_rank_zero():
        print_message(text)
