"""The joint data module: several rslearn datasets, one dataset per batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Literal

import lightning as L
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.tasks.multi_task import MultiTask
from torch.utils.data import DataLoader

from rslp.errors import ConfigError, DataError, Problem
from rslp.train import adapters, mixture
from rslp.train.batches import Batch, Fault, JointDataset, KeySampler, collate
from rslp.train.samples import SampleKey, SampleSource, open_dataset
from rslp.train.store.settings import StoreSettings
from rslp.train.store.store import SampleStore, open_store

_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
_PLACE = "data.init_args"


class MultiDatasetDataModule(L.LightningDataModule):
    """Samples of several datasets, mixed batch by batch.

    Args:
        data_modules: the datasets by key; of each, rslearn's own description is used (path, inputs, task, splits).
        num_workers: processes that read samples; 0 reads in the training process. None means one per processor of the
            machine beyond the first, 8 at most.
        sample_mode: how the next dataset is chosen, see ``rslp.train.mixture``.
        batch_sizes: samples per batch and process: one number for all, or by dataset; None means each dataset's own.
        refill_batches: go on until the longest dataset is through, drawing shorter ones again.
        per_dataset_patch_limit: at most so many samples of each dataset per training epoch, over all processes.
        steps_per_dataset: batches in a row of one dataset in mode ``reptile``.
        disabled_datasets: keys that are left out.
        weights: relative shares by dataset, for mode ``weights``.
        temperature: T of mode ``temperature``: shares are proportional to n^(1/T).
        steps_per_epoch: a fixed number of batches per epoch instead of the datasets' lengths.
        store: where decoded windows are kept: ``auto`` (beside each dataset, or in the cache folder if that can't be
            written), ``off`` (read the datasets each time), or a folder.
        store_limit_gb: GB that one dataset's store may take; half of the free disk in any case.

    Raises:
        ConfigError: no dataset, or an option that names an absent one.
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
        per_dataset_patch_limit: int | None = None,
        steps_per_dataset: int | None = None,
        disabled_datasets: list[str] | None = None,
        weights: dict[str, float] | None = None,
        temperature: float | None = None,
        steps_per_epoch: int | None = None,
        store: str = "auto",
        store_limit_gb: float | None = None,
    ) -> None:
        super().__init__()
        disabled = set(disabled_datasets or [])
        for option, names in (("disabled_datasets", disabled), ("batch_sizes", _names(batch_sizes))):
            _refuse_absent(option, names=names, known=set(data_modules))
        self.data_modules = {name: dm for name, dm in sorted(data_modules.items()) if name not in disabled}
        if not self.data_modules:
            raise ConfigError(Problem("no dataset is left to train on", key=f"{_PLACE}.data_modules"))
        self.num_workers = min(8, max(0, (os.cpu_count() or 1) - 1)) if num_workers is None else num_workers
        self.batch_sizes = {
            name: batch_sizes if isinstance(batch_sizes, int) else (batch_sizes or {}).get(name, dm.batch_size)
            for name, dm in self.data_modules.items()
        }
        self.mixture = mixture.Mixture(
            mode=sample_mode,
            stop="longest" if refill_batches else "all",
            steps_per_epoch=steps_per_epoch,
            temperature=temperature,
            weights=weights,
            limits=per_dataset_patch_limit,
            steps_per_dataset=steps_per_dataset,
        )
        limit = None if store_limit_gb is None else int(store_limit_gb * 1e9)
        self.store_settings = StoreSettings(store=store, limit=limit)
        self._stores: dict[str, SampleStore | None] = {}
        # Set from the run config's top-level `seed` before training starts.
        self.seed = 0
        self._sources: dict[str, dict[str, SampleSource]] = {}

    def tasks(self) -> dict[str, list[str]]:
        """The names of each dataset's tasks."""
        return {
            name: list(dm.task.tasks) if isinstance(dm.task, MultiTask) else [name]
            for name, dm in self.data_modules.items()
        }

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
                name: SampleSource(name, data_module=dm, split=split, seed=self.seed, store=self.store(name))
                for name, dm in self.data_modules.items()
            }
        return self._sources[split]

    def store(self, name: str) -> SampleStore | None:
        """A dataset's store, opened once; None where there is none.

        Raises:
            DataError: the dataset is missing or broken.
        """
        if name not in self._stores:
            module = self.data_modules[name]
            dataset = open_dataset(name, module)
            self._stores[name] = open_store(name, dataset=dataset, inputs=module.inputs, settings=self.store_settings)
        return self._stores[name]

    def sizes(self, split: str) -> dict[str, int]:
        """Number of samples by dataset."""
        return {name: len(source) for name, source in self.sources(split).items()}

    def train_dataloader(self) -> DataLoader[object]:
        """Batches of the mixture; a new iterator begins where the run stands, also inside an epoch."""
        self.setup("fit")
        return self._loader("train", KeySampler(len(self._epoch(0)), self._training_batches))

    def val_dataloader(self) -> DataLoader[object]:
        """Every validation sample exactly once."""
        return self.evaluation_dataloader("val")

    def test_dataloader(self) -> DataLoader[object]:
        """Every test sample exactly once."""
        return self.evaluation_dataloader("test")

    def evaluation_dataloader(self, split: str) -> DataLoader[object]:
        """Every sample of a split exactly once, dataset by dataset."""
        world, rank = self._ranks()
        plan = mixture.evaluation(self.sizes(split), self.batch_sizes, world=world, rank=rank)
        batches = [_keys(batch) for batch in plan]
        return self._loader(split, KeySampler(len(batches), lambda: iter(batches)))

    def on_before_batch_transfer(self, batch: Batch | Fault, dataloader_idx: int) -> Batch:  # noqa: ARG002
        """Stop at a sample that could not be read.

        Raises:
            DataError: naming dataset and window.
        """
        if isinstance(batch, Fault):
            raise DataError(batch.message)
        return batch

    def _epoch(self, epoch: int) -> mixture.Batches:
        world, rank = self._ranks()
        return mixture.epoch(
            self.sizes("train"), self.batch_sizes, self.mixture, seed=self.seed, epoch=epoch, world=world, rank=rank
        )

    def _training_batches(self) -> Iterator[list[SampleKey]]:
        epoch, start = adapters.training_position(self.trainer) if self.trainer else (0, 0)
        return map(_keys, self._epoch(epoch).starting_at(start))

    def _loader(self, split: str, sampler: KeySampler) -> DataLoader[object]:
        return DataLoader(
            JointDataset(self.sources(split)),
            batch_sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Batches of different datasets take unlike times to read and to train on; a deeper queue evens that out.
            prefetch_factor=4 if self.num_workers > 0 else None,
            collate_fn=collate,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


def _keys(batch: mixture.Batch) -> list[SampleKey]:
    return [SampleKey(batch.dataset, i, draw) for i, draw in zip(batch.indices, batch.draws, strict=True)]


def _names(option: int | dict[str, int] | None) -> set[str]:
    return set(option) if isinstance(option, dict) else set()


def _refuse_absent(option: str, *, names: set[str], known: set[str]) -> None:
    if absent := sorted(names - known):
        what = f"names the dataset {absent[0]!r}, which is not among {', '.join(sorted(known))}"
        raise ConfigError(Problem(what, key=f"{_PLACE}.{option}"))
