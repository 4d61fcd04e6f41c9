"""torchmetrics: no synchronisation in compute; states that merge over processes."""

from __future__ import annotations

from typing import Any

import torch
from rslearn.train.metrics import NonScalarMetricOutput
from rslearn.train.tasks.detection import DetectionMetric
from torchmetrics import Metric, MetricCollection


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
