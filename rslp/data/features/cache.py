"""The bank: kept features of one split of one dataset, under one fingerprint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rslp.data.batches import Batch, BatchKey
from rslp.data.cache.cache import cache_lock
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
# So much is written before it is synced and published.
_PORTION = 64 << 20

# Where a sample's record lies; a head of no bytes: nowhere.
_PLACE_DTYPE = np.dtype([(name, "<u8") for name in ("segment", "offset", "payload", "head", "checksum")])


class FeatureCache:
    """Kept samples of one split, found by what they were read from.

    Args:
        folder: where they lie; the last part of its name is the fingerprint.
        source: the samples of the split.
        fingerprints: what each of them is read from, ``N 2`` words.
        depth: how many of the encoder's modules the features come from.

    Raises:
        OSError: the folder can't be written.
        RunError: something else lies in a file's place.
    """

    def __init__(self, folder: Path, *, source: SampleSource, fingerprints: Array, depth: int = 1) -> None:
        self.folder = folder
        self.depth = depth
        self.source = source
        self._fingerprints = fingerprints
        self._reader = SegmentReader(folder, dataset=source.name)
        # For each view, by sample.
        self._places: dict[int, Array] = {}
        folder.mkdir(parents=True, exist_ok=True)
        # Of several processes one takes the lock, later: where it can't be, each notices here.
        (folder / "lock").open("a").close()
        self._use = Lock(folder / _IN_USE, shared=True)
        os.utime(folder / _IN_USE)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return _reopened, (self.folder, self.source, self._fingerprints, self.depth, tuple(self._places))

    def learn(self, views: set[int]) -> None:
        """Find what is kept of some views, unless they were looked for already."""
        if views - set(self._places):
            self.look(views)

    def look(self, views: set[int]) -> None:
        """Find what is kept now, of some views and of all that were looked for before."""
        entries = self._reader.entries("*.cat")
        for view in sorted(views | set(self._places)):
            wanted = _of_view(self._fingerprints, view)
            places = np.zeros(len(wanted), _PLACE_DTYPE)
            found = self._reader.find(entries, wanted)
            places[found >= 0] = entries[list(_PLACE_DTYPE.names or ())][found[found >= 0]]
            self._places[view] = places

    def full(self, views: int) -> bool:
        """Whether all samples are known to be kept in views 0 to ``views - 1``."""
        return all(view in self._places and self._places[view]["head"].all() for view in range(views))

    def missing(self, keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of some samples (index and view) those that are not kept."""
        keys = list(keys)
        return [key for key, kept in zip(keys, self._of(keys)["head"].tolist(), strict=True) if not kept]

    def read(self, keys: Sequence[tuple[int, int]]) -> CachedBatch | None:
        """What is kept of some samples; None if one of them is not kept, or not as it was, or they make no batch.

        Args:
            keys: index and view of each.
        """
        places = self._of(keys)
        if not places["head"].all() or not all(self.source.holds(index) for index, _ in keys):
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

    def _of(self, keys: Sequence[tuple[int, int]]) -> Array:
        """The places of some samples (index and view)."""
        indices, views = np.array(keys, np.int64).reshape(-1, 2).T
        found = np.zeros(len(keys), _PLACE_DTYPE)
        for view in sorted(set(views.tolist()) & set(self._places)):
            found[views == view] = self._places[view][indices[views == view]]
        return found

    def batch(self, key: BatchKey) -> Batch | None:
        """A batch with features in place of inputs; None if those of one of its samples are not kept."""
        kept = self.read([(sample.index, sample.draw) for sample in key.samples])
        if kept is None:
            return None
        features = Features(self.depth, kept.features)
        return Batch(key.dataset, kept.inputs, kept.targets, kept.metadatas, features=features)

    def close(self) -> None:
        """Say that this process needs nothing of it any more."""
        self._use.release()

    def writer(self) -> FeatureCacheWriter:
        """A writer of this process's own."""
        return FeatureCacheWriter(self.folder, self._fingerprints)


class FeatureCacheWriter:
    """Adds samples to a bank; several processes may do so at once, each into files of its own."""

    def __init__(self, folder: Path, fingerprints: Array) -> None:
        self._folder = folder
        self._fingerprints = fingerprints
        self._segments = SegmentWriter(folder)
        self._waiting: list[RecordEntry] = []
        self._size = 0
        self.written = 0

    def add(self, index: int, view: int, kept: CachedSample) -> int:
        """Add one sample; returns its bytes.

        Raises:
            OSError: the disk is full, or can't be written.
            Unfit: it can't be kept.
        """
        payload, head = encode(kept)
        first, second = _of_view(self._fingerprints[index : index + 1], view)[0].tolist()
        self._waiting.append(self._segments.add((first, second), payload, head))
        size = len(payload) + len(head)
        self._size += size
        self.written += 1
        if self._size > _PORTION:
            self.publish()
        return size

    def publish(self) -> None:
        """Sync what was added and make it known; records before their entries, so that a kill leaves no half one."""
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
        """Close the files; what was not published is lost."""
        self._segments.close()


def _reopened(
    folder: Path, source: SampleSource, fingerprints: Array, depth: int, views: tuple[int, ...]
) -> FeatureCache:
    feature_cache = FeatureCache(folder, source=source, fingerprints=fingerprints, depth=depth)
    feature_cache.look(set(views))
    return feature_cache


def _of_view(fingerprints: Array, view: int) -> Array:
    mixed = np.empty_like(fingerprints)
    for word in (0, 1):
        value = (fingerprints[:, word] ^ np.uint64((view + 1) * _VIEW % 2**64)) * _MIX
        mixed[:, word] = value ^ (value >> np.uint64(31))
    return mixed


def delete_if_unused(folder: Path) -> bool:
    """Delete a bank that no process uses; whether it is gone."""
    if not (folder / _IN_USE).is_file():
        return not folder.exists()
    try:
        lock = Lock(folder / _IN_USE)
    except (OSError, RunError):
        # In use, or not ours.
        return False
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    return True


def evict_unused(folder: Path, *, needed: int, allowed: int, keep: Path) -> int:
    """Delete banks that no process uses, the longest unused first, until there is room; the bytes that are left.

    Args:
        folder: the folder of all banks of a dataset.
        needed: bytes that are wanted.
        allowed: bytes that all banks may take.
        keep: the bank that they are for.
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
    mark = folder / _IN_USE
    return mark.stat().st_mtime if mark.exists() else 0.0


@contextmanager
def cache_writer_lock(folder: Path, *, first: bool) -> Iterator[None]:
    """Hold a bank for the processes of one job; ``first`` is the one of them that waits for other jobs."""
    if not first:
        yield
        return
    with cache_lock(folder):
        yield
