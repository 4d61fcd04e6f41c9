"""The feature cache of one split of one dataset: outputs of a frozen encoder on disk, under one fingerprint."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from rslp.data.cache.cache import lack_of_room
from rslp.data.cache.columns import Array
from rslp.data.cache.segments import RecordEntry, SegmentReader, SegmentWriter, append_entries
from rslp.data.features.codec import CachedBatch, CachedSample, decode, encode
from rslp.data.samples import SampleSource
from rslp.errors import ConfigError, Problem, RunError
from rslp.io.locks import Lock

FOLDER = "features"
_DATA_KEY = "data.init_args"
_IN_USE = "in-use"
_VIEW = np.uint64(0xD1342543DE82EF95)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
# Bytes written before they are synced and published.
_PORTION = 64 << 20


@dataclass(frozen=True)
class FeatureSettings:
    """How features of a frozen encoder are cached.

    Attributes:
        views: number of fixed views from which a sample is drawn while the encoder is frozen; None draws a new view
            each time.
        keep: whether features are cached at all.
        dtype: floating point type in which they are stored.
        limit: bytes that one dataset's features may take; None means half of the free disk.

    Raises:
        ConfigError: ``views`` is below 1, or ``limit`` is not positive.
    """

    views: int | None = 1
    keep: bool = True
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.views is not None and self.views < 1:
            raise ConfigError(Problem(f"is {self.views}; 1 or more, or null", key=f"{_DATA_KEY}.frozen_views"))
        if self.limit is not None and self.limit <= 0:
            raise ConfigError(Problem(f"is {self.limit / 1e9:g}; more than 0", key=f"{_DATA_KEY}.features_limit_gb"))

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as a torch type."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class FeatureCache:
    """The samples of one split that are cached at present, looked up by the fingerprint of their windows' files.

    Args:
        folder: the folder of the records; its name is the fingerprint of config and weights.
        source: the samples of the split, from a sample cache.
        views: number of views of each sample.
        depth: how many of the encoder's modules the features come from.

    Attributes:
        fingerprints: the fingerprint of each record, uint64 ``views N 2``.

    Raises:
        OSError: the folder can't be written.
        RunError: the path of the lock file is taken by something that is not a file.
    """

    def __init__(self, folder: Path, *, source: SampleSource, views: int, depth: int = 1) -> None:
        self.folder = folder
        self.source = source
        self.depth = depth
        folder.mkdir(parents=True, exist_ok=True)
        # Rank 0 alone takes this lock, later; opened here, so that every rank notices a folder that can't be written.
        (folder / "lock").open("a").close()
        self._use = Lock(folder / _IN_USE, shared=True)
        os.utime(folder / _IN_USE)
        self.fingerprints = _view_fingerprints(source, views)
        self.look_up()

    def look_up(self) -> None:
        """Find the records that are there now."""
        self._reader = SegmentReader(self.folder, dataset=self.source.name)
        self._records = self._reader.records("*.cat", self.fingerprints.reshape(-1, 2))

    def reopened(self) -> FeatureCache:
        """The cache with all samples that were added since this one was opened; the mark of use is that of both."""
        # A copy: loaders' workers read this one, and need to be started again for another.
        reopened = copy.copy(self)
        reopened.look_up()
        return reopened

    def is_complete(self) -> bool:
        """Whether all samples are cached in all views."""
        return bool((self._records.numbers >= 0).all())

    def missing(self, keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of some samples (index and view) that are not cached."""
        return [key for key in keys if self._records.numbers[self._position(key)] < 0]

    def read(self, keys: Sequence[tuple[int, int]]) -> CachedBatch | None:
        """Read the records of some samples.

        Args:
            keys: index and view of each.

        Returns:
            None if a record is missing or damaged, a window changed, or the features are of different shapes.
        """
        positions = list(map(self._position, keys))
        places = [place for place in map(self._records.place, positions) if place is not None]
        if len(places) < len(keys) or not all(self.source.window_is_unchanged(index) for index, _ in keys):
            return None
        records = [self._reader.read(place) for place in places]
        good = [record for record in records if record is not None]
        if len(good) == len(records):
            return decode(good)
        for position, record in zip(positions, records, strict=True):
            if record is None:
                # Missing from now on, so that it is encoded again.
                self._records.numbers[position] = -1
        return None

    def _position(self, key: tuple[int, int]) -> int:
        """The position of a sample (index and view) among the records."""
        return key[1] * len(self.source) + key[0]

    def close(self) -> None:
        """Release this process's mark of use: the cache may be deleted when its room is needed."""
        self._use.release()


class FeatureCacheWriter:
    """Adds samples to a feature cache; several processes may write at once, each into its own files."""

    def __init__(self, feature_cache: FeatureCache) -> None:
        self.feature_cache = feature_cache
        self._segments = SegmentWriter(feature_cache.folder)
        self._waiting: list[RecordEntry] = []
        self._size = 0
        self.written = 0

    def add(self, index: int, view: int, sample: CachedSample) -> int:
        """Add one sample; returns its size in bytes.

        Raises:
            OSError: the disk is full, or can't be written.
            UncacheableSample: the sample has values of a type that a record can't hold.
        """
        payload, head = encode(sample)
        first, second = self.feature_cache.fingerprints[view, index].tolist()
        self._waiting.append(self._segments.add((first, second), payload, head))
        size = len(payload) + len(head)
        self._size += size
        self.written += 1
        if self._size > _PORTION:
            self.publish()
        return size

    def publish(self) -> None:
        """Sync the added records, then append their entries: a kill never leaves an entry without its record."""
        if self._waiting:
            self._segments.flush()
            append_entries(self.feature_cache.folder / f"{os.getpid()}-{id(self):x}.cat", self._waiting)
        self._waiting, self._size = [], 0

    def close(self) -> None:
        """Close the files; samples that were not published are lost."""
        self._segments.close()


def _view_fingerprints(source: SampleSource, views: int) -> Array:
    """The fingerprint of each sample in each view, uint64 ``views N 2``."""
    fingerprints = source.fingerprints()
    assert fingerprints is not None
    number = np.arange(1, views + 1, dtype=np.uint64)[:, None, None]
    mixed: Array = (fingerprints ^ number * _VIEW) * _MIX
    mixed ^= mixed >> np.uint64(31)
    return mixed


def delete_if_unused(folder: Path) -> bool:
    """Delete a feature cache unless a process uses it; returns whether it is gone."""
    if not (folder / _IN_USE).is_file():
        return not folder.exists()
    try:
        lock = Lock(folder / _IN_USE)
    except (OSError, RunError):
        # In use, or of another user.
        return False
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    return True


def make_room(folder: Path, *, needed: int, limit: int | None) -> str:
    """Delete feature caches of the dataset that no process uses, the longest unused first, until there is room.

    Args:
        folder: the feature cache that needs the room; it stays.
        needed: bytes to make room for.
        limit: bytes that all feature caches of the dataset together may take.

    Returns:
        A message if there is no room; empty if there is.
    """
    others = sorted((path for path in folder.parent.iterdir() if path.is_dir() and path != folder), key=_last_used)
    while True:
        used = sum(path.stat().st_size for path in folder.parent.glob("*/data/*.seg"))
        lack = lack_of_room(folder, needed=needed, used=used, limit=limit, option="features_limit_gb")
        if not lack or not others:
            return lack
        delete_if_unused(others.pop(0))


def _last_used(folder: Path) -> float:
    in_use = folder / _IN_USE
    return in_use.stat().st_mtime if in_use.exists() else 0.0
