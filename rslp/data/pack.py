"""Pack the datasets of a run config without a run."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import ArgumentParser

from rslp import upstream
from rslp.data.cache.index import select
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import ConfigError, Problem
from rslp.upstream.nodata import with_labels


@dataclass(frozen=True)
class Packing:
    """What became of one dataset.

    Attributes:
        dataset: its key.
        store: the folder of its store; None where there is none.
        windows: windows of the splits.
        made: records that were made.
        differing: records that were found to differ from the dataset.
        checked: records and kept features of which the checksums were compared.
        damaged: of these, those that are damaged.
    """

    dataset: str
    store: Path | None
    windows: int = 0
    made: int = 0
    differing: int = 0
    checked: int = 0
    damaged: int = 0


def pack_datasets(
    config: Mapping[str, Any], *, splits: Sequence[str], verify: bool | Literal["checksums"], name: str
) -> Iterator[Packing]:
    """Pack the splits of every dataset.

    Args:
        config: a run config with usable paths.
        splits: names of splits.
        verify: compare checksums first; if true, also every record with the dataset.
        name: the config's file in messages.

    Yields:
        A line for each dataset, when it is done.

    Raises:
        ConfigError: the part ``data`` of the config can't be parsed, or is no joint data module.
        DataError: a dataset is missing or broken.
    """
    data = _parsed(config.get("data"), name)
    data.store_settings = replace(data.store_settings, check_all=True)
    for dataset, module in data.data_modules.items():
        store = data.store(dataset)
        if store is None:
            yield Packing(dataset, None)
            continue
        windows = made = differing = 0
        checked, damaged = store.check() if verify else (0, 0)
        inputs = with_labels(module.inputs, module.task)
        for split in splits:
            rows = select(store.index, inputs, module.split_configs[split])
            windows += len(rows)
            if verify is True:
                differing += store.verify(rows, inputs, what=split)
            made += store.pack(rows, inputs, what=split, again=True)
        yield Packing(dataset, store.folder, windows, made, differing, checked, damaged)


def _parsed(config: Any, name: str) -> MultiDatasetDataModule:
    upstream.prepare_parser()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    try:
        made = parser.instantiate_classes(parser.parse_object({"data": config})).data
    except ArgumentError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(Problem(" ".join(lines[:3]), file=name, key="data")) from error
    if not isinstance(made, MultiDatasetDataModule):
        message = f"{type(made).__name__} has no stores; use rslp.train.MultiDatasetDataModule"
        raise ConfigError(Problem(message, file=name, key="data.class_path"))
    return made
