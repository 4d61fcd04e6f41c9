"""Samples of one dataset and split: each a pure function of (seed, dataset, window, draw)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rslearn.dataset import Dataset, Window
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput
from rslearn.train.model_context import SampleMetadata
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.transforms import Sequential
from rslearn.utils.geometry import PixelBounds

from rslp.errors import DataError
from rslp.train import adapters
from rslp.train.soundness import check_finite, check_target, faults_of

Sample = tuple[dict[str, Any], dict[str, Any], SampleMetadata]
# What a transform raises at an image that it can't take.
_TRANSFORM_FAULTS = (ValueError, LookupError, AssertionError, RuntimeError)


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


def seed_of(*parts: object) -> int:
    """A 64-bit seed from any printable parts, the same in every process and on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


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
    """Where a sample lies: a window and, when all crops are loaded, the crop with its index and the crops' number."""

    window: Window
    bounds: PixelBounds | None
    crop: tuple[int, int]


class SampleSource:
    """The samples of one split of one dataset.

    Args:
        name: the dataset's key in the run config.
        data_module: rslearn's description of the dataset: path, inputs, task, settings of the splits.
        split: "train", "val", "test" or "predict".
        seed: the run's seed.

    Raises:
        DataError: the folder or its config.json is missing or unreadable, or no window is left.
    """

    def __init__(self, name: str, *, data_module: RslearnDataModule, split: str, seed: int) -> None:
        self.name = name
        self.split = split
        self.task = data_module.task
        self.seed = seed
        self._dataset = open_dataset(name, data_module)
        self._config = adapters.split_config(data_module, split)
        self._load_targets = split != "predict" and not self._config.get_skip_targets()
        self._inputs = {k: v for k, v in data_module.inputs.items() if self._load_targets or not v.is_target}
        self._transforms = Sequential(*(self._config.transforms or []))
        self._places = self._list_places()
        if not self._places:
            raise DataError(
                f"dataset {name!r} has no windows for split {split!r} (path {data_module.path}, "
                f"groups {self._config.groups}, tags {self._config.tags}): "
                "check the tags of its windows, and that the layers its inputs name are materialised"
            )

    def __len__(self) -> int:
        """Number of samples: windows, or crops where the split loads all of them."""
        return len(self._places)

    def identity(self, index: int) -> str:
        """``dataset/group/window/x0_y0_x1_y1``, the bounds in pixels of the window's projection."""
        place = self._places[index]
        bounds = place.bounds or place.window.bounds
        return f"{self.name}/{place.window.group}/{place.window.name}/" + "_".join(map(str, bounds))

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
        place = self._places[index]
        rng = random.Random(seed_of(self.seed, self.identity(index), draw))
        bounds = place.bounds or adapters.draw_crop(place.window, self._config.get_crop_size(), rng)
        raw, (inputs, targets, metadata) = self._read(index, bounds=bounds, wanted=self._inputs, rng=rng)
        inputs.update({name: raw[name] for name, spec in self._inputs.items() if spec.passthrough and name in raw})
        what = self.identity(index)
        with seeded(rng.getrandbits(63)), faults_of(f"{what}: the transforms fail", kinds=_TRANSFORM_FAULTS):
            inputs, targets = self._transforms(inputs, targets)
        # Here, since a transform may mend an image (fill its gaps) or spoil it (the logarithm of 0).
        check_finite(inputs, inputs=self._inputs, what=what)
        return inputs, targets, adapters.with_dataset(metadata, self.name)

    def targets(self, index: int) -> dict[str, Any]:
        """The targets of a sample by task, without reading its images and without transforms.

        Raises:
            DataError: as ``sample``.
        """
        place = self._places[index]
        labels = {name: spec for name, spec in self._inputs.items() if spec.is_target}
        rng = random.Random(seed_of(self.seed, self.identity(index), "targets"))
        return self._read(index, bounds=place.bounds or place.window.bounds, wanted=labels, rng=rng)[1][1]

    def _read(
        self, index: int, *, bounds: PixelBounds, wanted: dict[str, DataInput], rng: random.Random
    ) -> tuple[adapters.RawInputs, Sample]:
        place, what = self._places[index], self.identity(index)
        raw: adapters.RawInputs = {}
        for name, spec in wanted.items():
            with faults_of(f"{what}: layer {', '.join(spec.layers)}: can't read the sample"):
                raw |= adapters.read_inputs(self._dataset, place.window, bounds=bounds, inputs={name: spec}, rng=rng)
        metadata = adapters.sample_metadata(place.window, bounds=bounds, crop=place.crop)
        with faults_of(f"{what}: layer {', '.join(self._layers_of(None))}: can't read the label"):
            inputs, targets = self.task.process_inputs(raw, metadata=metadata, load_targets=self._load_targets)
        if self._load_targets:
            self._check(targets, what=what)
        return raw, (inputs, targets, metadata)

    def _check(self, targets: dict[str, Any], *, what: str) -> None:
        """Check the labels of each task, before a transform touches them."""
        if not isinstance(self.task, MultiTask):
            return check_target(self.task, targets, what=f"{what}: layer {', '.join(self._layers_of(None))}")
        for name, task in self.task.tasks.items():
            check_target(task, targets[name], what=f"{what}: layer {', '.join(self._layers_of(name))}")
        return None

    def _layers_of(self, task: str | None) -> list[str]:
        """The layers that hold the labels, of one task of several or of all."""
        of = self.task.input_mapping[task] if task is not None and isinstance(self.task, MultiTask) else self._inputs
        read = [self._inputs[name] for name in of if name in self._inputs]
        return sorted({layer for spec in read if spec.is_target for layer in spec.layers})

    def _list_places(self) -> list[_Place]:
        windows = adapters.list_windows(self._dataset, self._inputs, self._config)
        if not self._config.get_load_all_crops():
            return [_Place(window, None, (0, 1)) for window in windows]
        places = []
        for window in windows:
            crops = adapters.all_crops(window, self._config)
            places += [_Place(window, bounds, (i, len(crops))) for i, bounds in enumerate(crops)]
        return places


def open_dataset(name: str, data_module: RslearnDataModule) -> Dataset:
    """Open a dataset's folder.

    Raises:
        DataError: there is no such folder, or its config.json is missing or broken.
    """
    path = data_module.path
    if not (path / "config.json").exists():
        what = "has no config.json, so it is no rslearn dataset" if path.exists() else "does not exist"
        raise DataError(f"dataset {name!r}: {Path(str(path)) if '://' not in str(path) else path} {what}")
    try:
        return adapters.keep_formats(Dataset(path))
    except ValueError as error:  # pydantic's and json's errors are ValueErrors
        raise DataError(f"dataset {name!r}: {path}/config.json is broken: {error}") from error
