"""The frozen stage: while nothing in the encoder trains, each sample is encoded once and read afterwards."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Trainer

from rslp.errors import RunError
from rslp.train import adapters, collectives, preemption
from rslp.train.features import fingerprint
from rslp.train.features.bank import FOLDER, FeatureBank, dropped, written_by_one
from rslp.train.features.encoding import Encoding
from rslp.train.features.frozen import frozen_depth, frozen_epochs, stays_frozen, validations
from rslp.train.features.plan import Block, blocks, pays
from rslp.train.features.settings import FeatureSettings
from rslp.train.model import JointModel
from rslp.train.samples import SampleSource

log = logging.getLogger(__name__)

Keys = Mapping[str, list[tuple[int, int]]]
Banks = Mapping[str, FeatureBank]
# One object for all stages without banks: stages are told apart by identity, and another one costs new workers.
_NONE: Banks = {}


class Data(Protocol):
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
class _Held:
    """What is open of a split.

    Attributes:
        banks: by dataset.
        without: datasets for which it is not worth it, or for which there is no room.
        tried: samples (dataset, index, view) that were encoded, or can't be.
    """

    banks: dict[str, FeatureBank] = field(default_factory=dict)
    without: set[str] = field(default_factory=set)
    tried: set[tuple[str, int, int]] = field(default_factory=set)

    def settled(self, name: str, views: int | None) -> bool:
        """Whether nothing of a dataset has to be looked for."""
        return name in self.without or (name in self.banks and views is not None and self.banks[name].full(views))

    def missing(self, name: str, drawn: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of some samples those that are worth a try."""
        return [key for key in self.banks[name].missing(drawn) if (name, *key) not in self.tried]


class FrozenStage:
    """Keeps the features of a run's frozen encoder.

    Args:
        settings: what a person chose.
    """

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings = settings
        self.depth = 0
        self._config: Mapping[str, Any] | None = None
        self._held: dict[str, _Held] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._weights: str | None = None

    def describe(self, config: Mapping[str, Any]) -> None:
        """Say from which config the run was made; without it nothing is kept."""
        self._config = config

    def views(self, sources: Mapping[str, SampleSource]) -> dict[str, int | None]:
        """How many views the samples of each dataset have now; None means that each draw is another."""
        if not self.depth:
            return dict.fromkeys(sources)
        return {name: 1 if source.fixed else self.settings.views for name, source in sources.items()}

    def banks(self, split: str, *, data: Data, trainer: Trainer | None, keys: Callable[[], Keys]) -> Banks:
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
        model = None if trainer is None else adapters.model_of(trainer)
        if trainer is None or not isinstance(model, JointModel):
            return _NONE
        # Outside of a training, nothing trains.
        self.depth = frozen_depth(model.encoder) if adapters.is_fitting(trainer) else len(model.encoder)
        if not self.depth:
            self._drop()
            return _NONE
        if not self.settings.keep or self._config is None:
            return _NONE
        return self._banks(split, data=data, trainer=trainer, model=model, keys=keys)

    def _banks(self, split: str, *, data: Data, trainer: Trainer, model: JointModel, keys: Callable[[], Keys]) -> Banks:
        held = self._held.setdefault(split, _Held())
        sources = data.sources(split)
        # Listing all that an epoch draws takes a while; after the first one there is as a rule nothing to look for.
        views = self.views(sources)
        wanted = {} if all(held.settled(name, count) for name, count in views.items()) else keys()
        wanted = {name: drawn for name, drawn in wanted.items() if name not in held.without}
        for name, drawn in wanted.items():
            if name not in held.banks:
                bank = self._open(name, split=split, data=data, trainer=trainer, model=model, draws=len(drawn))
                if bank is None:
                    held.without.add(name)
                else:
                    held.banks[name] = bank
        wanted = {name: drawn for name, drawn in wanted.items() if name in held.banks}
        for name, drawn in wanted.items():
            held.banks[name].learn({view for _, view in drawn})
        if any(collectives.gathered(any(held.missing(name, drawn) for name, drawn in wanted.items()))):
            held.banks = dict(held.banks)
            work = {name: (held.banks[name], sources[name], drawn) for name, drawn in sorted(wanted.items())}
            self._complete(split, work, data=data, trainer=trainer, model=model)
        return held.banks

    def _open(
        self, name: str, *, split: str, data: Data, trainer: Trainer, model: JointModel, draws: int
    ) -> FeatureBank | None:
        """The bank of a dataset and split, if it is worth it or there is one already."""
        source, folder = data.sources(split)[name], data.store_folder(name)
        prints = source.prints()
        if folder is None or prints is None:
            return None
        views = self.views({name: source})[name]
        worth = views is not None and self._pays(split, source, views=views, draws=draws, trainer=trainer, model=model)
        if not worth and not (folder / FOLDER).exists():
            return None
        place = folder / FOLDER / self._name(name, split=split, data=data, trainer=trainer, model=model)
        if not worth and not place.exists():
            return None
        try:
            return FeatureBank(place, source=source, prints=prints, depth=self.depth)
        except (OSError, RunError) as error:
            log.warning("%s %s: features of the frozen encoder are not kept: %s", name, split, error)
            return None

    def _pays(
        self, split: str, source: SampleSource, *, views: int, draws: int, trainer: Trainer, model: JointModel
    ) -> bool:
        if adapters.is_fitting(trainer):
            epochs = frozen_epochs(trainer, model.encoder[: self.depth])
            times = epochs if split == "train" else validations(trainer, epochs)
        else:
            times = math.inf if self._config is not None and stays_frozen(self._config) else 1
        return pays(samples=len(source), views=views, draws=draws * times)

    def _name(self, name: str, *, split: str, data: Data, trainer: Trainer, model: JointModel) -> str:
        """The fingerprint of a dataset's features."""
        if (name, split) not in self._names:
            config = self._config or {}
            dataset = config["data"]["init_args"]["data_modules"][name]
            encoder = config["model"]["init_args"]["model"]["init_args"]["encoder"][: self.depth]
            if self._weights is None:
                self._weights = fingerprint.weights(model.encoder[: self.depth])
            self._names[name, split] = fingerprint.fingerprint(
                fingerprint.of_dataset(dataset, config=data.dataset_config(name)),
                {"name": name, "split": split, "seed": data.seed, "block": data.batch_sizes[name]},
                {"encoder": encoder, "weights": self._weights, "precision": str(trainer.precision)},
                {"device": trainer.strategy.root_device.type, "dtype": self.settings.dtype},
                {"content": adapters.reads_inputs(model.after_encoder(self.depth))},
                fingerprint.named_by(encoder),
                fingerprint.software(),
            )
        return self._names[name, split]

    def _complete(
        self,
        split: str,
        work: Mapping[str, tuple[FeatureBank, SampleSource, list[tuple[int, int]]]],
        *,
        data: Data,
        trainer: Trainer,
        model: JointModel,
    ) -> None:
        """Compute what is missing, shared out among the processes."""
        first, held = collectives.first(), self._held[split]
        with ExitStack() as stack:
            for bank, _, _ in work.values():
                stack.enter_context(written_by_one(bank.folder, first=first))
            told: list[tuple[str, Block]] = []
            if first:
                for name, (bank, source, drawn) in work.items():
                    # Another run may have computed it while this one waited.
                    bank.look({view for _, view in drawn})
                    lost = blocks(held.missing(name, drawn), size=data.batch_sizes[name], samples=len(source))
                    told += [(name, block) for block in lost]
            told = collectives.gathered(told)[0]
            banks = {name: bank for name, (bank, _, _) in work.items()}
            encoding = Encoding(
                split, banks=banks, sources=data.sources(split), model=model, depth=self.depth, settings=self.settings
            )
            mine = told[trainer.global_rank :: trainer.world_size]
            full = encoding.run(mine, trainer=trainer, workers=data.num_workers, say=_say)
            notices = collectives.gathered((preemption.notice.received is not None, full))
        for name, (bank, _, drawn) in work.items():
            bank.look({view for _, view in drawn})
            held.tried |= {(name, *key) for key in bank.missing(drawn)}
        held.without |= {name for _, names in notices for name in names}
        for name in sorted(held.without & set(held.banks)):
            held.banks.pop(name).close()
        if any(asked for asked, _ in notices):
            raise preemption.Preempted("while features of the frozen encoder were computed")

    def covers(self, split: str, datasets: Collection[str]) -> bool:
        """Whether features of all these datasets are kept now."""
        return split in self._held and set(self._held[split].banks) >= set(datasets)

    def close(self) -> None:
        """Let go of what is kept, so that it may be deleted when its room is needed."""
        for held in self._held.values():
            for bank in held.banks.values():
                bank.close()
        self._held, self._names, self._weights = {}, {}, None

    def _drop(self) -> None:
        """The encoder trains again: what was kept is of no use any more."""
        if not self._held:
            return
        folders = [bank.folder for held in self._held.values() for bank in held.banks.values()]
        self.close()
        collectives.gathered(None)
        if collectives.first():
            for folder in folders:
                dropped(folder)


def _say(text: str) -> None:
    if collectives.first():
        sys.stderr.write(text + "\n")
