"""Fill the sample caches of a run config's datasets without a run, and compare them with the datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rslp.data.cache.index import select
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.upstream.nodata import with_labels


@dataclass(frozen=True)
class PackResult:
    """Counts for one dataset.

    Attributes:
        dataset: the dataset's key.
        folder: the folder of its sample cache; None if it has none.
        windows: windows of the splits.
        packed: records that were made.
        differing: records that differed from the dataset.
        checked: records and cached features whose checksums were compared.
        damaged: those of the checked ones that are damaged.
    """

    dataset: str
    folder: Path | None
    windows: int = 0
    packed: int = 0
    differing: int = 0
    checked: int = 0
    damaged: int = 0


def pack_datasets(
    data: MultiDatasetDataModule, *, splits: Sequence[str], verify: bool | Literal["checksums"]
) -> Iterator[PackResult]:
    """Pack the splits of every dataset.

    Args:
        data: the datasets.
        splits: names of splits.
        verify: compare checksums first; if true, also every record with the dataset.

    Yields:
        The result of each dataset, when it is done.

    Raises:
        DataError: a dataset is missing or broken.
    """
    data.cache_settings = replace(data.cache_settings, check_all=True)
    for dataset, module in data.data_modules.items():
        sample_cache = data.sample_cache(dataset)
        if sample_cache is None:
            yield PackResult(dataset, None)
            continue
        windows = packed = differing = 0
        checked, damaged = sample_cache.check() if verify else (0, 0)
        inputs = with_labels(module.inputs, module.task)
        for split in splits:
            rows = select(sample_cache.index, inputs, module.split_configs[split])
            windows += len(rows)
            if verify is True:
                differing += sample_cache.verify(rows, inputs, split=split)
            packed += sample_cache.pack(rows, inputs, split=split, again=True)
        yield PackResult(dataset, sample_cache.folder, windows, packed, differing, checked, damaged)
