"""Aggregation of the gradients of a step's datasets on the parameters that they share (Jacobian descent, TorchJD).

Each dataset's gradient on the shared parameters is a row of a matrix J. TorchJD computes weights w from J J^T, and the
shared parameters get w J in place of the sum of the rows. Decoders keep the gradients that they have.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from rslp.models.joint import JointModel
from rslp.runtime import collectives
from rslp.runtime.seeds import seeded
from rslp.train.balance import AggregationName

# TorchJD's class, its arguments, and whether its weights are those of a mean over rows; a step's loss is a sum of them.
_WEIGHTINGS: dict[AggregationName, tuple[str, dict[str, Any], bool]] = {
    "upgrad": ("UPGradWeighting", {}, True),
    "pcgrad": ("PCGradWeighting", {}, False),
    # c = 0.4 as in its authors' experiments on NYU-v2.
    "cagrad": ("CAGradWeighting", {"c": 0.4}, True),
    "mgda": ("MGDAWeighting", {}, True),
}


def shared_parameters(model: JointModel) -> list[torch.nn.Parameter]:
    """The parameters of encoder and trunk, which all datasets share."""
    return [*model.encoder.parameters(), *(model.trunk.parameters() if model.trunk is not None else ())]


class GradientRows:
    """The gradients of a step's datasets on shared parameters.

    Args:
        parameters: the shared parameters.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._rows: dict[str, list[torch.Tensor | None]] = {}
        self._dataset = ""

    def begin(self, datasets: Iterable[str]) -> None:
        """Start a step with batches of some datasets, the same ones in all ranks."""
        self._rows = {dataset: [None] * len(self._parameters) for dataset in sorted(set(datasets))}

    def expect(self, dataset: str) -> None:
        """Name the dataset of the next backward pass."""
        self._dataset = dataset

    def collect(self) -> None:
        """Move the gradients of a backward pass into the row of its dataset."""
        row = self._rows.get(self._dataset)
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None and row is not None:
                before = row[i]
                row[i] = parameter.grad if before is None else before + parameter.grad
            parameter.grad = None

    def matrix(self) -> tuple[list[str], torch.Tensor, list[torch.nn.Parameter]]:
        """The datasets, their rows over all ranks, and the parameters that have a gradient: the rows' columns."""
        device = self._parameters[0].device
        used = [any(row[i] is not None for row in self._rows.values()) for i in range(len(self._parameters))]
        anywhere = collectives.all_reduce_sum(torch.tensor(used, dtype=torch.int32, device=device)).tolist()
        columns = [(i, parameter) for i, parameter in enumerate(self._parameters) if anywhere[i]]
        if not columns:
            return list(self._rows), torch.zeros((len(self._rows), 0), device=device), []
        rows = [
            collectives.all_reduce_sum(torch.cat([_flat(row[i], parameter) for i, parameter in columns]))
            for row in self._rows.values()
        ]
        self._rows = {dataset: [None] * len(self._parameters) for dataset in self._rows}
        return list(self._rows), torch.stack(rows), [parameter for _, parameter in columns]


def _flat(gradient: torch.Tensor | None, parameter: torch.nn.Parameter) -> torch.Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).detach().reshape(-1).float()


class Aggregation:
    """Replaces the gradients of the shared parameters by an aggregate of the datasets' gradients.

    Args:
        name: which one.
        parameters: the shared parameters.
        sums: those of a run that resumes.

    Attributes:
        rows: the gradients of the present step.
        sums: by dataset the sum of its weights since the epoch began, and the number of its steps.
    """

    def __init__(
        self,
        name: AggregationName,
        parameters: Sequence[torch.nn.Parameter],
        *,
        sums: Mapping[str, list[float]] | None = None,
    ) -> None:
        weighting, arguments, self._is_mean = _WEIGHTINGS[name]
        self._weighting = getattr(importlib.import_module("torchjd.aggregation"), weighting)(**arguments)
        self.rows = GradientRows(parameters)
        self.sums = dict(sums or {})

    def apply(self, *, seed: int) -> None:
        """Set the shared parameters' gradients, after the last backward pass; all ranks have to call it.

        Args:
            seed: of PCGrad's random order.
        """
        datasets, rows, parameters = self.rows.matrix()
        weights = self._weights(rows, seed=seed)
        offset = 0
        for parameter in parameters:
            part = weights.to(rows) @ rows[:, offset : offset + parameter.numel()]
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
            offset += parameter.numel()
        for dataset, weight in zip(datasets, weights.tolist(), strict=True):
            total, steps = self.sums.get(dataset, (0.0, 0.0))
            self.sums[dataset] = [total + weight, steps + 1]

    def _weights(self, rows: torch.Tensor, *, seed: int) -> torch.Tensor:
        """The weights of the rows; 1, as in their sum, for a single row and for rows that are not finite.

        Rows of zeros, of datasets without a valid sample in the step, are left out: MGDA would follow them.
        """
        products = (rows @ rows.T).double().cpu()
        weights = torch.ones(len(rows), dtype=torch.float64)
        chosen = (products.diagonal() > 0).nonzero().flatten()
        if len(chosen) > 1 and bool(torch.isfinite(products).all()):
            with seeded(seed):
                found = self._weighting(products[chosen][:, chosen])
            weights[chosen] = found * (len(chosen) if self._is_mean else 1)
        weights = weights.to(rows.device, torch.float32)
        # Solvers on different machines may differ in the last bit.
        collectives.broadcast([weights])
        return weights

    def take_means(self) -> dict[str, float]:
        """By dataset the mean of its weights since the epoch began; begins anew."""
        means = {dataset: total / steps for dataset, (total, steps) in sorted(self.sums.items())}
        self.sums = {}
        return means
