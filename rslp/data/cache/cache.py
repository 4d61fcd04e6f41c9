"""The sample cache of one dataset: open it, refresh its index, pack missing records, and read windows from it.

A *record* is one input of one whole window, decoded; to *pack* is to make records. The *index* has a row for each
window of the dataset, with the fingerprint of its files. A *catalogue* has an *entry* for each record of one kind of
input: the window's fingerprint and the record's place. A record is looked up by fingerprint, so that after a change of
the files it is not found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rslearn.dataset import Dataset
from rslearn.dataset.storage.file import FileWindowStorage
from rslearn.train.dataset import DataInput, SplitConfig
from upath import UPath

from rslp.data.cache import refresh
from rslp.data.cache.columns import Array
from rslp.data.cache.index import WindowIndex, available, select
from rslp.data.cache.pack import PackJob, Task, default_workers, pack_all
from rslp.data.cache.segments import UNFIT, InputRecords, SegmentReader, append_entries, catalogue
from rslp.data.cache.window_state import layer_of
from rslp.data.cache.windows import CachedWindows
from rslp.errors import DataError, MachineError
from rslp.io import full_disk, locks
from rslp.runtime import preemption
from rslp.runtime.world import read_world
from rslp.upstream.nodata import LabelInput

CACHE_FOLDER = ".rslp-store"
CACHE_VARIABLE = "RSLP_CACHE"
FORMAT = 3
# Looked up once: it is part of each input's key, and a look-up reads the metadata of the package.
RSLEARN_VERSION = version("rslearn")
# The sample cache takes at most this share of the free bytes of its disk.
_SHARE_OF_FREE = 0.5
# Bytes of a vector record, and of what a raster record has besides pixels, as assumed by the estimate of needed room.
_VECTOR_BYTES = 1000
# Fewer windows than this are packed by the calling process, since starting others takes longer.
_WORTH_A_PROCESS = 32

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleCacheSettings:
    """The user's choices, from ``data.init_args`` of the run config and the options of ``helios pack``.

    Attributes:
        store: ``auto``, ``off``, or a folder for the sample caches of all datasets.
        limit: bytes that one dataset's cache may take; None means no limit but half of the disk's free bytes, which
            holds in any case.
        workers: processes that pack; None means one per processor.
        check_all: compare every window's files with the index at the start, also of a large dataset, whose index is
            otherwise trusted: then a window is checked when it is first read.
        read_timeout: seconds after which reading an input of a window is given up; None waits for ever.
    """

    store: str = "auto"
    limit: int | None = None
    workers: int | None = None
    check_all: bool = False
    read_timeout: float | None = None


def cache_folder(dataset: UPath, store: str) -> Path:
    """The folder of a dataset's sample cache.

    Args:
        dataset: the dataset's folder, local or remote.
        store: ``auto``: beside the windows if they are local and the folder can be written, else in the folder of
            ``RSLP_CACHE`` (default ``~/.cache/rslp``). Anything else is a folder for the caches of all datasets.
    """
    if store == "auto":
        if isinstance(dataset.fs, LocalFileSystem):
            beside = Path(dataset.path) / CACHE_FOLDER
            if os.access(beside if beside.exists() else beside.parent, os.W_OK):
                return beside
        store = os.environ.get(CACHE_VARIABLE) or "~/.cache/rslp"
    name = f"{dataset.name}-{hashlib.sha256(str(dataset).encode()).hexdigest()[:12]}"
    return Path(store).expanduser() / "stores" / name


def lack_of_room(folder: Path, *, needed: int, used: int, limit: int | None, option: str) -> str:
    """A message if bytes will not fit into a cache, of which half of the free ones may be taken; empty if they will.

    Args:
        folder: the cache's folder, which need not exist yet.
        needed: bytes to be written.
        used: bytes that count towards the limit already.
        limit: bytes that may be used in all; None means no such limit.
        option: the name of the limit's option.
    """
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    room, why = int(free * _SHARE_OF_FREE), "half of them may be taken"
    if limit is not None:
        room, why = min((room, why), (limit - used, f"`{option}` leaves {max(limit - used, 0):,}"))
    return "" if needed <= room else f"{folder} would take {needed:,} bytes more, {free:,} are free, and {why}"


@contextmanager
def cache_lock(folder: Path) -> Iterator[None]:
    """Lock a sample cache or feature cache for one writer; others wait, with a message that names the holder.

    Raises:
        Preempted: this process was asked to stop while it waited.
    """
    wait = locks.waiting(f"is writing to {folder}", leave=preemption.raise_if_preempted)
    with locks.locked(folder / "lock", busy=wait):
        yield


class SampleCache:
    """The sample cache of one dataset; ``open_sample_cache`` makes it.

    Args:
        name: the dataset's key in the run config.
        dataset: the dataset.
        folder: the cache's folder.
        index: the dataset's windows.
        settings: the user's choices.
        trusted: the index was not compared with every window's files, so each is checked when it is first read.
    """

    def __init__(
        self,
        name: str,
        *,
        dataset: Dataset,
        folder: Path,
        index: WindowIndex,
        settings: SampleCacheSettings,
        trusted: bool,
    ) -> None:
        self.name = name
        self.folder = folder
        self.index = index
        self._dataset = dataset
        self._settings = settings
        self._trusted = trusted
        self._reader = SegmentReader(folder, dataset=name)

    def windows(self, inputs: Mapping[str, DataInput], config: SplitConfig, *, split: str = "") -> CachedWindows:
        """The windows of a split, read from the cache; missing records are packed first, if there is room.

        Args:
            inputs: the inputs of a sample, by name.
            config: the split's settings, which select its windows.
            split: the split's name, for messages.
        """
        rows = select(self.index, inputs, config)
        self.pack(rows, inputs, split=split)
        records = {name: self._records_of(data_input, rows) for name, data_input in inputs.items()}
        return CachedWindows(
            self._dataset, index=self.index, rows=rows, records=records, reader=self._reader, trusted=self._trusted
        )

    def pack(self, rows: Array, inputs: Mapping[str, DataInput], *, split: str = "", again: bool = False) -> int:
        """Pack missing records.

        Args:
            rows: rows of the index, the windows to pack.
            inputs: the inputs of a sample, by name.
            split: the split's name, for messages.
            again: for ``helios pack``: also try records again that could not be made before, and raise an error where a
                run would go on without the cache.

        Returns:
            The number of records that were made.

        Raises:
            MachineError: there is no room, with ``again``; without it, that is a warning.
            DiskError: the disk is full, or OSError: the folder can't be written; likewise.
        """
        if not self._missing(rows, inputs, again=again):
            return 0
        try:
            with cache_lock(self.folder):
                # Another process may have packed while this one waited for the lock.
                missing = self._missing(rows, inputs, again=again)
                if lack := self._lack_of_room(missing, inputs, split):
                    if again:
                        raise MachineError(lack)
                    log.warning("%s; the dataset is read without it", lack)
                    return 0
                return self._run(missing, inputs, f"packing {self.name} {split}")
        except OSError as error:
            if again:
                raise full_disk(error, self.folder / "data") or error from error
            log.warning(
                "%s: the sample cache %s can't take all windows (%s); the others are read from the dataset itself",
                self.name,
                self.folder,
                error,
            )
            return 0

    def verify(self, rows: Array, inputs: Mapping[str, DataInput], *, split: str = "") -> int:
        """Read the dataset again, compare with the records byte by byte, and exclude records that differ.

        Only this finds files whose content was replaced without a change of size, times and inode. The arguments are
        those of ``pack``.

        Returns:
            The number of records that differed.
        """
        keys = tuple(dict.fromkeys(self._key(data_input) for data_input in inputs.values()))
        return self._run([(row, keys) for row in rows.tolist()], inputs, f"verifying {self.name} {split}", verify=True)

    def check(self) -> tuple[int, int]:
        """Compare all records, also those of cached features, with their checksums.

        Returns:
            The number of records, and how many of them are damaged; those are made again when they are needed.
        """
        feature_caches = [path for path in sorted(self.folder.glob("features/*")) if path.is_dir()]
        counts = [self._reader.check(path.name) for path in sorted(self.folder.glob("records-*.cat"))]
        counts += [SegmentReader(path, dataset=self.name).check("*.cat") for path in feature_caches]
        return sum(records for records, _ in counts), sum(damaged for _, damaged in counts)

    def _run(self, tasks: list[Task], inputs: Mapping[str, DataInput], title: str, *, verify: bool = False) -> int:
        """Make records (or, with ``verify``, compare them) in several processes, with a progress bar.

        Args:
            tasks: the windows, each with the keys of its inputs.
            inputs: the inputs of a sample, by name.
            title: the text before the progress bar.
            verify: exclude the records that differ, instead of adding new ones to the catalogues.

        Returns:
            The number of records that were added or excluded.
        """
        by_key = {self._key(data_input): data_input for data_input in inputs.values()}
        fingerprints = {key: self._fingerprints(data_input) for key, data_input in by_key.items()}
        job = PackJob(
            self._dataset.path,
            self.folder,
            self.index,
            by_key,
            fingerprints,
            verify,
            read_timeout=self._settings.read_timeout,
            name=self.name,
        )
        workers = self._settings.workers if self._settings.workers is not None else default_workers()
        portions = pack_all(job, tasks, workers=workers if len(tasks) >= _WORTH_A_PROCESS else 0)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        published = 0
        # Rank 0 alone prints.
        console = Console(stderr=True, quiet=not read_world(os.environ).first)
        if not console.is_terminal:
            console.print(f"{title.rstrip()}: {len(tasks)} windows, {self.folder}", highlight=False, soft_wrap=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task(title.rstrip(), total=len(tasks))
            for portion in portions:
                for key, entries in portion.entries.items():
                    if verify:
                        self._reader.exclude_records(entries)
                    else:
                        append_entries(self.folder / catalogue(key), entries)
                    published += len(entries)
                progress.advance(bar, portion.windows)
                preemption.raise_if_preempted()
        return published

    def _lack_of_room(self, tasks: list[Task], inputs: Mapping[str, DataInput], split: str) -> str:
        """A message if the records of these windows and inputs will not fit on the disk; empty if they will."""
        used = sum(path.stat().st_size for path in self.folder.glob("data/*.seg"))
        needed, limit = self._estimate(tasks, inputs), self._settings.limit
        lack = lack_of_room(self.folder, needed=needed, used=used, limit=limit, option="store_limit_gb")
        hint = "`store: FOLDER` of the data module names another place"
        return lack and f"{self.name} {split}: the sample cache {lack}; {hint}"

    def _estimate(self, tasks: list[Task], inputs: Mapping[str, DataInput]) -> int:
        """About how many bytes the records of these windows and inputs will take."""
        total = 0
        sizes = {self._key(data_input): self._bytes_per_pixel(data_input) for data_input in inputs.values()}
        for row, keys in tasks:
            x0, y0, x1, y1 = self.index.bounds[row].tolist()
            total += sum(_VECTOR_BYTES + sizes[key] * (x1 - x0) * (y1 - y0) for key in keys)
        return total

    def _bytes_per_pixel(self, data_input: DataInput) -> int:
        """Bytes of all item groups of an input per pixel of the window; 0 for vectors."""
        if data_input.data_type == "vector":
            return 0
        total = 0
        for option in data_input.layers:
            layer = layer_of(option)
            band_sets = self._dataset.layers[layer].band_sets if layer in self._dataset.layers else []
            bands = len(data_input.bands or []) or max((len(s.bands) for s in band_sets), default=0)
            itemsize = max((np.dtype(s.dtype.get_numpy_dtype()).itemsize for s in band_sets), default=4)
            groups = self._most_groups(layer) if data_input.load_all_item_groups else 1
            total += bands * min(itemsize, 4) * groups
        return total

    def _most_groups(self, layer: str) -> int:
        """The largest number of item groups that any window of the dataset has in a layer."""
        completed = self.index.texts["completed"]
        texts = [completed.distinct(code) for code in range(len(completed.ends))]
        return max((sum(layer_of(folder) == layer for folder in text.split("|")) for text in texts), default=1)

    def _missing(self, rows: Array, inputs: Mapping[str, DataInput], *, again: bool) -> list[Task]:
        """The rows of windows with missing records, each with the keys (see ``input_key``) of the inputs without one.

        An input that the dataset does not have for a window is not missing. With ``again``, records that could not be
        made before are missing, too.
        """
        missing: dict[int, list[str]] = {}
        completed = self.index.texts["completed"]
        present: dict[int, set[str]] = {
            int(code): set(available(completed.distinct(int(code)), inputs)) for code in completed.used(rows)
        }
        for name, data_input in inputs.items():
            key = self._key(data_input)
            records = self._records_of(data_input, rows)
            lacking = records.numbers < 0
            if again and len(records.entries):
                lacking |= records.entries["state"][np.maximum(records.numbers, 0)] == UNFIT
            for row in rows[lacking].tolist():
                keys = missing.setdefault(row, [])
                if name in present[int(completed.codes[row])] and key not in keys:
                    keys.append(key)
        return [(row, tuple(keys)) for row, keys in missing.items() if keys]

    def _records_of(self, data_input: DataInput, rows: Array) -> InputRecords:
        """The entries of an input's catalogue, and for each window the number of its entry, -1 where it has none."""
        return self._reader.records(catalogue(self._key(data_input)), self._fingerprints(data_input)[rows])

    def _fingerprints(self, data_input: DataInput) -> Array:
        """For each window of the dataset the fingerprint of an input's files, uint64 ``N 2``."""
        return self.index.fingerprints([layer_of(option) for option in data_input.layers])

    def _key(self, data_input: DataInput) -> str:
        return input_key(self._dataset, data_input)


def input_key(dataset: Dataset, data_input: DataInput) -> str:
    """The hash of all configuration that decides what the records of an input contain; it names their catalogue.

    Not part of it: the input's name, and ``load_all_layers`` (whether a sample gets all item groups or one of them),
    since a record has all of them.
    """
    layers = sorted({layer_of(option) for option in data_input.layers})
    configuration: dict[str, Any] = {
        "format": FORMAT,
        "rslearn": RSLEARN_VERSION,
        "type": data_input.data_type,
        "layers": list(data_input.layers),
        "bands": data_input.bands,
        "band_set": data_input.use_all_bands_in_order_of_band_set_idx,
        "dtype": str(data_input.dtype.value),
        "all_groups": data_input.load_all_item_groups,
        "resolution": [data_input.resolution_factor.numerator, data_input.resolution_factor.denominator],
        "labels": data_input.key() if isinstance(data_input, LabelInput) else None,
        "storage": type(dataset.window_data_storage_factory).__qualname__,
        "config": {
            layer: json.loads(dataset.layers[layer].model_dump_json(exclude={"data_source"}))
            for layer in layers
            if layer in dataset.layers
        },
    }
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def open_sample_cache(
    name: str, *, dataset: Dataset, inputs: Mapping[str, DataInput], settings: SampleCacheSettings
) -> SampleCache | None:
    """Open a dataset's sample cache and refresh its index.

    Args:
        name: the dataset's key in the run config.
        dataset: the dataset.
        inputs: all inputs that samples may read, targets too.
        settings: the user's choices.

    Returns:
        The sample cache, or None if it is off or can't be used, after a warning.

    Raises:
        DataError: a window's metadata can't be used.
        DiskError: with ``check_all``: the disk is full, or fails.
    """
    if settings.store == "off":
        return None
    if type(dataset.storage) is not FileWindowStorage:
        log.warning("%s: no sample cache, since the dataset's windows are not stored as files", name)
        return None
    layers = sorted({layer_of(option) for data_input in inputs.values() for option in data_input.layers})
    folder = cache_folder(dataset.path, settings.store)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index, trusted = _open_index(name, dataset.path, folder, layers, check_all=settings.check_all)
    except DataError as error:
        raise DataError(f"dataset {name!r}: {error}") from error
    except (OSError, ValueError) as error:
        if settings.check_all and isinstance(error, OSError) and (full := full_disk(error)):
            raise full from error
        log.warning("%s: no sample cache in %s, the dataset is read without one: %s", name, folder, error)
        return None
    return SampleCache(name, dataset=dataset, folder=folder, index=index, settings=settings, trusted=trusted)


def _open_index(
    name: str, path: UPath, folder: Path, layers: list[str], *, check_all: bool
) -> tuple[WindowIndex, bool]:
    """The index, brought up to date, and whether it is trusted: used without a check of every window's files."""
    key = hashlib.sha256("\n".join(layers).encode()).hexdigest()[:12]
    old = refresh.latest_index(folder, key, dataset=name)
    if not isinstance(path.fs, LocalFileSystem):
        scanner: refresh.Scanner = refresh.RemoteScanner(path.fs, f"{path.path.rstrip('/')}/windows", layers)
        return refresh.refresh_index(folder, key, scanner, old), False
    windows = Path(path.path) / "windows"
    if old is not None and not check_all and refresh.may_trust_index(old, windows):
        return old, True
    scanner = refresh.LocalScanner(windows, layers, workers=default_workers())
    return refresh.refresh_index(folder, key, scanner, old), False
