"""Aggregation of the gradients of a step's datasets on the parameters that they share (Jacobian descent, TorchJD).

Each dataset's gradient on the shared parameters is a row of a matrix J. TorchJD computes weights w from J J^T, and the
shared parameters get w J in place of the sum of the rows. Decoders keep the gradients that they have.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
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


class Aggregation:
    """Replaces the gradients of the shared parameters by an aggregate of the datasets' gradients.

    Args:
        name: which one.
        parameters: the shared parameters.

    Attributes:
        dataset: the dataset of the next backward pass.
    """

    def __init__(self, name: AggregationName, parameters: Sequence[torch.nn.Parameter]) -> None:
        weighting, arguments, self._is_mean = _WEIGHTINGS[name]
        self._weighting = getattr(importlib.import_module("torchjd.aggregation"), weighting)(**arguments)
        self._parameters = list(parameters)
        self._rows: dict[str, list[torch.Tensor | None]] = {}
        self.dataset = ""

    def begin(self, datasets: Iterable[str]) -> None:
        """Start a step with batches of some datasets, the same ones in all ranks."""
        self._rows = {dataset: [None] * len(self._parameters) for dataset in sorted(set(datasets))}

    def collect(self) -> None:
        """Move the gradients of a backward pass into the row of its dataset."""
        row = self._rows.get(self.dataset)
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None and row is not None:
                before = row[i]
                row[i] = parameter.grad if before is None else before + parameter.grad
            parameter.grad = None

    def apply(self, *, seed: int) -> dict[str, float]:
        """Set the shared parameters' gradients, after the last backward pass; all ranks have to call it.

        Returns the weights by dataset; none if no shared parameter has a gradient. PCGrad draws its order by the seed.
        """
        device, numbers = self._parameters[0].device, range(len(self._parameters))
        used = torch.tensor([any(row[i] is not None for row in self._rows.values()) for i in numbers], device=device)
        columns = collectives.all_reduce_sum(used.int()).nonzero().flatten().tolist()
        if not columns:
            return {}
        flat = [torch.cat([_flat(row[i], self._parameters[i]) for i in columns]) for row in self._rows.values()]
        rows = torch.stack([collectives.all_reduce_sum(row) for row in flat])
        weights = self._weights(rows, seed=seed)
        parameters = [self._parameters[i] for i in columns]
        parts = torch.split(weights @ rows, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return dict(zip(self._rows, weights.tolist(), strict=True))

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
        weights = weights.to(rows)
        # Solvers on different machines may differ in the last bit.
        collectives.broadcast([weights])
        return weights


def _flat(gradient: torch.Tensor | None, parameter: torch.nn.Parameter) -> torch.Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).detach().reshape(-1).float()
