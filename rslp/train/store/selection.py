"""Which windows of an index a split holds, in rslearn's order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from rslearn.dataset import Window
from rslearn.train.dataset import DataInput, SplitConfig, check_window, is_data_input_available

from rslp.train import adapters
from rslp.train.store.columns import Array
from rslp.train.store.index import WindowIndex


class CompletedGroups:
    """Stands in for a window where rslearn asks which item groups are complete."""

    name = ""

    def __init__(self, folders: str) -> None:
        self._folders = frozenset(folders.split("|"))

    def is_layer_completed(self, layer_name: str, group_idx: int = 0) -> bool:
        """Whether an item group is complete."""
        return (f"{layer_name}.{group_idx}" if group_idx else layer_name) in self._folders


def layer_of(option: str) -> str:
    """The layer of an input's option, which may name an item group: ``layer.1``."""
    return option.partition(".")[0]


def select(index: WindowIndex, inputs: Mapping[str, DataInput], config: SplitConfig) -> Array:
    """Rows of a split's windows; the same windows in the same order as ``adapters.list_windows``.

    Args:
        index: the dataset's windows.
        inputs: what a sample reads.
        config: the split's settings.
    """
    rows = index.order
    for wanted, column in ((config.groups, index.texts["group"]), (config.names, index.names)):
        if wanted:
            times = Counter(wanted)
            # A name that is listed twice is a sample twice, as it is to rslearn.
            counts = np.array([times[column.distinct(code)] for code in range(len(column.ends))], np.int64)
            rows = np.repeat(rows, counts[column.codes[rows]])
    rows = _having_tags(index, rows, config.tags or {})
    rows = _complete(index, rows, inputs)
    return rows[: config.num_samples] if config.num_samples else rows


def _having_tags(index: WindowIndex, rows: Array, tags: dict[str, Any]) -> Array:
    if not tags:
        return rows
    options = index.texts["options"]
    good = np.zeros(len(options.ends), bool)
    for code in options.used(rows):
        good[code] = adapters.has_tags(json.loads(options.distinct(code)), tags)
    return rows[good[options.codes[rows]]]


def _complete(index: WindowIndex, rows: Array, inputs: Mapping[str, DataInput]) -> Array:
    completed = index.texts["completed"]
    good = np.zeros(len(completed.ends), bool)
    for code in completed.used(rows):
        window = cast(Window, CompletedGroups(completed.distinct(int(code))))
        good[code] = check_window(dict(inputs), window)[0] is not None
    return rows[good[completed.codes[rows]]]


def available(completed: str, inputs: Mapping[str, DataInput]) -> Sequence[str]:
    """The inputs that a window with these item groups has."""
    window = cast(Window, CompletedGroups(completed))
    return [name for name, spec in inputs.items() if spec.required or is_data_input_available(spec, window)]
