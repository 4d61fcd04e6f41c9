"""The windows of a split and how their inputs are read: the protocol, and reading from the dataset itself."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rslearn.dataset import Dataset, Window
from rslearn.train.dataset import DataInput
from rslearn.utils.geometry import PixelBounds, Projection

from rslp import upstream
from rslp.data.cache.columns import Array
from rslp.data.cache.records import TimeRange


class Windows(Protocol):
    """The windows of a split, numbered in the split's order. ``CachedWindows`` reads them from the sample cache."""

    def __len__(self) -> int:
        """Number of windows."""

    def __getitem__(self, i: int) -> Window:
        """A window as rslearn's own object."""

    def identity(self, i: int) -> tuple[str, str]:
        """Group and name of a window."""

    def bounds(self, i: int) -> PixelBounds:
        """A window's bounds x0, y0, x1, y1 (px)."""

    def combined_fingerprint(self, numbers: Iterable[int], inputs: Mapping[str, DataInput]) -> str | None:
        """One fingerprint of some windows' content of some inputs; None where it is not known without reading."""

    @property
    def folder(self) -> Path | None:
        """The folder of the sample cache; None if there is none."""

    def time_range(self, i: int) -> TimeRange | None:
        """A window's time range, if it has one."""

    def projection(self, i: int) -> Projection:
        """A window's projection."""

    def read(
        self, i: int, *, bounds: PixelBounds, inputs: Mapping[str, DataInput], rng: random.Random
    ) -> upstream.RawInputs:
        """Read the inputs of one sample.

        Args:
            i: the window's number.
            bounds: the crop to read, x0, y0, x1, y1 (px).
            inputs: the inputs to read.
            rng: random generator for the choice of item groups.
        """

    def fingerprints(self, inputs: Mapping[str, DataInput]) -> Array | None:
        """Content fingerprint of each window, uint64 ``N 2``, which changes with any of its files; None if unknown."""

    def window_is_unchanged(self, i: int) -> bool:
        """Whether a window's files still have the fingerprint that ``fingerprints`` gives."""

    def has_single_item_groups(self, inputs: Mapping[str, DataInput]) -> bool:
        """Whether each input has one item group at most in every window, so that each read gives the same."""


class DirectWindows:
    """Windows that are read from the dataset itself; see ``Windows`` for the methods.

    Fingerprints are unknown: only the index of a sample cache has the state of the files.
    """

    folder = None

    def __init__(self, dataset: Dataset, windows: Sequence[Window]) -> None:
        self._dataset = dataset
        self._windows = windows

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._windows)

    def __getitem__(self, i: int) -> Window:
        """A window as rslearn's own object."""
        return self._windows[i]

    def identity(self, i: int) -> tuple[str, str]:
        """Group and name of a window."""
        return self._windows[i].group, self._windows[i].name

    def bounds(self, i: int) -> PixelBounds:
        """A window's bounds x0, y0, x1, y1 (px)."""
        bounds: PixelBounds = self._windows[i].bounds
        return bounds

    def combined_fingerprint(self, numbers: Iterable[int], inputs: Mapping[str, DataInput]) -> str | None:  # noqa: ARG002
        """Return None: unknown."""
        return None

    def time_range(self, i: int) -> TimeRange | None:
        """A window's time range, if it has one."""
        span: TimeRange | None = self._windows[i].time_range
        return span

    def projection(self, i: int) -> Projection:
        """A window's projection."""
        return self._windows[i].projection

    def read(
        self, i: int, *, bounds: PixelBounds, inputs: Mapping[str, DataInput], rng: random.Random
    ) -> upstream.RawInputs:
        """Read the inputs of one sample, see ``Windows``."""
        return upstream.read_inputs(self._dataset, self._windows[i], bounds=bounds, inputs=dict(inputs), rng=rng)

    def fingerprints(self, inputs: Mapping[str, DataInput]) -> Array | None:  # noqa: ARG002
        """Return None: unknown."""
        return None

    def window_is_unchanged(self, i: int) -> bool:  # noqa: ARG002
        """Return False: unknown."""
        return False

    def has_single_item_groups(self, inputs: Mapping[str, DataInput]) -> bool:  # noqa: ARG002
        """Return False: unknown."""
        return False
