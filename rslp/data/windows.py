"""The windows of a split, and how what they hold is read."""

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
    """The windows of a split, in its order."""

    def __len__(self) -> int:
        """Number of windows."""

    def __getitem__(self, i: int) -> Window:
        """A window as rslearn's own object."""

    def identity(self, i: int) -> tuple[str, str]:
        """Group and name of a window."""

    def bounds(self, i: int) -> PixelBounds:
        """A window's bounds (pixels)."""

    def combined_fingerprint(self, numbers: Iterable[int], inputs: Mapping[str, DataInput]) -> str | None:
        """What is read of some windows depends on this; None where nobody can tell.

        Args:
            numbers: which windows.
            inputs: what is read of them.
        """

    @property
    def folder(self) -> Path | None:
        """Where notes on the windows may be kept, if anywhere."""

    def time_range(self, i: int) -> TimeRange | None:
        """A window's time range, if it has one."""

    def projection(self, i: int) -> Projection:
        """A window's projection."""

    def read(
        self, i: int, *, bounds: PixelBounds, inputs: Mapping[str, DataInput], rng: random.Random
    ) -> upstream.RawInputs:
        """Read what a sample needs of a window.

        Args:
            i: which window.
            bounds: the crop to read, pixels.
            inputs: what to read.
            rng: where draws of item groups come from.
        """

    def fingerprints(self, inputs: Mapping[str, DataInput]) -> Array | None:
        """What each window holds of some inputs: ``N 2`` words that change with any of its files; None if unknown."""

    def window_is_unchanged(self, i: int) -> bool:
        """Whether a window still is what ``prints`` says."""

    def has_single_item_groups(self, inputs: Mapping[str, DataInput]) -> bool:
        """Whether no window leaves a choice of item groups: each reading of it gives the same."""


class DirectWindows:
    """Windows that are read from the dataset itself."""

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
        """A window's bounds (pixels)."""
        bounds: PixelBounds = self._windows[i].bounds
        return bounds

    folder = None

    def combined_fingerprint(self, numbers: Iterable[int], inputs: Mapping[str, DataInput]) -> str | None:  # noqa: ARG002
        """Nobody can tell without reading."""
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
        """Read what a sample needs of a window, see ``Windows``."""
        return upstream.read_inputs(self._dataset, self._windows[i], bounds=bounds, inputs=dict(inputs), rng=rng)

    def fingerprints(self, inputs: Mapping[str, DataInput]) -> Array | None:  # noqa: ARG002
        """Nothing: only an index knows what the files looked like."""
        return None

    def window_is_unchanged(self, i: int) -> bool:  # noqa: ARG002
        """Unknown."""
        return False

    def has_single_item_groups(self, inputs: Mapping[str, DataInput]) -> bool:  # noqa: ARG002
        """Unknown."""
        return False
