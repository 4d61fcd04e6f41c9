"""The feature cache of one split of one dataset: outputs of a frozen encoder on disk, under one fingerprint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rslp.data.batches import Batch, BatchKey
from rslp.data.cache.columns import Array
from rslp.data.cache.segments import RecordEntry, SegmentReader, SegmentWriter, append_entries
from rslp.data.features.codec import CachedBatch, CachedSample, decode, encode
from rslp.data.samples import SampleSource
from rslp.errors import RunError
from rslp.io.locks import Lock
from rslp.models.joint import Features

FOLDER = "features"
_IN_USE = "in-use"
_VIEW = 0xD1342543DE82EF95
_MIX = np.uint64(0xBF58476D1CE4E5B9)
# Bytes written before they are synced and published.
_PORTION = 64 << 20

# Where a sample's record lies; a head of 0 bytes means that the sample is not cached.
_PLACE_DTYPE = np.dtype([(name, "<u8") for name in ("segment", "offset", "payload", "head", "checksum")])


class FeatureCache:
    """Cached samples of one split, looked up by the fingerprint of the files they were read from.

    Args:
        folder: the folder of the records; its name is the fingerprint of config and weights.
        source: the samples of the split.
        fingerprints: the samples' fingerprints, uint64 ``N 2``.
        depth: how many of the encoder's modules the features come from.

    Raises:
        OSError: the folder can't be written.
        RunError: the path of the lock file is taken by something that is not a file.
    """

    def __init__(self, folder: Path, *, source: SampleSource, fingerprints: Array, depth: int = 1) -> None:
        self.folder = folder
        self.depth = depth
        self.source = source
        self._fingerprints = fingerprints
        self._reader = SegmentReader(folder, dataset=source.name)
        # For each view an array of _PLACE_DTYPE, one element per sample.
        self._places: dict[int, Array] = {}
        folder.mkdir(parents=True, exist_ok=True)
        # Rank 0 alone takes this lock, later; opened here, so that every rank notices a folder that can't be written.
        (folder / "lock").open("a").close()
        self._use = Lock(folder / _IN_USE, shared=True)
        os.utime(folder / _IN_USE)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return _reopened, (self.folder, self.source, self._fingerprints, self.depth, tuple(self._places))

    def load_views(self, views: set[int]) -> None:
        """Read the catalogue entries of these views, unless they were read before."""
        if views - set(self._places):
            self.reload_views(views)

    def reload_views(self, views: set[int]) -> None:
        """Read the catalogue entries of these views, and again those of all views that were read before."""
        entries = self._reader.entries("*.cat")
        for view in sorted(views | set(self._places)):
            wanted = _view_fingerprints(self._fingerprints, view)
            places = np.zeros(len(wanted), _PLACE_DTYPE)
            numbers = self._reader.find(entries, wanted)
            places[numbers >= 0] = entries[list(_PLACE_DTYPE.names or ())][numbers[numbers >= 0]]
            self._places[view] = places

    def has_all_views(self, views: int) -> bool:
        """Whether the entries that were read hold all samples in views 0 to ``views - 1``."""
        return all(view in self._places and self._places[view]["head"].all() for view in range(views))

    def missing(self, keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of some samples (index and view) that are not cached."""
        keys = list(keys)
        return [key for key, size in zip(keys, self._places_of(keys)["head"].tolist(), strict=True) if not size]

    def read(self, keys: Sequence[tuple[int, int]]) -> CachedBatch | None:
        """Read the records of some samples.

        Args:
            keys: index and view of each.

        Returns:
            None if a record is missing or damaged, a window changed, or the features are of different shapes.
        """
        places = self._places_of(keys)
        if not places["head"].all() or not all(self.source.window_is_unchanged(index) for index, _ in keys):
            return None
        records = [self._reader.read(place) for place in places.tolist()]
        good = [record for record in records if record is not None]
        if len(good) == len(records):
            return decode(good)
        for (index, view), record in zip(keys, records, strict=True):
            if record is None:
                # Missing from now on, so that it is encoded again.
                self._places[view]["head"][index] = 0
        return None

    def _places_of(self, keys: Sequence[tuple[int, int]]) -> Array:
        indices, views = np.array(keys, np.int64).reshape(-1, 2).T
        places = np.zeros(len(keys), _PLACE_DTYPE)
        for view in sorted(set(views.tolist()) & set(self._places)):
            places[views == view] = self._places[view][indices[views == view]]
        return places

    def batch(self, key: BatchKey) -> Batch | None:
        """A batch with features in place of inputs; None where ``read`` gives None."""
        cached = self.read([(sample.index, sample.draw) for sample in key.samples])
        if cached is None:
            return None
        features = Features(self.depth, cached.features)
        return Batch(key.dataset, cached.inputs, cached.targets, cached.metadatas, features=features)

    def close(self) -> None:
        """Release this process's mark of use: the cache may be deleted when its room is needed."""
        self._use.release()

    def writer(self) -> FeatureCacheWriter:
        """A new writer for this process."""
        return FeatureCacheWriter(self.folder, self._fingerprints)


class FeatureCacheWriter:
    """Adds samples to a feature cache; several processes may write at once, each into its own files."""

    def __init__(self, folder: Path, fingerprints: Array) -> None:
        self._folder = folder
        self._fingerprints = fingerprints
        self._segments = SegmentWriter(folder)
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
        first, second = _view_fingerprints(self._fingerprints[index : index + 1], view)[0].tolist()
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
            append_entries(self._folder / f"{os.getpid()}-{id(self):x}.cat", self._waiting)
        self._waiting, self._size = [], 0

    def close(self) -> None:
        """Publish the rest and close the files."""
        try:
            self.publish()
        finally:
            self._segments.close()

    def abandon(self) -> None:
        """Close the files; samples that were not published are lost."""
        self._segments.close()


def _reopened(
    folder: Path, source: SampleSource, fingerprints: Array, depth: int, views: tuple[int, ...]
) -> FeatureCache:
    feature_cache = FeatureCache(folder, source=source, fingerprints=fingerprints, depth=depth)
    feature_cache.reload_views(set(views))
    return feature_cache


def _view_fingerprints(fingerprints: Array, view: int) -> Array:
    mixed = np.empty_like(fingerprints)
    for word in (0, 1):
        value = (fingerprints[:, word] ^ np.uint64((view + 1) * _VIEW % 2**64)) * _MIX
        mixed[:, word] = value ^ (value >> np.uint64(31))
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


def evict_unused(folder: Path, *, needed: int, allowed: int, keep: Path) -> int:
    """Delete feature caches that no process uses, the longest unused first, until there is room.

    Args:
        folder: the folder of all feature caches of a dataset.
        needed: bytes to make room for.
        allowed: bytes that all of them together may take.
        keep: the feature cache that needs the room; it stays.

    Returns:
        The bytes that are left of ``allowed``.
    """
    others = [path for path in sorted(folder.iterdir()) if path.is_dir() and path != keep]
    sizes = {path: sum(file.stat().st_size for file in path.glob("data/*.seg")) for path in [*others, keep]}
    for path in sorted(others, key=_last_used):
        if sum(sizes.values()) + needed <= allowed:
            break
        if delete_if_unused(path):
            del sizes[path]
    return allowed - sum(sizes.values())


def _last_used(folder: Path) -> float:
    in_use = folder / _IN_USE
    return in_use.stat().st_mtime if in_use.exists() else 0.0
