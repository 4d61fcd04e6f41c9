"""Weights of the tasks' losses: by size, by learned uncertainties (Kendall et al. 2018), by FAMO (Liu et al. 2023).

The loss of a task in a step, below simply its loss, is the mean over its units in all batches and ranks, without its
entry in ``loss_weights``, which stays a factor of its own. It is known at the end of a step, so weights follow from
the steps before. In the first step that has a task its loss is measured, and weighs 0: no weight would suit it. A task
that is absent from a step does not move, and a loss of exactly 0, of batches without a valid label, teaches nothing.
All ranks have the same losses, and so the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from rslp.errors import TrainingError
from rslp.models.denominators import accumulation_dtype
from rslp.runtime import collectives
from rslp.train.balance import LossBalanceName
from rslp.train.losses import Counts, weighted

# Sizes are running means with this decay, over about 10 steps with the task.
_DECAY = 0.9
# Learning rate of log-variances and of FAMO's logits; the latter as in its authors' code, with Adam's usual decays.
_RATE = 0.025
_BETAS = (0.9, 0.999)
_EPS = 1e-8
# FAMO's decay of the logits.
_GAMMA = 0.001

Losses = Mapping[str, Mapping[str, torch.Tensor]]


class LossBalance(torch.nn.Module):
    """Weights of the tasks' losses. This class has none: all are 1, and it has no state."""

    name: LossBalanceName = "none"

    def set_tasks(self, tasks: Iterable[str]) -> None:
        """Set the tasks of the run's datasets; the model may have more."""

    def begin(self) -> None:
        """Start an optimiser step."""

    def loss(self, losses: Losses, factors: Counts, *, like: torch.Tensor) -> torch.Tensor:
        """A batch's part of the step's loss.

        Args:
            losses: for each task its losses by name, times the task's entry in ``loss_weights``.
            factors: the factor on each task's losses, ``rslp.train.losses.loss_factors``.
            like: a tensor on the device of the sum.
        """
        return weighted(losses, factors, like=like)

    def update(self) -> None:
        """Learn from the losses of the step, after its backward passes; all ranks have to call it."""

    def weights(self) -> dict[str, float]:
        """The weights of the coming step by task; empty without a balance."""
        return {}


class _Measured(LossBalance):
    """A balance that follows the tasks' losses.

    Args:
        loss_weights: the factor of each task's loss in ``loss_weights``; its order is that of the state.

    Attributes:
        seen: in how many steps each task's loss was measured.
    """

    seen: torch.Tensor

    def __init__(self, loss_weights: Mapping[str, float]) -> None:
        super().__init__()
        self._factors = dict(loss_weights)
        self._position = {task: i for i, task in enumerate(loss_weights)}
        self._trained = [i for i, factor in enumerate(loss_weights.values()) if factor > 0]
        self.register_buffer("seen", torch.zeros(len(loss_weights), dtype=torch.int64))
        # Of the present step and this rank: by task its losses times factors, and the factors.
        self._sums: torch.Tensor | None = None
        self._present: dict[str, float] = {}

    def set_tasks(self, tasks: Iterable[str]) -> None:
        """Set the tasks of the run's datasets; the model may have more."""
        present = {self._position[task] for task in tasks}
        self._trained = [i for i, factor in enumerate(self._factors.values()) if factor > 0 and i in present]

    def begin(self) -> None:
        """Start an optimiser step: fix its weights."""
        self._sums = None
        self._present = self.weights()

    def loss(self, losses: Losses, factors: Counts, *, like: torch.Tensor) -> torch.Tensor:
        """A batch's part of the step's loss; its losses are noted for ``update``."""
        self._note(losses, factors, like)
        return weighted(losses, {task: factor * self._present[task] for task, factor in factors.items()}, like=like)

    def _note(self, losses: Losses, factors: Counts, like: torch.Tensor) -> None:
        if self._sums is None:
            self._sums = self._zeros(like.device)
        for task, named in losses.items():
            total = torch.stack([loss.detach().reshape(()) for loss in named.values()]).sum().to(self._sums)
            factor = factors[task].to(self._sums)
            # A batch without a unit may have a loss that is not a number.
            part = torch.stack([torch.where(factor > 0, total * factor, 0), factor])
            self._sums[:, self._position[task]] += part

    def _zeros(self, device: torch.device) -> torch.Tensor:
        return torch.zeros((2, len(self._position)), dtype=accumulation_dtype(device), device=device)

    def update(self) -> None:
        """Learn from the step's losses.

        Raises:
            TrainingError: a loss is negative.
        """
        sums = self._zeros(self.seen.device) if self._sums is None else self._sums
        totals, shares = collectives.all_reduce_sum(sums).tolist()
        measured: dict[int, float] = {}
        for task, i in self._position.items():
            if i not in self._trained or shares[i] <= 0 or not math.isfinite(totals[i]) or totals[i] == 0:
                continue
            measured[i] = totals[i] / shares[i] / self._factors[task]
            if measured[i] < 0:
                message = f"the loss of task {task!r} is {measured[i]:.4g}; balance: {self.name} needs losses above 0"
                raise TrainingError(f"{message}, other than none and the aggregations of gradients")
        with torch.no_grad():
            self._follow(measured)
            for i in measured:
                self.seen[i] += 1

    def _follow(self, losses: Mapping[int, float]) -> None:
        """Update the state by the losses of the step by position of their task."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        """The weights of the coming step by task; 0 for a task that was not measured yet."""
        values = self._values(self.seen.tolist())
        return {task: values[i] for task, i in self._position.items()}

    def _values(self, seen: list[int]) -> list[float]:
        """The weights by position."""
        raise NotImplementedError


class Scale(_Measured):
    """Weight 1 / size: a task's size is the running mean of its loss, corrected for its start at 0."""

    name: LossBalanceName = "scale"
    average: torch.Tensor

    def __init__(self, loss_weights: Mapping[str, float]) -> None:
        super().__init__(loss_weights)
        self.register_buffer("average", torch.zeros(len(loss_weights)))

    def _follow(self, losses: Mapping[int, float]) -> None:
        for i, loss in losses.items():
            self.average[i] = _DECAY * float(self.average[i]) + (1 - _DECAY) * loss

    def _values(self, seen: list[int]) -> list[float]:
        pairs = zip(self.average.tolist(), seen, strict=True)
        return [(1 - _DECAY**n) / max(average, _EPS) if n else 0.0 for average, n in pairs]


class Uncertainty(_Measured):
    """Weight e^-s: a task's loss l becomes e^-s l + s / 2, and the optimiser learns s, the log of a variance.

    s begins where it is best for the task's first loss, at log 2l.
    """

    name: LossBalanceName = "uncertainty"

    def __init__(self, loss_weights: Mapping[str, float]) -> None:
        super().__init__(loss_weights)
        # A parameter for each task: an optimiser leaves those without a gradient in a step as they are.
        self.log_variances = torch.nn.ParameterList(torch.zeros(()) for _ in loss_weights)

    def loss(self, losses: Losses, factors: Counts, *, like: torch.Tensor) -> torch.Tensor:
        """A batch's part of the step's loss, with gradients of the log-variances."""
        self._note(losses, factors, like)
        # Losses of weight 0 stay in the graph, so that all of a step's backward passes are alike.
        total = weighted(losses, {task: factor * 0 for task, factor in factors.items()}, like=like)
        for task, named in losses.items():
            if self._present[task] > 0:
                s = self.log_variances[self._position[task]]
                own = torch.stack([loss.reshape(()) for loss in named.values()]).sum()
                penalty = torch.where(own.detach() == 0, 0, self._factors[task] * s / 2)
                total = total + factors[task].to(own) * (torch.exp(-s) * own + penalty)
        return total

    def _follow(self, losses: Mapping[int, float]) -> None:
        for i, loss in losses.items():
            if not self.seen[i]:
                self.log_variances[i].fill_(math.log(2 * loss))

    def _values(self, seen: list[int]) -> list[float]:
        trained = [n > 0 and factor > 0 for n, factor in zip(seen, self._factors.values(), strict=True)]
        return [math.exp(-float(s.detach())) if t else 0.0 for s, t in zip(self.log_variances, trained, strict=True)]


class Famo(_Measured):
    """Weight proportional to z / l, with a mean of 1; z is the softmax of logits that grow where a loss falls slowly.

    Where a step has some of the datasets alone, a span of steps in which each task was measured takes the place of
    FAMO's step: a task's loss l is its mean over the span, and the logits move at the end of a span, by the change of
    all log l since the span before. (The authors' amortised form: no loss is computed a second time.) The gradient of
    logit i is z_i (d_i - sum over j of z_j d_j), d being the fall of log l, plus a decay; the step is Adam's.
    """

    name: LossBalanceName = "famo"
    logits: torch.Tensor
    moments: torch.Tensor
    moves: torch.Tensor
    last: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor

    def __init__(self, loss_weights: Mapping[str, float]) -> None:
        super().__init__(loss_weights)
        n = len(loss_weights)
        self.register_buffer("logits", torch.zeros(n))
        self.register_buffer("moments", torch.zeros((2, n)))
        self.register_buffer("moves", torch.zeros((), dtype=torch.int64))
        # Losses of the last span, and sums and numbers of those in the present one.
        self.register_buffer("last", torch.zeros(n))
        self.register_buffer("sums", torch.zeros(n))
        self.register_buffer("counts", torch.zeros(n, dtype=torch.int64))

    def _follow(self, losses: Mapping[int, float]) -> None:
        for i, loss in losses.items():
            self.sums[i] += loss
            self.counts[i] += 1
        chosen = self._trained
        if not chosen or not bool(self.counts[chosen].all()):
            return
        means = self.sums / self.counts.clamp(min=1)
        if bool(self.last[chosen].all()):
            self._move(torch.log(self.last[chosen] + _EPS) - torch.log(means[chosen] + _EPS))
        self.last.copy_(means)
        self.sums.zero_()
        self.counts.zero_()

    def _move(self, falls: torch.Tensor) -> None:
        """Move the logits of the trained tasks by the fall of their log losses."""
        chosen = self._trained
        z = torch.softmax(self.logits[chosen], dim=0)
        gradient = z * (falls - (z * falls).sum()) + _GAMMA * self.logits[chosen]
        self.moves += 1
        corrected = []
        for moment, beta, value in zip(self.moments, _BETAS, (gradient, gradient**2), strict=True):
            moment[chosen] = beta * moment[chosen] + (1 - beta) * value
            corrected.append(moment[chosen] / (1 - beta ** int(self.moves)))
        self.logits[chosen] -= _RATE * corrected[0] / (corrected[1].sqrt() + _EPS)

    def _values(self, seen: list[int]) -> list[float]:
        sizes = torch.where(self.last > 0, self.last, self.sums / self.counts.clamp(min=1)).tolist()
        parts = [math.exp(logit) for logit in self.logits.tolist()]
        known = [i for i in self._trained if seen[i]]
        ratios = {i: parts[i] / (sizes[i] + _EPS) for i in known}
        total = sum(ratios.values())
        return [len(known) * ratios[i] / total if i in ratios else 0.0 for i in range(len(seen))]


_KINDS = {kind.name: kind for kind in (Scale, Uncertainty, Famo)}


def loss_balance(name: str, loss_weights: Mapping[str, float]) -> LossBalance:
    """The balance of a name; without weights for ``none`` and the aggregations of gradients.

    Args:
        name: the ``balance`` of a run config.
        loss_weights: the factor of each of the model's tasks.
    """
    return _KINDS[name](loss_weights) if name in _KINDS else LossBalance()


def split_group(optimizer: torch.optim.Optimizer, balance: LossBalance) -> None:
    """Move a balance's parameters into a group of the optimiser of their own: with their rate, without weight decay."""
    own = set(balance.parameters())
    if not own:
        return
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in own]
    options |= {"lr": _RATE, "weight_decay": 0.0} | ({"name": "balance"} if "name" in options else {})
    optimizer.add_param_group({**options, "params": list(balance.parameters())})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
