"""Make and write windows, here or in worker processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

from rslearn.dataset import Dataset
from upath import UPath

from rslp.example import oracle, store
from rslp.example.datasets import KINDS
from rslp.example.fields import UNLABELLED
from rslp.example.layout import sites
from rslp.example.scene import Site
from rslp.runtime.children import pool as pool_of

# Windows that one task of a worker process writes.
_CHUNK = 16


def create(root: Path, *, size: float, seed: int) -> tuple[tuple[Site, ...], ...]:
    """Make the datasets' folders with their ``config.json``.

    Args:
        root: the example folder.
        size: factor on the number of windows.
        seed: seed of the example.

    Returns:
        The windows to write, in portions.
    """
    portions: list[tuple[Site, ...]] = []
    for kind in KINDS:
        places = sites(kind.region, size=size, seed=seed)
        store.create(root / kind.name, kind.make(seed, places[0]), unlabelled=UNLABELLED)
        portions.extend(places[k : k + _CHUNK] for k in range(0, len(places), _CHUNK))
    return tuple(portions)


def write(root: Path, portions: Sequence[tuple[Site, ...]], *, seed: int, workers: int) -> Iterator[list[oracle.Entry]]:
    """Write windows; what is written does not depend on the number of workers.

    Args:
        root: the example folder, as ``create`` left it.
        portions: the windows.
        seed: seed of the example.
        workers: worker processes; below 2, everything is done in this one.

    Yields:
        The labels of a portion, as each is done.
    """
    if workers < 2:
        for portion in portions:
            yield write_portion(root, seed, portion)
        return
    # Not forked: the progress bar runs a thread, and GDAL has its own.
    with pool_of(workers, "spawn", what="makes the example") as pool:
        yield from pool.map(partial(write_portion, root, seed), portions)


def write_portion(root: Path, seed: int, portion: tuple[Site, ...]) -> list[oracle.Entry]:
    """Make and write some windows of one dataset; returns their labels."""
    kind = next(kind for kind in KINDS if kind.name == portion[0].dataset)
    dataset = _open(root / kind.name)
    entries = []
    for site in portion:
        scene = kind.make(seed, site)
        store.write(dataset, site, scene, unlabelled=UNLABELLED)
        entries.append(oracle.entry(site, scene))
    return entries


@lru_cache(maxsize=len(KINDS))
def _open(path: Path) -> Dataset:
    """Open a dataset once per process: parsing its config costs as much as writing a window."""
    dataset = Dataset(UPath(path))
    # rslearn announces every window that it writes (a logger that exists only once a dataset was opened).
    logging.getLogger("rslearn.dataset.storage.file").setLevel(logging.WARNING)
    return dataset
