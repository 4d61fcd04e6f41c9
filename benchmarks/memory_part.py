"""Part of the memory benchmarks: read N windows once with two workers, and say what memory the processes have taken.

python benchmarks/memory_part.py SIDE DATASET N KIND

With 0 windows, the split is listed and nothing is read.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

from epoch_parts import children
from rslearn.dataset import Dataset
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import ModelDataset
from store import KINDS, Kind, module
from torch.utils.data import DataLoader
from upath import UPath

from rslp.data.batches import BatchKey, JointDataset, StepSampler
from rslp.data.samples import SampleKey
from rslp.train import MultiDatasetDataModule

SIDES = ("ours", "rslearn")
READ, LISTED = "12 months S2 + S1, 32x32", "one image, 8x8"
KIND_OF = {READ: KINDS[READ], LISTED: Kind(8, {"image": (2, "uint16", 1)}, 0)}
WORKERS = 2
BATCH = 10


def main(side: str, path: Path, count: int, kind: str) -> None:
    """Read, and print a line of JSON."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    made = module(path, KIND_OF[kind], samples=count or None)
    if not count:
        listed = _listed(side, made)
        gc.collect()
        # What was needed on the way and is free again does not count, on either side.
        ctypes.CDLL(None).malloc_trim(0)
        print(json.dumps({"main": [own(os.getpid())], "listed": [len(listed)]}))
        return
    loader = _ours(made) if side == "ours" else _theirs(made)
    read = 0
    batches = iter(loader)
    for _ in range(len(loader)):
        batch = next(batches)
        read += sum(len(part.inputs) for part in batch) if side == "ours" else len(batch[0])
    if read != count:
        raise SystemExit(f"{read} of {count} samples were read")
    del batch
    gc.collect()
    workers = [pid for pid in children() if "resource_tracker" not in _command(pid)]
    print(json.dumps({"main": [own(os.getpid())], "worker": [own(pid) for pid in workers]}))


def _listed(side: str, made: RslearnDataModule) -> Sized:
    if side == "ours":
        return MultiDatasetDataModule({"windows": made}, num_workers=0).sources("train")["windows"]
    return ModelDataset(Dataset(UPath(made.path)), made.split_configs["train"], made.inputs, made.task, workers=0)


def own(pid: int) -> float:
    """Anonymous memory of a process in MB: what only it has, and no file could give back."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^(?:Private_Dirty):\s+(\d+) kB", text, re.MULTILINE)) / 1e3


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _ours(made: RslearnDataModule) -> DataLoader[Any]:
    data = MultiDatasetDataModule({"months": made}, num_workers=WORKERS)
    source = data.sources("train")["months"]
    starts = range(0, len(source), BATCH)

    def steps() -> Iterator[list[BatchKey]]:
        for start in starts:
            indices = range(start, min(start + BATCH, len(source)))
            yield [BatchKey("months", tuple(SampleKey("months", index, 0) for index in indices))]

    sampler = StepSampler(len(starts), steps)
    dataset = JointDataset({"months": source}, replace=False)
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=WORKERS, persistent_workers=True, collate_fn=list, prefetch_factor=4
    )


def _theirs(made: RslearnDataModule) -> DataLoader[Any]:
    made.setup("fit", use_in_memory_dataset=True)
    made.num_workers, made.batch_size = WORKERS, BATCH
    loader: DataLoader[Any] = made.train_dataloader()
    return loader


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
