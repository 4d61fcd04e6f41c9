"""Samples of one dataset and split, each fixed by files, seed, identity and draw.

Reading one goes through these steps: choose the crop, read the inputs (from the sample cache or the dataset), let
rslearn's task make inputs and targets, mark nodata, check the targets, transform, check that the inputs are finite.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import random
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rslearn.dataset import Dataset
from rslearn.template_params import substitute_env_vars_in_string
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, SamplerFactory
from rslearn.train.model_context import SampleMetadata
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.task import Task
from rslearn.train.transforms import Sequential
from rslearn.train.transforms.transform import Transform
from rslearn.utils.geometry import PixelBounds

from rslp import upstream
from rslp.data import crops
from rslp.data.bad_samples import as_data_error, check_finite, check_target
from rslp.data.cache.cache import RSLEARN_VERSION, SampleCache
from rslp.data.cache.windows import CachedWindows, Windows
from rslp.data.dataset_arguments import SKIPS_TARGETS
from rslp.errors import DataError
from rslp.runtime import class_paths
from rslp.runtime.seeds import seeded, stable_seed
from rslp.runtime.slow_reads import read_with_notice, slow_read_watch
from rslp.upstream import nodata, vectors
from rslp.upstream.places import place_of
from rslp.upstream.task_kinds import tasks_by_name

# Inputs by name, targets (by task for a MultiTask), metadata.
Sample = tuple[dict[str, Any], dict[str, Any], SampleMetadata]
# Exceptions of a transform that can't handle a sample; any other one ends the run as a defect.
_TRANSFORM_ERRORS = (DataError, ValueError, LookupError, AssertionError, RuntimeError)
# The pause between two attempts to read an input, as in rslearn.
RETRY_SECONDS = 5.0
# The longest part of a library's error text that is shown.
_MAX_TEXT = 300


@dataclass(frozen=True)
class SampleKey:
    """Which sample to read, and which of its random crops and augmentations.

    Attributes:
        dataset: the dataset's key in the run config.
        index: the sample's index in its split.
        draw: how often the mixture has drawn it before; while the encoder is frozen, the number of its view instead; 0
            outside training.
    """

    dataset: str
    index: int
    draw: int


@dataclass(frozen=True)
class _SampleCrop:
    """The crop of a sample.

    Attributes:
        window: the window's index in the split.
        bounds: x0, y0, x1, y1 in pixels of the window's projection; None for the whole window, or a crop that is drawn
            at random at each draw.
        index_and_count: the crop's index in its window, and the number of crops of the window.
    """

    window: int
    bounds: PixelBounds | None
    index_and_count: tuple[int, int]


class SampleSource:
    """The samples of one split of one dataset, numbered from 0 to ``len() - 1``.

    A sample shows one window: all of it, one random crop of it, or (``load_all_crops``) one of the crops that tile it.

    Args:
        name: the dataset's key in the run config.
        data_module: rslearn's data module of the dataset: path, inputs, task, settings of the splits.
        split: "train", "val", "test" or "predict".
        seed: the run's seed.
        sample_cache: the dataset's sample cache; None reads the dataset's own files.
        read_timeout: seconds after which reading an input is given up; None waits for ever.

    Raises:
        DataError: the folder or its config.json is missing or unreadable, the split has no windows, or the split's
            settings skip the labels, which only a prediction can do without.
    """

    def __init__(
        self,
        name: str,
        *,
        data_module: RslearnDataModule,
        split: str,
        seed: int,
        sample_cache: SampleCache | None = None,
        read_timeout: float | None = None,
    ) -> None:
        self.name = name
        self.split = split
        self.task = data_module.task
        self.seed = seed
        self._path = data_module.path
        self._retries = data_module.retries
        self._read_timeout = read_timeout
        # Tasks whose detector takes class 0 for background, so that no object can have it; set from the model, later.
        self.background: Set[str] = frozenset()
        self._config = upstream.split_config(data_module, split)
        self._load_targets = split != "predict" and not self._config.get_skip_targets()
        if split != "predict" and not self._load_targets:
            raise DataError(f"dataset {name!r}, split {split!r}: skip_targets {SKIPS_TARGETS}")
        # Training uses all that a crop shows. In an evaluation, what overlapping crops share counts in one alone.
        self._counts_once = split in ("val", "test")
        self._unclipped = crops.unclipped(self.task) if self._counts_once else None
        inputs = nodata.with_labels(data_module.inputs, data_module.task)
        self._inputs = {k: v for k, v in inputs.items() if self._load_targets or not v.is_target}
        self._transforms = Sequential(*map(self._tolerating_missing_targets, self._config.transforms or []))
        self._cached: CachedWindows | None = None
        if sample_cache is not None:
            self._cached = sample_cache.windows(self._inputs, self._config, split=split)
        self._windows: Windows = self._list_windows(data_module) if self._cached is None else self._cached
        # A prediction covers whole windows: where one random crop would be drawn, all crops are loaded.
        tiled = self._config.get_load_all_crops() or (split == "predict" and self._config.get_crop_size() is not None)
        self._crops = self._list_crops() if tiled else None
        if not len(self):
            raise DataError(
                f"dataset {name!r} has no windows for split {split!r} (path {data_module.path}, "
                f"groups {self._config.groups}, tags {self._config.tags}): "
                "check the tags of its windows, and that the layers its inputs name are materialised"
            )

    def __len__(self) -> int:
        """Number of samples: windows, or crops where the split loads all crops."""
        return len(self._windows) if self._crops is None else len(self._crops)

    def identity(self, index: int) -> str:
        """``dataset/group/window/x0_y0_x1_y1``, the bounds in pixels of the window's projection.

        They are the bounds of the sample's crop; where crops are drawn at random, those of the whole window.
        """
        crop = self._crop(index)
        bounds = crop.bounds or self._windows.bounds(crop.window)
        group, name = self._windows.identity(crop.window)
        return f"{self.name}/{group}/{name}/" + "_".join(map(str, bounds))

    @property
    def is_deterministic(self) -> bool:
        """Whether a sample is the same at each draw: no random crop, item group or transform.

        An item group is what rslearn makes one raster of, such as the scenes of one month; an input without
        ``load_all_layers`` reads one of them, chosen at random.
        """
        has_fixed_crops = self._crops is not None or self._config.get_crop_size() is None
        return (
            has_fixed_crops
            and upstream.are_deterministic(self._config.transforms or [])
            and self._cached is not None
            and self._cached.has_single_item_groups(self._inputs)
        )

    def fingerprints(self) -> np.ndarray[Any, np.dtype[np.uint64]] | None:
        """Content fingerprint of each sample, uint64 ``N 2``, which changes with any of its files.

        None if it is not known without reading, that is without a sample cache.
        """
        if self._cached is None:
            return None
        fingerprints = self._cached.fingerprints(self._inputs)
        if self._crops is None:
            return fingerprints
        of_windows: np.ndarray[Any, np.dtype[np.uint64]] = fingerprints[self._crops[:, 0]]
        # Multiplied by 2^64 / golden ratio, so that the crops of one window differ in many bits.
        return of_windows ^ (self._crops[:, 1:2].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def bands(self) -> dict[str, list[str]]:
        """The bands of each raster input, by the input's name; labels are left out."""
        return {name: list(spec.bands or ()) for name, spec in self._inputs.items() if not spec.is_target}

    def window_places(self, most: int) -> list[tuple[str, str, float, float]]:
        """Group, name, longitude and latitude of windows: of at most so many, evenly spread over the split."""
        count = len(self._windows)
        places = []
        for index in range(0, count, max(1, -(-count // most))):
            place = place_of(self._windows.projection(index), self._windows.bounds(index))
            places.append((*self._windows.identity(index), *place))
        return places

    @property
    def cache_folder(self) -> Path | None:
        """The folder of the dataset's sample cache; None if there is none."""
        return None if self._cached is None else self._cached.folder

    def dataset_config(self) -> bytes:
        """The content of the dataset's ``config.json``."""
        content: bytes = (self._path / "config.json").read_bytes()
        return content

    def window_is_unchanged(self, index: int) -> bool:
        """Whether the sample's window still has the fingerprint that ``fingerprints`` gives."""
        return self._cached is not None and self._cached.is_unchanged(self._crop(index).window)

    @property
    def sampler(self) -> SamplerFactory | None:
        """The sampler of the split's settings."""
        return self._config.sampler

    def window_options(self, index: int) -> Mapping[str, Any]:
        """The options of the sample's window."""
        options: Mapping[str, Any] = self._windows[self._crop(index).window].options
        return options

    def window(self, index: int) -> tuple[str, str]:
        """Group and name of the sample's window."""
        return self._windows.identity(self._crop(index).window)

    @property
    def overlap(self) -> int:
        """Width of the strip that neighbouring crops of a window share (px)."""
        return 0 if self._crops is None else self._config.get_overlap_pixels()

    def windows_with(self, layer: str) -> set[tuple[str, str]]:
        """Group and name of the windows that have data of a layer (rslearn calls it completed there)."""
        return {
            self._windows.identity(i) for i in range(len(self._windows)) if self._windows[i].is_layer_completed(layer)
        }

    def sample(self, index: int, *, draw: int = 0) -> Sample:
        """Read and transform one sample.

        Args:
            index: the sample's index in the split.
            draw: see ``SampleKey``; each draw has its own random crop and augmentation.

        Returns:
            (inputs, targets by task, metadata); rasters are ``C T H W``.

        Raises:
            DataError: the sample is bad; the message names dataset and window.
        """
        identity = self.identity(index)
        rng = random.Random(stable_seed(self.seed, identity, draw))
        raw, (inputs, targets, metadata) = self._read(index, identity, specs=self._inputs, rng=rng, draw_crop=True)
        inputs.update({name: raw[name] for name, spec in self._inputs.items() if spec.passthrough and name in raw})
        with seeded(rng.getrandbits(63)), as_data_error(f"{identity}: the transforms fail", kinds=_TRANSFORM_ERRORS):
            inputs, targets = self._transforms(inputs, targets)
        # After the transforms, since one may fill the gaps of an image, or make new ones (the logarithm of 0).
        check_finite(inputs, inputs=self._inputs, sample=identity)
        return inputs, targets, upstream.with_dataset(metadata, self.name)

    def targets(self, index: int) -> dict[str, Any]:
        """The targets of a sample by task, without reading its images and without transforms.

        They are those of the whole window where training would draw a random crop.

        Raises:
            DataError: as ``sample``.
        """
        labels = {name: spec for name, spec in self._inputs.items() if spec.is_target}
        identity = self.identity(index)
        rng = random.Random(stable_seed(self.seed, identity, "targets"))
        return self._read(index, identity, specs=labels, rng=rng, draw_crop=False)[1][1]

    def note(self, content: str, indices: Sequence[int]) -> Path | None:
        """The path at which a result computed from targets (a baseline) may be stored and looked up again.

        Its name is a hash of all that the result depends on, so changed labels lead to another path.

        Args:
            content: which result, and how it is computed.
            indices: the samples whose targets it depends on.

        Returns:
            None where targets can't be fingerprinted: without a sample cache, or for a task of the user's own class.
        """
        if self._cached is None or not _is_rslearn_task(self.task):
            return None
        labels = {name: spec for name, spec in self._inputs.items() if spec.is_target}
        sample_crops = [self._crop(index) for index in indices]
        windows = [crop.window for crop in sample_crops]
        if not all(map(self._cached.is_unchanged, windows)):
            return None
        try:
            pickled = pickle.dumps([self.task, labels])
        except (pickle.PicklingError, TypeError, AttributeError):
            return None
        bounds = [(crop.bounds, crop.index_and_count) for crop in sample_crops]
        fingerprints = self._cached.fingerprints(labels)[windows].tobytes()
        parts = [content, self.seed, self.name, bounds, fingerprints, pickled.hex(), RSLEARN_VERSION]
        return self._cached.folder / f"note-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.col"

    def _read(
        self, index: int, identity: str, *, specs: dict[str, DataInput], rng: random.Random, draw_crop: bool
    ) -> tuple[upstream.RawInputs, Sample]:
        """Read some inputs of a sample and make its targets.

        Args:
            index: the sample's index in the split.
            identity: its identity, for messages.
            specs: the inputs to read, by name, as the config specifies them.
            rng: source of randomness.
            draw_crop: whether to draw a random crop where the split has them; otherwise such a window is read whole.

        Returns:
            The inputs as they were read, and the sample before transforms.
        """
        crop = self._crop(index)
        size = self._config.get_crop_size() if draw_crop else None
        bounds = crop.bounds or upstream.draw_crop(self._windows.bounds(crop.window), size, rng)
        raw: upstream.RawInputs = {}
        for name, spec in specs.items():
            layer = f"{identity}: layer {', '.join(spec.layers)}"
            with as_data_error(f"{layer}: can't read the sample"):
                reading = partial(self._read_input, crop.window, {name: spec}, bounds=bounds, rng=rng)
                raw |= read_with_notice(self._read_timeout, reading, what=layer)
        metadata = self._metadata(crop, bounds)
        raw, unlabelled = nodata.remove_marks(raw, specs)
        with as_data_error(f"{identity}: layer {', '.join(self._label_layers(None))}: can't read the label"):
            readers = [(task, name) for _, task, name in nodata.label_readers(raw, self.task)]
            for task, name in readers:
                vectors.refuse_null(task, upstream.filtered(task, raw[name]))
            raw |= {name: vectors.whole_pixels(task, raw[name]) for task, name in readers}
            inputs, targets = upstream.process_inputs(
                self.task, raw, metadata=metadata, load_targets=self._load_targets
            )
        if self._load_targets:
            nodata.mask_unlabelled(self.task, targets, unlabelled)
            self._check_targets(targets, identity=identity)
        if self._counts_once:
            targets = self._count_once(targets, raw=raw, metadata=metadata)
        return raw, (inputs, targets, metadata)

    def _read_input(
        self, window: int, inputs: dict[str, DataInput], *, bounds: PixelBounds, rng: random.Random
    ) -> upstream.RawInputs:
        """Read an input; on an error of the file system try again, up to ``retries`` times, with pauses."""
        state = rng.getstate()
        for _ in range(self._retries):
            try:
                return self._windows.read(window, bounds=bounds, inputs=inputs, rng=rng)
            except OSError:
                # The next attempt draws the same item group.
                rng.setstate(state)
                time.sleep(RETRY_SECONDS)
        return self._windows.read(window, bounds=bounds, inputs=inputs, rng=rng)

    def _count_once(
        self, targets: dict[str, Any], *, raw: upstream.RawInputs, metadata: SampleMetadata
    ) -> dict[str, Any]:
        """The targets, in which only the pixels and objects that count in this crop are marked as counting.

        What overlapping crops share counts in one of them, see ``rslp.data.crops``.
        """
        place = crops.crop_place(metadata, overlap=self.overlap)
        unclipped: dict[str, Any] = {}
        if self._unclipped is not None and place.own is not None:
            unclipped = upstream.process_inputs(self._unclipped, raw, metadata=metadata, load_targets=True)[1]
        if not isinstance(self.task, MultiTask):
            return crops.counted_target(self.task, targets, metadata=metadata, place=place, unclipped_target=unclipped)
        return {
            name: crops.counted_target(
                task, targets[name], metadata=metadata, place=place, unclipped_target=unclipped.get(name)
            )
            for name, task in self.task.tasks.items()
        }

    def _metadata(self, crop: _SampleCrop, bounds: PixelBounds) -> SampleMetadata:
        group, name = self._windows.identity(crop.window)
        return SampleMetadata(
            window_group=group,
            window_name=name,
            window_bounds=self._windows.bounds(crop.window),
            crop_bounds=bounds,
            crop_idx=crop.index_and_count[0],
            num_crops_in_window=crop.index_and_count[1],
            time_range=self._windows.time_range(crop.window),
            projection=self._windows.projection(crop.window),
            # Set after the targets are made: rslearn's MultiTask would take it for a task's name.
            dataset_source=None,
        )

    def _check_targets(self, targets: dict[str, Any], *, identity: str) -> None:
        """Check the labels of each task, before a transform changes them."""
        for name, task in tasks_by_name(self.task, self.name).items():
            target = targets[name] if isinstance(self.task, MultiTask) else targets
            layers = self._label_layers(name if isinstance(self.task, MultiTask) else None)
            label = f"{identity}: layer {', '.join(layers)}"
            check_target(task, target, label=label, background=name in self.background)

    def _label_layers(self, task: str | None) -> list[str]:
        """The layers with the labels of one task of a MultiTask, or of all tasks."""
        names = self.task.input_mapping[task] if task is not None and isinstance(self.task, MultiTask) else self._inputs
        specs = [self._inputs[name] for name in names if name in self._inputs]
        return sorted({layer for spec in specs if spec.is_target for layer in spec.layers})

    def _tolerating_missing_targets(self, transform: torch.nn.Module) -> torch.nn.Module:
        """The transform; where no labels are read, a copy that ignores the absence of targets that it names."""
        if self._load_targets or not isinstance(transform, Transform):
            return transform
        tolerant = copy.copy(transform)
        tolerant.skip_missing = True
        return tolerant

    def _list_windows(self, data_module: RslearnDataModule) -> Windows:
        dataset = open_dataset(self.name, data_module)
        try:
            with slow_read_watch.over(f"dataset {self.name!r}: the list of its windows"):
                return Windows(dataset, upstream.list_windows(dataset, self._inputs, self._config))
        except DataError as error:
            raise DataError(f"dataset {self.name!r}: {error}") from error

    def _crop(self, index: int) -> _SampleCrop:
        if self._crops is None:
            return _SampleCrop(index, None, (0, 1))
        window, number, count, *bounds = self._crops[index].tolist()
        return _SampleCrop(window, (bounds[0], bounds[1], bounds[2], bounds[3]), (number, count))

    def _list_crops(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """A row for each crop: window, index in the window, number of crops of the window, x0, y0, x1, y1; ``N 7``."""
        rows: list[tuple[int, ...]] = []
        for i in range(len(self._windows)):
            crops = upstream.all_crops(self._windows.bounds(i), self._config)
            rows += [(i, number, len(crops), *bounds) for number, bounds in enumerate(crops)]
        return np.array(rows, np.int64).reshape(-1, 7)


def _is_rslearn_task(task: Task) -> bool:
    """Whether the class of a task, and of each part of a MultiTask, is rslearn's, whose version identifies its code."""
    tasks = [task, *task.tasks.values()] if isinstance(task, MultiTask) else [task]
    return all(type(part).__module__.startswith("rslearn.train.tasks.") for part in tasks)


def open_dataset(name: str, data_module: RslearnDataModule) -> Dataset:
    """Open a dataset's folder.

    Raises:
        DataError: there is no such folder, or its config.json is missing or broken.
    """
    path = data_module.path
    if not (path / "config.json").is_file():
        problem = "has no config.json, so it is no rslearn dataset" if path.exists() else "does not exist"
        raise DataError(f"dataset {name!r}: {Path(str(path)) if '://' not in str(path) else path} {problem}")
    try:
        # Before rslearn instantiates the classes that the file names, those that may not be imported are refused.
        config = json.loads(substitute_env_vars_in_string((path / "config.json").read_text()))
        for key_path, reason in class_paths.refusals(config):
            raise DataError(f"dataset {name!r}: {path}/config.json: {'.'.join(map(str, key_path))}: {reason}")
        return upstream.open_dataset(path)
    except ValidationError as error:
        texts = {"extra_forbidden": "unknown key"}
        listed = "; ".join(f"{'.'.join(map(str, e['loc']))}: {texts.get(e['type'], e['msg'])}" for e in error.errors())
        raise DataError(f"dataset {name!r}: {path}/config.json: {listed}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ImportError, OSError, SystemExit) as error:
        # jsonargparse, which instantiates the storage that a config names, ends the process where it can't.
        cause = error.__context__ or error if isinstance(error, SystemExit) else error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:_MAX_TEXT]
        raise DataError(f"dataset {name!r}: {path}/config.json is broken: {reason}") from error
