"""torchmetrics: no synchronisation in compute; states that merge over processes; states by sample, to be resampled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rslearn.train.metrics import ConfusionMatrixMetric, NonScalarMetricOutput
from rslearn.train.tasks.detection import DetectionMetric
from torchmetrics import Metric, MetricCollection
from torchmetrics.detection.mean_ap import MeanAveragePrecision
from torchmetrics.utilities.data import dim_zero_sum

# Metrics without an interval: the first gives no number, the second takes seconds for each resample.
_NOT_RESAMPLED = (ConfusionMatrixMetric, MeanAveragePrecision)
# Settings of rslearn's and torchmetrics' metrics that change what is computed from a state, not the state.
_OF_COMPUTE = {
    *("class_idx", "class_names", "class_metric_name", "output_key", "metric_mode", "report_per_class"),
    *("beta", "zero_division", "squared"),
}
Counts = npt.NDArray[np.int64]


def disable_metric_sync(metrics: torch.nn.Module) -> None:
    """Keep the metrics inside a module from gathering states of other processes in ``compute``.

    torchmetrics gathers state by state, in an order that depends on the samples of a process: a process without a
    sample waits for ever, or fails.
    """
    for metric in metrics.modules():
        if isinstance(metric, MetricCollection):
            metric._enable_compute_groups = False
        elif isinstance(metric, Metric):
            metric.distributed_available_fn = _never_distributed


def _never_distributed() -> bool:
    return False


def scalars(metrics: MetricCollection) -> dict[str, float | None]:
    """The scalar values of all metrics by name; None if one can't be computed from its samples.

    Metrics are computed one by one, since the collection's own ``compute`` fails if one fails, as R2 does on a single
    sample.
    """
    values: dict[str, float | None] = {}
    for name, metric in metrics.items(keep_base=True):
        try:
            computed = metric.compute()
        except (ValueError, RuntimeError):
            values[name] = None
            continue
        for key, value in computed.items() if isinstance(computed, dict) else [(name, computed)]:
            if _is_scalar(value):
                # torchmetrics' mean average precision is -1 if there are no objects.
                undefined = isinstance(metric, DetectionMetric) and float(value) < 0
                values[key] = None if undefined else float(value)
    return values


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, NonScalarMetricOutput) and (not isinstance(value, torch.Tensor) or value.numel() == 1)


def metric_states(metrics: torch.nn.Module) -> list[dict[str, Any]]:
    """The state of each metric inside a module, on the CPU, in the same order in all processes."""
    states = []
    for metric in _metrics_in(metrics):
        values = {name: _on_cpu(getattr(metric, name)) for name in metric._defaults}
        states.append({"updates": metric._update_count, "values": values})
    return states


def merge_metric_states(metrics: torch.nn.Module, parts: list[list[dict[str, Any]]]) -> None:
    """Set the metrics inside a module to the merged state of all processes.

    Args:
        metrics: the module.
        parts: the output of ``metric_states`` of each process, by rank.
    """
    for metric, states in zip(_metrics_in(metrics), zip(*parts, strict=True), strict=True):
        for name, reduction in metric._reductions.items():
            values = [state["values"][name] for state in states]
            setattr(metric, name, _merged(values, reduction, metric.device))
        metric._update_count = sum(state["updates"] for state in states)
        metric._computed = None


def _metrics_in(metrics: torch.nn.Module) -> list[Metric]:
    return [metric for metric in metrics.modules() if isinstance(metric, Metric)]


def _merged(values: list[Any], reduction: Any, device: torch.device) -> Any:
    if isinstance(values[0], list):
        return [entry.to(device) for value in values for entry in value]
    stacked = torch.stack(values).to(device)
    return reduction(stacked) if reduction else stacked


def _on_cpu(value: Any) -> Any:
    return [entry.cpu() for entry in value] if isinstance(value, list) else value.cpu()


def classes_of(metrics: MetricCollection, values: Iterable[str], classes: Sequence[str]) -> dict[str, str]:
    """For each value of one class the class's name, by the value's name.

    Args:
        metrics: the metrics.
        values: names of their values; a metric may give several.
        classes: names of the task's classes.
    """
    named = dict(metrics.items(keep_base=True))
    found = {name: _class_of(name, named.get(name), classes) for name in values}
    return {name: one for name, one in found.items() if one is not None}


def _class_of(name: str, metric: Metric | None, classes: Sequence[str]) -> str | None:
    index = getattr(metric, "class_idx", None)
    if metric is None and (number := re.fullmatch(r"(?:.*/)?cls_(\d+)", name)):
        index = int(number[1])
    if index is not None:
        return classes[index] if index < len(classes) else None
    # rslearn puts the class first: ``wheat_f1``. Of ``corn`` and ``corn_silage`` the longer one is meant.
    return max((one for one in classes if metric is None and name.startswith(f"{one}_")), key=len, default=None)


def is_resampleable(metric: Metric) -> bool:
    """Whether the metric of a resample follows from its states after each sample alone."""
    parts = _metrics_in(metric)
    if any(isinstance(part, _NOT_RESAMPLED) for part in parts):
        return False
    return all(
        part._reductions[name] is not None or isinstance(default, list)
        for part in parts
        for name, default in part._defaults.items()
    )


class StatesBySample:
    """The states of one metric after each sample alone.

    States that add up are packed into one vector for each sample, since a metric may have hundreds of them.

    Args:
        metric: the metric, or one like it.
    """

    def __init__(self, metric: Metric) -> None:
        defaults = metric._defaults
        self._reductions: Mapping[str, Any] = metric._reductions
        self._sums = {
            name: default
            for name, default in defaults.items()
            if self._reductions[name] is dim_zero_sum and isinstance(default, torch.Tensor)
        }
        self._packed: list[npt.NDArray[np.float64]] = []
        self._others: dict[str, list[Any]] = {name: [] for name in defaults if name not in self._sums}

    @classmethod
    def of(cls, metric: Metric, columns: Mapping[str, Sequence[npt.NDArray[np.float64]]]) -> StatesBySample:
        """States of what ``columns`` returned.

        Raises:
            KeyError: a state of the metric is missing.
        """
        states = cls(metric)
        if states._sums:
            parts = zip(*(columns[name] for name in states._sums), strict=True)
            states._packed = [np.concatenate(of_sample) for of_sample in parts]
        states._others = {name: list(columns[name]) for name in states._others}
        return states

    def add(self, state: Callable[[str], Any]) -> None:
        """Add a sample; ``state`` gives a state of a name: a tensor or a list of tensors."""
        if self._sums:
            self._packed.append(np.concatenate([_flat(state(name)) for name in self._sums]))
        for name, values in self._others.items():
            value = state(name)
            if isinstance(value, list):
                values.append(torch.cat(value).cpu().numpy().copy() if value else np.zeros(0))
            else:
                values.append(_flat(value))

    def merge(self, processes: Sequence[StatesBySample]) -> None:
        """Replace the samples of this process by those of all, in the order of their ranks."""
        self._packed = [packed for states in processes for packed in states._packed]
        self._others = {name: [value for s in processes for value in s._others[name]] for name in self._others}

    def entries(self) -> int:
        """Number of entries of the longest state that is a list or an array."""
        return max((sum(map(len, values)) for values in self._others.values()), default=0)

    def columns(self) -> dict[str, Sequence[npt.NDArray[np.float64]]]:
        """Each state by sample, flattened."""
        ends = np.cumsum([0, *(default.numel() for default in self._sums.values())])
        sums = {
            name: [packed[start:end] for packed in self._packed]
            for name, start, end in zip(self._sums, ends, ends[1:], strict=False)
        }
        others = {
            name: [value.reshape(-1).astype(np.float64) for value in values] for name, values in self._others.items()
        }
        return {**sums, **others}

    def resampler(self, metrics: Sequence[Metric]) -> Callable[[Counts], None]:
        """A function that sets metrics with these states to a resample: how often it has each sample, ``N``."""
        packed = np.array(self._packed)
        lists = {
            name: _Lists.of(values)
            for name, values in self._others.items()
            if isinstance(metrics[0]._defaults[name], list)
        }
        stacked = {name: np.array(values) for name, values in self._others.items() if name not in lists}

        def resample(counts: Counts) -> None:
            totals = torch.from_numpy(counts @ packed) if self._sums else None
            indices = np.repeat(np.arange(len(counts)), counts) if self._others else counts
            start = 0
            merged: dict[str, Any] = {}
            for name, default in self._sums.items():
                assert totals is not None
                merged[name] = totals[start : start + default.numel()].reshape(default.shape).to(default.dtype)
                start += default.numel()
            for name in self._others:
                if name in lists:
                    merged[name] = lists[name].taken(indices)
                else:
                    merged[name] = self._reductions[name](torch.from_numpy(stacked[name][indices]))
            _set_states(metrics, merged)

        return resample


@dataclass(frozen=True)
class _Lists:
    """A state that is a list, by sample: all entries in one array, and where those of each sample begin."""

    entries: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, values: Sequence[npt.NDArray[Any]]) -> _Lists:
        lengths = np.array([len(value) for value in values], dtype=np.int64)
        # Without those of no entry, whose type may be another.
        entries = np.concatenate([value for value in values if len(value)] or [np.zeros(0)])
        return cls(entries, np.cumsum(lengths) - lengths, lengths)

    def taken(self, samples: npt.NDArray[np.int64]) -> list[torch.Tensor]:
        """The entries of some samples, which may occur several times."""
        lengths = self.lengths[samples]
        before = np.cumsum(lengths) - lengths
        indices = np.repeat(self.starts[samples] - before, lengths) + np.arange(lengths.sum())
        return [torch.from_numpy(self.entries[indices])] if len(indices) else []


def _flat(value: torch.Tensor) -> npt.NDArray[np.float64]:
    flat: npt.NDArray[np.float64] = value.detach().cpu().double().numpy().reshape(-1).copy()
    return flat


def _set_states(metrics: Sequence[Metric], states: dict[str, Any]) -> None:
    for metric in metrics:
        # Not by setattr, which is most of the time of a resample, since torch looks for parameters.
        vars(metric).update(states)
        metric._update_count = 1
        metric._computed = None


class SampleStates:
    """The states of several metrics after each sample alone, from which their values for any resample are computed.

    Metrics that are updated alike, such as precision and recall of each class, share their states.

    Args:
        metrics: copies of the metrics, all of them resampleable; they are reset.

    Attributes:
        states: for each group of metrics that share states, and each metric inside its first one, its states.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        groups: dict[Any, list[Metric]] = {}
        for metric in metrics:
            groups.setdefault(_update_key(metric), []).append(metric)
        self._groups = list(groups.values())
        self.states = [list(map(StatesBySample, _metrics_in(group[0]))) for group in self._groups]

    def add(self, update: Callable[[Metric], None]) -> None:
        """Add a sample; ``update`` updates a metric with it."""
        for group, states in zip(self._groups, self.states, strict=True):
            group[0].reset()
            update(group[0])
            for part, of_part in zip(_metrics_in(group[0]), states, strict=True):
                of_part.add(partial(getattr, part))

    def entries(self) -> int:
        """Number of entries of the longest state that is a list; 0 without one."""
        return max((states.entries() for group in self.states for states in group), default=0)

    def merge(self, processes: Sequence[list[list[StatesBySample]]]) -> None:
        """Replace the samples of this process by those of all (their ``states``), in the order of their ranks."""
        for group, groups in zip(self.states, zip(*processes, strict=True), strict=True):
            for mine, theirs in zip(group, zip(*groups, strict=True), strict=True):
                mine.merge(theirs)

    def of(self, metric: Metric) -> StatesBySample:
        """The states of one of the metrics."""
        index = next(i for i, group in enumerate(self._groups) if any(one is metric for one in group))
        return self.states[index][0]

    def resampler(self) -> Callable[[Counts], None]:
        """A function that sets all metrics to a resample: how often it has each sample, ``N``."""
        inside = [list(zip(*map(_metrics_in, group), strict=True)) for group in self._groups]
        functions = [
            states.resampler(metrics)
            for positions, of_group in zip(inside, self.states, strict=True)
            for metrics, states in zip(positions, of_group, strict=True)
        ]

        def resample(counts: Counts) -> None:
            for function in functions:
                function(counts)

        return resample


def _update_key(metric: Metric) -> Any:
    """Equal for metrics whose states are equal after equal updates: the same functions with the same settings.

    Classes of rslp have private settings, and never share.
    """
    parts = _metrics_in(metric)
    if any(type(part).__module__.startswith("rslp.") for part in parts):
        return id(metric)
    return tuple((type(part).update, tuple(_settings(part))) for part in parts)


def _settings(metric: Metric) -> Iterator[tuple[str, str]]:
    for name, value in sorted(vars(metric).items()):
        if not (name.startswith("_") or name in _OF_COMPUTE or name in metric._defaults or callable(value)):
            yield name, repr(value)
