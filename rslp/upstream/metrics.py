"""torchmetrics as we need it: no metric asks other processes by itself, and states add up over processes."""

from __future__ import annotations

from typing import Any

import torch
from rslearn.train.metrics import NonScalarMetricOutput
from rslearn.train.tasks.detection import DetectionMetric
from torchmetrics import Metric, MetricCollection


def disable_metric_sync(metrics: torch.nn.Module) -> None:
    """Stop the metrics inside a module from asking other processes when they compute.

    torchmetrics gathers state by state, in an order that depends on what a process has seen: processes that have seen
    no sample wait for ever, or fail.
    """
    for metric in metrics.modules():
        if isinstance(metric, MetricCollection):
            metric._enable_compute_groups = False
        elif isinstance(metric, Metric):
            metric.distributed_available_fn = _alone


def _alone() -> bool:
    return False


def scalars(metrics: MetricCollection) -> dict[str, float | None]:
    """The scalar values of all metrics by name; None of one that can't be computed from what it has seen.

    One by one: torchmetrics' own collection gives nothing at all if one of them fails, as R2 does of a single sample.
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
                # torchmetrics' mean average precision is -1 where there is no object.
                nothing = isinstance(metric, DetectionMetric) and float(value) < 0
                values[key] = None if nothing else float(value)
    return values


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, NonScalarMetricOutput) and (not isinstance(value, torch.Tensor) or value.numel() == 1)


def metric_states(metrics: torch.nn.Module) -> list[dict[str, Any]]:
    """The state of each metric inside a module, on the CPU, in an order that all processes share."""
    states = []
    for metric in _metrics_in(metrics):
        values = {name: _on_cpu(getattr(metric, name)) for name in metric._defaults}
        states.append({"updates": metric._update_count, "values": values})
    return states


def merge_metric_states(metrics: torch.nn.Module, parts: list[list[dict[str, Any]]]) -> None:
    """Give the metrics inside a module the state of all processes together.

    Args:
        metrics: the module.
        parts: what ``metric_states`` gave in each process, by rank.
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
