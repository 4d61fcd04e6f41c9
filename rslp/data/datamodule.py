"""The joint data module: several rslearn datasets, one dataset per batch, one or more batches per optimiser step."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from rslearn.train.data_module import RslearnDataModule
from torch.utils.data import DataLoader

from rslp import upstream
from rslp.data.bad_samples import BadSamplePolicy, BadSampleRecord, OnFault
from rslp.data.batches import Batch, BatchKey, FeatureCaches, JointDataset, StagedLoader, StepSampler
from rslp.data.cache.cache import SampleCache, SampleCacheSettings, open_sample_cache
from rslp.data.dataset_arguments import refuse_datasets
from rslp.data.features.cache import FeatureSettings
from rslp.data.features.stage import FrozenStage, Keys
from rslp.data.mixture import mixture
from rslp.data.mixture.sampling import Sampling
from rslp.data.samples import SampleSource, open_dataset
from rslp.data.sampling import balanced_datasets, sampling_of
from rslp.errors import ConfigError, DataError, Problem
from rslp.io.terminal import print_message
from rslp.runtime import collectives
from rslp.runtime.children import FORKED
from rslp.runtime.slow_reads import slow_read_watch
from rslp.runtime.world import read_world
from rslp.upstream.task_kinds import tasks_by_name

_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
_DATA_KEY = "data.init_args"
Steps = Callable[[], Iterator[list[BatchKey]]]


class MultiDatasetDataModule(L.LightningDataModule):
    """Samples of several datasets, mixed batch by batch; an item of its loaders is the list of a step's batches.

    Args:
        data_modules: the datasets by key, each as rslearn's data module (path, inputs, task, splits).
        num_workers: processes that read samples; 0 reads in the training process. None means one per processor beyond
            the first, 8 at most, of the processors that each training process of the machine has.
        sample_mode: how the next dataset is chosen, see ``rslp.data.mixture.settings.Mixture``.
        batch_sizes: samples per batch and process: one number for all, or by dataset; None means each dataset's own.
        class_balanced: whether training draws samples of each class equally often, for all datasets or by dataset.
        refill_batches: an epoch ends when the longest dataset has been gone through, shorter ones being drawn again;
            the same as ``stop: longest``.
        per_dataset_patch_limit: the largest number of samples of a dataset in a training epoch, over all processes:
            one number for all datasets, or a number for some.
        steps_per_dataset: number of consecutive batches of one dataset in mode ``reptile``.
        disabled_datasets: keys of datasets that are left out.
        weights: relative shares by dataset, for mode ``weights``.
        temperature: T of mode ``temperature``: shares are proportional to n^(1/T).
        steps_per_epoch: a fixed number of optimiser steps per epoch instead of the datasets' lengths.
        datasets_per_step: how many different datasets give one batch each to an optimiser step.
        stop: when an epoch ends: ``all`` (default): every dataset has been gone through once; ``shortest``: the first
            dataset is used up; ``longest``: the last one is, shorter ones being drawn again.
        on_fault: what is done about a bad sample: ``stop``, or ``skip``, which draws another one in its place in
            training and leaves it out of an evaluation.
        max_faults: number of different samples that may be skipped in each process; one more ends the run.
        read_timeout: seconds after which a read is given up and its sample counts as bad; null waits for ever. A read
            that takes a minute is reported in any case.
        store: where the sample caches lie: ``auto`` (beside each dataset, or in the cache folder if that can't be
            written), ``off`` (no cache: read the datasets each time), or a folder.
        store_limit_gb: GB that one dataset's sample cache may take; never more than half of the free disk.
        frozen_views: number of fixed views from which a sample is drawn while the encoder is frozen, so that its
            features can be cached; null draws a new view each time.
        features: whether the features of a frozen encoder are cached on disk: ``auto``, where fewer samples are
            encoded that way, or ``off``.
        features_dtype: floating point type in which features are stored.
        features_limit_gb: GB that the features of one dataset may take; never more than half of the free disk.
        check_allow: by dataset the ids of the check's findings that count as warnings there; no effect on training.

    Raises:
        ConfigError: no dataset, an option that names an absent dataset, or a dataset that can't be trained on.
    """

    def __init__(
        self,
        data_modules: dict[str, RslearnDataModule],
        num_workers: int | None = None,
        sample_mode: Literal[
            "random", "cycle", "random_cycle", "reptile", "proportional", "temperature", "weights"
        ] = "random_cycle",
        batch_sizes: int | dict[str, int] | None = None,
        refill_batches: bool = False,
        per_dataset_patch_limit: int | dict[str, int] | None = None,
        steps_per_dataset: int | None = None,
        disabled_datasets: list[str] | None = None,
        weights: dict[str, float] | None = None,
        temperature: float | None = None,
        steps_per_epoch: int | None = None,
        datasets_per_step: int = 1,
        stop: Literal["all", "shortest", "longest"] | None = None,
        on_fault: OnFault = "stop",
        max_faults: int = 100,
        read_timeout: float | None = None,
        store: str | bool = "auto",
        store_limit_gb: float | None = None,
        frozen_views: int | None = 1,
        features: Literal["auto", "off"] | bool = "auto",
        features_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        features_limit_gb: float | None = None,
        check_allow: dict[str, list[str]] | None = None,
        class_balanced: bool | dict[str, bool] = False,
    ) -> None:
        super().__init__()
        named = {
            "disabled_datasets": disabled_datasets,
            "batch_sizes": batch_sizes,
            "per_dataset_patch_limit": per_dataset_patch_limit,
            "check_allow": check_allow,
            "class_balanced": class_balanced,
        }
        for option, value in named.items():
            _refuse_absent(option, value, known=sorted(data_modules))
        disabled = set(disabled_datasets or [])
        self.data_modules = {name: dm for name, dm in sorted(data_modules.items()) if name not in disabled}
        if not self.data_modules:
            raise ConfigError(Problem("no dataset is left to train on", key=f"{_DATA_KEY}.data_modules"))
        refuse_datasets(self.data_modules)
        self._balanced = balanced_datasets(class_balanced, self.data_modules)
        self.num_workers = _spare_processors() if num_workers is None else num_workers
        self.batch_sizes = {
            name: batch_sizes if isinstance(batch_sizes, int) else (batch_sizes or {}).get(name, dm.batch_size)
            for name, dm in self.data_modules.items()
        }
        self.mixture = mixture.Mixture(
            mode=sample_mode,
            stop=_stop(stop, refill=refill_batches),
            steps_per_epoch=steps_per_epoch,
            temperature=temperature,
            weights=weights,
            limits=_without(per_dataset_patch_limit, disabled),
            steps_per_dataset=steps_per_dataset,
            datasets_per_step=datasets_per_step,
        )
        self.bad_sample_record = BadSampleRecord(BadSamplePolicy(on_fault, max_faults, read_timeout))
        self.cache_settings = SampleCacheSettings(
            store=_word(store), limit=_bytes(store_limit_gb), read_timeout=read_timeout
        )
        limit = _bytes(features_limit_gb)
        features_settings = FeatureSettings(frozen_views, _word(features) == "auto", features_dtype, limit)
        self.frozen = FrozenStage(features_settings, self.batch_sizes)
        self._sample_caches: dict[str, SampleCache | None] = {}
        # Set from the run config's top-level `seed` before training starts.
        self.seed = 0
        # Set from the model: the tasks whose class 0 is background, which no object can have.
        self.background: Set[str] = frozenset()
        self._sources: dict[str, dict[str, SampleSource]] = {}
        self._samplings: dict[str, Sampling | None] = {}
        self._loaders: list[StagedLoader] = []
        self._predicted: Mapping[str, Collection[tuple[str, str]]] = {}

    def accumulate(self, rounds: int) -> None:
        """Set how many rounds of batches make an optimiser step, from a config's ``accumulate_grad_batches``.

        Raises:
            ConfigError: ``rounds`` is not a whole number of at least 1.
        """
        self.mixture = replace(self.mixture, accumulate=rounds)

    def tasks(self) -> dict[str, list[str]]:
        """The names of each dataset's tasks."""
        return {name: list(tasks_by_name(dm.task, name)) for name, dm in self.data_modules.items()}

    def setup(self, stage: str) -> None:
        """List the samples of the stage's splits.

        Raises:
            DataError: a dataset is missing, broken, or has no window in a split that is needed.
        """
        for split in _SPLITS[stage]:
            self.sources(split)

    def sources(self, split: str) -> Mapping[str, SampleSource]:
        """The samples of a split by dataset, listed once."""
        if split not in self._sources:
            self._sources[split] = {
                name: SampleSource(
                    name,
                    data_module=dm,
                    split=split,
                    seed=self.seed,
                    # A prediction reads each window once: caching it would cost more than it saves.
                    sample_cache=None if split == "predict" else self.sample_cache(name),
                    read_timeout=self.bad_sample_record.policy.read_timeout,
                )
                for name, dm in self.data_modules.items()
            }
        for source in self._sources[split].values():
            source.background = self.background
        return self._sources[split]

    def sample_cache(self, name: str) -> SampleCache | None:
        """A dataset's sample cache, opened once; None if it has none.

        Raises:
            DataError: the dataset is missing or broken.
        """
        if name not in self._sample_caches:
            module = self.data_modules[name]
            dataset = open_dataset(name, module)
            with slow_read_watch.over(f"dataset {name!r}: the list of its windows"):
                self._sample_caches[name] = open_sample_cache(
                    name, dataset=dataset, inputs=module.inputs, settings=self.cache_settings
                )
        return self._sample_caches[name]

    @contextmanager
    def only(self, dataset: str) -> Iterator[None]:
        """In this block the data module has one of its datasets alone."""
        before = self.data_modules, self.batch_sizes, self._sources
        self.data_modules = {dataset: self.data_modules[dataset]}
        self.batch_sizes = {dataset: self.batch_sizes[dataset]}
        self._sources = {split: {dataset: sources[dataset]} for split, sources in self._sources.items()}
        try:
            yield
        finally:
            self.data_modules, self.batch_sizes, self._sources = before

    def sizes(self, split: str) -> dict[str, int]:
        """Number of samples by dataset."""
        return {name: len(source) for name, source in self.sources(split).items()}

    def samplings(self) -> dict[str, Sampling]:
        """How training samples are drawn, by dataset; those that draw each sample once in a pass are left out.

        Raises:
            DataError: see ``sampling_of``.
        """
        for name, source in self.sources("train").items():
            if name not in self._samplings:
                skip = self.bad_sample_record.policy.skips_bad_samples
                self._samplings[name] = sampling_of(source, balanced=name in self._balanced, skip=skip, say=_say)
        return {name: sampling for name in self.data_modules if (sampling := self._samplings[name]) is not None}

    def steps(self) -> int:
        """Optimiser steps of a training epoch."""
        return self._epoch(0).steps

    def train_dataloader(self) -> StagedLoader:
        """Optimiser steps of the mixture; an iterator begins at the run's present position, also inside an epoch."""
        self.setup("fit")
        return self._loader("train", self.steps(), self._training_steps, self._training_keys)

    def val_dataloader(self) -> StagedLoader:
        """Every validation sample exactly once, over all processes."""
        return self.evaluation_dataloader("val")

    def test_dataloader(self) -> StagedLoader:
        """Every test sample exactly once, over all processes."""
        return self.evaluation_dataloader("test")

    def predict_test_split(self, datasets: Iterable[str]) -> None:
        """Predict the windows of the test split in these datasets, which have no ``predict_config``."""
        for name in datasets:
            splits = self.data_modules[name].split_configs
            splits["predict"] = splits["test"]

    def leave_out(self, predicted: Mapping[str, Collection[tuple[str, str]]]) -> None:
        """Leave windows that are predicted already (group and name, by dataset) out of the prediction."""
        self._predicted = predicted

    def predict_dataloader(self) -> DataLoader[object]:
        """Every sample of the windows that are not predicted yet, once, window by window; an item has one batch."""
        left = {
            name: [i for i in range(len(source)) if source.window(i) not in self._predicted.get(name, ())]
            for name, source in self.sources("predict").items()
        }
        plan = mixture.plan_evaluation({name: len(indices) for name, indices in left.items()}, self.batch_sizes)
        steps = [[BatchKey.of(batch).among(left[batch.dataset])] for batch in plan]
        return self._stage_loader("predict", StepSampler(len(steps), lambda: iter(steps)), {})

    def evaluation_dataloader(self, split: str) -> StagedLoader:
        """Every sample of a split exactly once over all processes, dataset by dataset; an item has one batch."""
        world, rank = self._ranks()
        plan = mixture.plan_evaluation(self.sizes(split), self.batch_sizes, world=world, rank=rank)
        steps = [[BatchKey.of(batch)] for batch in plan]
        keys = {name: [(index, 0) for index in range(size)] for name, size in self.sizes(split).items()}
        return self._loader(split, len(steps), lambda: iter(steps), lambda: keys)

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        """End the reading workers and close the feature caches."""
        self.frozen.close()
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()

    def on_before_batch_transfer(self, batch: list[Batch], dataloader_idx: int) -> list[Batch]:  # noqa: ARG002
        """Record bad samples, in the order of training, however far workers read ahead.

        Raises:
            DataError: the policy is to stop, too many were skipped, or no good sample could be read for a batch.
        """
        for part in batch:
            self.bad_sample_record.add(part.bad_samples)
            if self.trainer is not None and self.trainer.training and part.bad_samples and not part.inputs:
                raise DataError(
                    f"dataset {part.dataset!r}: no sample can be read; the last: {part.bad_samples[-1].message}"
                )
        return batch

    def transfer_batch_to_device(
        self,
        batch: list[Batch],
        device: torch.device,
        dataloader_idx: int,  # noqa: ARG002
    ) -> list[Batch]:
        """Move the tensors of a step's batches."""
        return [part.to(device) for part in batch]

    def state_dict(self) -> dict[str, Any]:
        """The record of the skipped samples, for a checkpoint."""
        return {"faults": self.bad_sample_record.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the record of the skipped samples."""
        self.bad_sample_record.load_state_dict(state_dict["faults"])

    def _epoch(self, epoch: int, *, rank: int | None = None) -> mixture.EpochBatches:
        world, own = self._ranks()
        rank = own if rank is None else rank
        return mixture.plan_epoch(
            self.sizes("train"), self.batch_sizes, self.mixture, seed=self.seed, epoch=epoch, world=world, rank=rank,
            samplings=self.samplings(),
        )  # fmt: skip

    def _training_steps(self) -> Iterator[list[BatchKey]]:
        epoch, start = upstream.training_position(self.trainer) if self.trainer else (0, 0)
        views = self.frozen.views(self.sources("train"))
        return ([BatchKey.of(batch, views=views) for batch in step] for step in self._epoch(epoch).steps_from(start))

    def _training_keys(self) -> dict[str, list[tuple[int, int]]]:
        """Index and view of all samples that all ranks draw in the epoch, repeated as often as they are drawn."""
        epoch, _ = upstream.training_position(self.trainer) if self.trainer else (0, 0)
        views = self.frozen.views(self.sources("train"))
        drawn: dict[str, list[tuple[int, int]]] = {name: [] for name in self.data_modules}
        for rank in range(self._ranks()[0]):
            for batch in self._epoch(epoch, rank=rank):
                drawn[batch.dataset] += [(k.index, k.draw) for k in BatchKey.of(batch, views=views).samples]
        return drawn

    def _loader(self, split: str, length: int, steps: Steps, keys: Callable[[], Keys]) -> StagedLoader:
        loader = StagedLoader(
            length,
            feature_caches=lambda: self.frozen.feature_caches(
                split, sources=self.sources(split), keys=keys, trainer=self.trainer, workers=self.num_workers
            ),
            make=lambda caches: self._stage_loader(split, StepSampler(length, steps), caches),
        )
        self._loaders.append(loader)
        return loader

    def _stage_loader(self, split: str, sampler: StepSampler, feature_caches: FeatureCaches) -> DataLoader[object]:
        # Cached features take less time to read than to send from one process to another.
        workers = 0 if set(feature_caches) >= set(self.data_modules) else self.num_workers
        return DataLoader(
            JointDataset(
                self.sources(split),
                replace=split == "train" and self.bad_sample_record.policy.skips_bad_samples,
                feature_caches=feature_caches,
            ),
            batch_sampler=sampler,
            num_workers=workers,
            multiprocessing_context=FORKED if workers else None,
            persistent_workers=workers > 0,
            # Batches of different datasets take different times to read and to train on; a deep queue evens that out.
            prefetch_factor=4 if workers > 0 else None,
            collate_fn=list,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


def _say(text: str) -> None:
    if collectives.is_rank_zero():
        print_message(text)


def _spare_processors() -> int:
    return min(8, max(0, (os.cpu_count() or 1) // read_world(os.environ).local_size - 1))


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _stop(stop: mixture.Stop | None, *, refill: bool) -> mixture.Stop:
    if refill and stop not in (None, "longest"):
        raise ConfigError(Problem(f"contradicts stop: {stop}; give one of the two", key=f"{_DATA_KEY}.refill_batches"))
    return "longest" if refill else stop or "all"


def _without(limits: int | dict[str, int] | None, disabled: set[str]) -> int | dict[str, int] | None:
    return {k: v for k, v in limits.items() if k not in disabled} if isinstance(limits, dict) else limits


def _refuse_absent(option: str, value: object, *, known: list[str]) -> None:
    """Refuse an option that names a dataset, as a key or in a list, which is not there."""
    if absent := sorted(set(value) - set(known)) if isinstance(value, dict | list) else []:
        message = f"names the dataset {absent[0]!r}, which is not among {', '.join(known)}"
        raise ConfigError(Problem(message, key=f"{_DATA_KEY}.{option}"))


def _word(switch: str | bool) -> str:
    """The word that the user wrote: without quotes, YAML reads ``off`` as false."""
    return switch if isinstance(switch, str) else "auto" if switch else "off"
