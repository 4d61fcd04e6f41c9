"""Samples of one dataset and split: each a pure function of (seed, dataset, window, draw)."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import random
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rslearn.dataset import Dataset
from rslearn.template_params import substitute_env_vars_in_string
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput
from rslearn.train.model_context import SampleMetadata
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.task import Task
from rslearn.train.transforms import Sequential
from rslearn.train.transforms.transform import Transform
from rslearn.utils.geometry import PixelBounds

from rslp import upstream
from rslp.data import crops
from rslp.data.bad_samples import as_data_error, check_finite, check_target
from rslp.data.cache.cache import SampleCache
from rslp.data.dataset_arguments import SKIPS_TARGETS
from rslp.data.windows import DirectWindows, Windows
from rslp.errors import DataError
from rslp.runtime import class_paths
from rslp.runtime.slow_reads import read_with_notice, slow_read_watch
from rslp.upstream import nodata, vectors

Sample = tuple[dict[str, Any], dict[str, Any], SampleMetadata]
# What a transform raises at an image that it can't take.
# Of what a library says of a config, in a message.
_LONGEST = 300
_TRANSFORM_FAULTS = (DataError, ValueError, LookupError, AssertionError, RuntimeError)
# Between two attempts to read an input, as in rslearn.
RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class SampleKey:
    """Which sample to draw.

    Attributes:
        dataset: the dataset's key.
        index: the sample's index in its split.
        draw: how often the mixture has drawn it before; 0 outside training.
    """

    dataset: str
    index: int
    draw: int


def stable_seed(*parts: object) -> int:
    """A 64-bit seed from any printable parts, the same in every process and on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def seed_torch(seed: int, device: torch.device) -> None:
    """``torch.manual_seed``; on the CPU without what that spends on devices not in use, a stack trace for each kind."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with python's, numpy's and torch's global generators seeded, and put them back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@dataclass(frozen=True)
class _Place:
    """Where a sample lies: the window's number, its crop if all are loaded, and the crop's index and their number."""

    window: int
    bounds: PixelBounds | None
    crop: tuple[int, int]


class SampleSource:
    """The samples of one split of one dataset.

    Args:
        name: the dataset's key in the run config.
        data_module: rslearn's description of the dataset: path, inputs, task, settings of the splits.
        split: "train", "val", "test" or "predict".
        seed: the run's seed.
        store: the dataset's store, if there is one.
        read_timeout: seconds that reading an input may take; None means for ever.

    Raises:
        DataError: the folder or its config.json is missing or unreadable, no window is left, or labels are to be
            skipped that an evaluation needs.
    """

    def __init__(
        self,
        name: str,
        *,
        data_module: RslearnDataModule,
        split: str,
        seed: int,
        store: SampleCache | None = None,
        read_timeout: float | None = None,
    ) -> None:
        self.name = name
        self.split = split
        self.task = data_module.task
        self.seed = seed
        self._retries = data_module.retries
        self._read_timeout = read_timeout
        # The tasks whose class 0 is background to the model, which no object can have.
        self.background: Set[str] = frozenset()
        self._config = upstream.split_config(data_module, split)
        self._load_targets = split != "predict" and not self._config.get_skip_targets()
        if split != "predict" and not self._load_targets:
            raise DataError(f"dataset {name!r}, split {split!r}: skip_targets {SKIPS_TARGETS}")
        # Training is on what crops hold; an evaluation counts what several of them hold once.
        self._counts_once = split in ("val", "test")
        self._unclipped = crops.unclipped(self.task) if self._counts_once else None
        inputs = nodata.with_labels(data_module.inputs, data_module.task)
        self._inputs = {k: v for k, v in inputs.items() if self._load_targets or not v.is_target}
        self._transforms = Sequential(*map(self._for_missing_targets, self._config.transforms or []))
        self._windows = self._list_windows(store, data_module)
        # A prediction is of whole windows: where only a crop would be drawn, all of them are loaded.
        tiled = self._config.get_load_all_crops() or (split == "predict" and self._config.get_crop_size() is not None)
        self._crops = self._list_crops() if tiled else None
        if not len(self):
            raise DataError(
                f"dataset {name!r} has no windows for split {split!r} (path {data_module.path}, "
                f"groups {self._config.groups}, tags {self._config.tags}): "
                "check the tags of its windows, and that the layers its inputs name are materialised"
            )

    def __len__(self) -> int:
        """Number of samples: windows, or crops where the split loads all of them."""
        return len(self._windows) if self._crops is None else len(self._crops)

    def identity(self, index: int) -> str:
        """``dataset/group/window/x0_y0_x1_y1``, the bounds in pixels of the window's projection."""
        place = self._place(index)
        bounds = place.bounds or self._windows.bounds(place.window)
        group, name = self._windows.identity(place.window)
        return f"{self.name}/{group}/{name}/" + "_".join(map(str, bounds))

    @property
    def is_deterministic(self) -> bool:
        """Whether a sample is the same at each draw: no random crop, no choice of item groups, no random transform."""
        whole = self._crops is not None or self._config.get_crop_size() is None
        return (
            whole
            and upstream.are_deterministic(self._config.transforms or [])
            and self._windows.has_single_item_groups(self._inputs)
        )

    def fingerprints(self) -> np.ndarray[Any, np.dtype[np.uint64]] | None:
        """What each sample is read from, as ``N 2`` words that change with any file; None if that is not known."""
        fingerprints = self._windows.fingerprints(self._inputs)
        if fingerprints is None or self._crops is None:
            return fingerprints
        chosen: np.ndarray[Any, np.dtype[np.uint64]] = fingerprints[self._crops[:, 0]]
        return chosen ^ (self._crops[:, 1:2].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def window_is_unchanged(self, index: int) -> bool:
        """Whether the sample's window still is what ``prints`` says."""
        return self._windows.window_is_unchanged(self._place(index).window)

    def window(self, index: int) -> tuple[str, str]:
        """Group and name of the window that a sample is of."""
        return self._windows.identity(self._place(index).window)

    @property
    def overlap(self) -> int:
        """Pixels that neighbouring crops of a window share."""
        return 0 if self._crops is None else self._config.get_overlap_pixels()

    def windows_with(self, layer: str) -> set[tuple[str, str]]:
        """Group and name of the windows that have a layer already."""
        return {
            self._windows.identity(i) for i in range(len(self._windows)) if self._windows[i].is_layer_completed(layer)
        }

    def sample(self, index: int, *, draw: int = 0) -> Sample:
        """Read and transform one sample.

        Args:
            index: which one.
            draw: how often it was drawn before; another draw is another crop and another augmentation.

        Returns:
            (inputs, targets by task, metadata); rasters are ``C T H W``.

        Raises:
            DataError: it can't be read; the message names dataset and window.
        """
        what = self.identity(index)
        rng = random.Random(stable_seed(self.seed, what, draw))
        raw, (inputs, targets, metadata) = self._read(index, what=what, wanted=self._inputs, rng=rng, draw_crop=True)
        inputs.update({name: raw[name] for name, spec in self._inputs.items() if spec.passthrough and name in raw})
        with seeded(rng.getrandbits(63)), as_data_error(f"{what}: the transforms fail", kinds=_TRANSFORM_FAULTS):
            inputs, targets = self._transforms(inputs, targets)
        # Here, since a transform may mend an image (fill its gaps) or spoil it (the logarithm of 0).
        check_finite(inputs, inputs=self._inputs, what=what)
        return inputs, targets, upstream.with_dataset(metadata, self.name)

    def targets(self, index: int) -> dict[str, Any]:
        """The targets of a sample by task, without reading its images and without transforms.

        Raises:
            DataError: as ``sample``.
        """
        labels = {name: spec for name, spec in self._inputs.items() if spec.is_target}
        what = self.identity(index)
        rng = random.Random(stable_seed(self.seed, what, "targets"))
        return self._read(index, what=what, wanted=labels, rng=rng, draw_crop=False)[1][1]

    def note(self, what: str, indices: Sequence[int]) -> Path | None:
        """The file that may keep what was learnt from the targets of some samples; another one as soon as they change.

        Args:
            what: names what is learnt, and how.
            indices: the samples.

        Returns:
            None where it can't be told what the targets depend on: without a store, or with a task of the user's own.
        """
        if self._windows.folder is None or not _known(self.task):
            return None
        labels = {name: spec for name, spec in self._inputs.items() if spec.is_target}
        places = [self._place(index) for index in indices]
        windows = self._windows.combined_fingerprint([place.window for place in places], labels)
        if windows is None:
            return None
        try:
            how = pickle.dumps([self.task, labels])
        except (pickle.PicklingError, TypeError, AttributeError):
            return None
        parts = (what, self.seed, self.name, [(place.bounds, place.crop) for place in places], windows, how.hex())
        digest = hashlib.sha256(repr([*parts, version("rslearn")]).encode()).hexdigest()
        return self._windows.folder / f"note-{digest[:32]}.col"

    def _read(
        self, index: int, *, what: str, wanted: dict[str, DataInput], rng: random.Random, draw_crop: bool
    ) -> tuple[upstream.RawInputs, Sample]:
        place = self._place(index)
        size = self._config.get_crop_size() if draw_crop else None
        bounds = place.bounds or upstream.draw_crop(self._windows.bounds(place.window), size, rng)
        raw: upstream.RawInputs = {}
        for name, spec in wanted.items():
            layer = f"{what}: layer {', '.join(spec.layers)}"
            with as_data_error(f"{layer}: can't read the sample"):
                reading = partial(self._read_input, place.window, {name: spec}, bounds=bounds, rng=rng)
                raw |= read_with_notice(self._read_timeout, reading, what=layer)
        metadata = self._metadata(place, bounds)
        raw, hidden = nodata.remove_marks(raw, wanted)
        with as_data_error(f"{what}: layer {', '.join(self._layers_of(None))}: can't read the label"):
            for _, one, name in nodata.label_readers(raw, self.task):
                vectors.refuse_null(one, upstream.filtered(one, raw[name]))
            raw |= {name: vectors.whole_pixels(one, raw[name]) for _, one, name in nodata.label_readers(raw, self.task)}
            inputs, targets = upstream.process_inputs(
                self.task, raw, metadata=metadata, load_targets=self._load_targets
            )
        if self._load_targets:
            nodata.mask_unlabelled(self.task, targets, hidden)
            self._check(targets, what=what)
        if self._counts_once:
            targets = self._counted(targets, raw=raw, metadata=metadata)
        return raw, (inputs, targets, metadata)

    def _read_input(
        self, window: int, inputs: dict[str, DataInput], *, bounds: PixelBounds, rng: random.Random
    ) -> upstream.RawInputs:
        """Read an input; where the file system fails, again after a pause, as often as ``retries`` says."""
        drawn = rng.getstate()
        for _ in range(self._retries):
            try:
                return self._windows.read(window, bounds=bounds, inputs=inputs, rng=rng)
            except OSError:
                # The next attempt draws the same item group.
                rng.setstate(drawn)
                time.sleep(RETRY_SECONDS)
        return self._windows.read(window, bounds=bounds, inputs=inputs, rng=rng)

    def _counted(self, targets: dict[str, Any], *, raw: upstream.RawInputs, metadata: SampleMetadata) -> dict[str, Any]:
        """The targets with what of them counts in this crop."""
        place = crops.crop_place(metadata, overlap=self.overlap)
        whole: dict[str, Any] = {}
        if self._unclipped is not None and place.own is not None:
            whole = upstream.process_inputs(self._unclipped, raw, metadata=metadata, load_targets=True)[1]
        if not isinstance(self.task, MultiTask):
            return crops.counted_target(self.task, targets, metadata=metadata, place=place, whole=whole)
        return {
            name: crops.counted_target(task, targets[name], metadata=metadata, place=place, whole=whole.get(name))
            for name, task in self.task.tasks.items()
        }

    def _metadata(self, place: _Place, bounds: PixelBounds) -> SampleMetadata:
        """Without ``dataset_source``, which rslearn's MultiTask would take for a task's name."""
        group, name = self._windows.identity(place.window)
        return SampleMetadata(
            window_group=group,
            window_name=name,
            window_bounds=self._windows.bounds(place.window),
            crop_bounds=bounds,
            crop_idx=place.crop[0],
            num_crops_in_window=place.crop[1],
            time_range=self._windows.time_range(place.window),
            projection=self._windows.projection(place.window),
            dataset_source=None,
        )

    def _check(self, targets: dict[str, Any], *, what: str) -> None:
        """Check the labels of each task, before a transform touches them."""
        several = self.task.tasks if isinstance(self.task, MultiTask) else {self.name: self.task}
        for name, task in several.items():
            target = targets[name] if isinstance(self.task, MultiTask) else targets
            layers = self._layers_of(name if isinstance(self.task, MultiTask) else None)
            where = f"{what}: layer {', '.join(layers)}"
            check_target(task, target, what=where, background=name in self.background)

    def _layers_of(self, task: str | None) -> list[str]:
        """The layers that hold the labels, of one task of several or of all."""
        of = self.task.input_mapping[task] if task is not None and isinstance(self.task, MultiTask) else self._inputs
        read = [self._inputs[name] for name in of if name in self._inputs]
        return sorted({layer for spec in read if spec.is_target for layer in spec.layers})

    def _for_missing_targets(self, transform: torch.nn.Module) -> torch.nn.Module:
        """The transform; where no labels are read, one that leaves out what it can't find of them."""
        if self._load_targets or not isinstance(transform, Transform):
            return transform
        told = copy.copy(transform)
        told.skip_missing = True
        return told

    def _list_windows(self, store: SampleCache | None, data_module: RslearnDataModule) -> Windows:
        if store is not None:
            return store.windows(self._inputs, self._config, what=self.split)
        dataset = open_dataset(self.name, data_module)
        try:
            with slow_read_watch.over(f"dataset {self.name!r}: the list of its windows"):
                return DirectWindows(dataset, upstream.list_windows(dataset, self._inputs, self._config))
        except DataError as error:
            raise DataError(f"dataset {self.name!r}: {error}") from error

    def _place(self, index: int) -> _Place:
        if self._crops is None:
            return _Place(index, None, (0, 1))
        window, number, count, *bounds = self._crops[index].tolist()
        return _Place(window, (bounds[0], bounds[1], bounds[2], bounds[3]), (number, count))

    def _list_crops(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """A row for each crop: its window, its index, the number of crops in the window, and its bounds."""
        rows: list[tuple[int, ...]] = []
        for i in range(len(self._windows)):
            crops = upstream.all_crops(self._windows.bounds(i), self._config)
            rows += [(i, number, len(crops), *bounds) for number, bounds in enumerate(crops)]
        return np.array(rows, np.int64).reshape(-1, 7)


def _known(task: Task) -> bool:
    """Whether a task is one of rslearn's, whose code is known by its version."""
    tasks = [task, *task.tasks.values()] if isinstance(task, MultiTask) else [task]
    return all(type(one).__module__.startswith("rslearn.train.tasks.") for one in tasks)


def open_dataset(name: str, data_module: RslearnDataModule) -> Dataset:
    """Open a dataset's folder.

    Raises:
        DataError: there is no such folder, or its config.json is missing or broken.
    """
    path = data_module.path
    if not (path / "config.json").is_file():
        what = "has no config.json, so it is no rslearn dataset" if path.exists() else "does not exist"
        raise DataError(f"dataset {name!r}: {Path(str(path)) if '://' not in str(path) else path} {what}")
    try:
        # Formats are made when they are first used, by a parser that would end the process.
        described = json.loads(substitute_env_vars_in_string((path / "config.json").read_text()))
        for at, reason in class_paths.refusals(described):
            raise DataError(f"dataset {name!r}: {path}/config.json: {'.'.join(map(str, at))}: {reason}")
        return upstream.open_dataset(path)
    except ValidationError as error:
        said = {"extra_forbidden": "unknown key"}
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {said.get(e['type'], e['msg'])}" for e in error.errors())
        raise DataError(f"dataset {name!r}: {path}/config.json: {wrong}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ImportError, OSError, SystemExit) as error:
        # jsonargparse, which makes a storage that a config names, ends the process at one that is none.
        cause = error.__context__ or error if isinstance(error, SystemExit) else error
        what = f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:_LONGEST]
        raise DataError(f"dataset {name!r}: {path}/config.json is broken: {what}") from error
