"""Weights of the tasks' losses: by size, by learned uncertainties (Kendall et al. 2018), by FAMO (Liu et al. 2023).

The loss of a task in a step, below simply its loss, is the mean over its units in all batches and ranks, without its
entry in ``loss_weights``, which stays a factor of its own. It is known at the end of a step, so weights follow from
the steps before. In the first step that has a task its loss is measured, and weighs 0: no weight would suit it. A task
that is absent from a step does not move, and a loss of exactly 0, of batches without a valid label, teaches nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from rslp.errors import TrainingError
from rslp.models.denominators import accumulation_dtype
from rslp.runtime import collectives
from rslp.train.balance import BalanceName
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

    name: BalanceName = "none"

    def set_tasks(self, tasks: Iterable[str]) -> None:
        """Set the tasks of the run's datasets; the model may have more."""

    def begin(self) -> None:
        """Start an optimiser step, and fix its weights."""

    def loss(self, losses: Losses, factors: Counts, *, like: torch.Tensor) -> torch.Tensor:
        """A batch's part of the step's loss.

        Args:
            losses: for each task its losses by name, times the task's entry in ``loss_weights``.
            factors: the factor on each task's losses, ``rslp.train.losses.loss_factors``.
            like: a tensor on the device of the sum.
        """
        return weighted(losses, factors, like=like)

    def update(self) -> None:
        """Follow the losses of the step, after its backward passes; all ranks have to call it."""

    def weights(self) -> dict[str, float]:
        """The weights of the coming step by task, 0 for a task not measured yet; empty without a balance."""
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
        self.register_buffer("seen", torch.zeros(len(loss_weights), dtype=torch.int64))
        self.set_tasks(loss_weights)

    def set_tasks(self, tasks: Iterable[str]) -> None:
        self._trained = sorted({self._position[task] for task in tasks if self._factors[task] > 0})

    def begin(self) -> None:
        device = self.seen.device
        # Of the present step and this rank: for each task its losses times factors, and the factors.
        self._sums = torch.zeros((2, len(self._factors)), dtype=accumulation_dtype(device), device=device)
        self._present = self.weights()

    def loss(self, losses: Losses, factors: Counts, *, like: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=like.device)
        for task, named in losses.items():
            own = torch.zeros((), device=like.device)
            for loss in named.values():
                own = own + loss
            factor = factors[task]
            exact = factor.to(self._sums)
            # A batch without a unit may have a loss that is not a number.
            part = torch.where(exact > 0, own.detach().to(exact) * exact, 0)
            self._sums[:, self._position[task]] += torch.stack([part, exact])
            total = total + factor.to(own) * self._balanced(task, own)
        return total

    def _balanced(self, task: str, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a batch with its weight."""
        return loss * self._present[task]

    def update(self) -> None:
        """Follow the losses of the step.

        Raises:
            TrainingError: a loss is negative.
        """
        totals, shares = collectives.all_reduce_sum(self._sums).tolist()
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
            self.seen[list(measured)] += 1

    def _follow(self, losses: Mapping[int, float]) -> None:
        """Update the state by the losses of the step by position of their task."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        seen = self.seen.tolist()
        values = self._values([i for i in self._trained if seen[i]])
        return {task: values.get(i, 0.0) for task, i in self._position.items()}

    def _values(self, known: list[int]) -> dict[int, float]:
        """The weights of tasks that were measured, by position."""
        raise NotImplementedError


class Scale(_Measured):
    """Weight 1 / size: a task's size is the running mean of its loss, corrected for its start at 0."""

    name: BalanceName = "scale"
    average: torch.Tensor

    def __init__(self, loss_weights: Mapping[str, float]) -> None:
        super().__init__(loss_weights)
        self.register_buffer("average", torch.zeros(len(loss_weights)))

    def _follow(self, losses: Mapping[int, float]) -> None:
        for i, loss in losses.items():
            self.average[i] = _DECAY * float(self.average[i]) + (1 - _DECAY) * loss

    def _values(self, known: list[int]) -> dict[int, float]:
        average, seen = self.average.tolist(), self.seen.tolist()
        return {i: (1 - _DECAY ** seen[i]) / max(average[i], _EPS) for i in known}


class Uncertainty(_Measured):
    """Weight e^-s: a task's loss l becomes e^-s l + s / 2, and the optimiser learns s, the log of a variance.

    s begins where it is best for the task's first loss, at log 2l.
    """

    name: BalanceName = "uncertainty"

    def __init__(self, loss_weights: Mapping[str, float]) -> None:
        super().__init__(loss_weights)
        # A parameter for each task: an optimiser leaves those without a gradient in a step as they are.
        self.log_variances = torch.nn.ParameterList(torch.zeros(()) for _ in loss_weights)

    def _balanced(self, task: str, loss: torch.Tensor) -> torch.Tensor:
        if not self._present[task]:
            return loss * 0
        s = self.log_variances[self._position[task]]
        return torch.exp(-s) * loss + torch.where(loss.detach() == 0, 0, self._factors[task] * s / 2)

    def _follow(self, losses: Mapping[int, float]) -> None:
        for i, loss in losses.items():
            if not self.seen[i]:
                self.log_variances[i].fill_(math.log(2 * loss))

    def _values(self, known: list[int]) -> dict[int, float]:
        return {i: math.exp(-float(self.log_variances[i].detach())) for i in known}


class Famo(_Measured):
    """Weight proportional to z / l, with a mean of 1; z is the softmax of logits that grow where a loss falls slowly.

    Where a step has some of the datasets alone, a span of steps in which each task was measured takes the place of
    FAMO's step: a task's loss l is its mean over the span, and the logits move at the end of a span, by the change of
    all log l since the span before. (The authors' amortised form: no loss is computed a second time.) The gradient of
    logit i is z_i (d_i - sum over j of z_j d_j), d being the fall of log l, plus a decay; the step is Adam's.
    """

    name: BalanceName = "famo"
    state: torch.Tensor
    moves: torch.Tensor

    def __init__(self, loss_weights: Mapping[str, float]) -> None:
        super().__init__(loss_weights)
        # By task: logit, Adam's two moments, loss in the last span, sum and number of losses in the present span.
        self.register_buffer("state", torch.zeros((6, len(loss_weights))))
        self.register_buffer("moves", torch.zeros((), dtype=torch.int64))

    def _follow(self, losses: Mapping[int, float]) -> None:
        last, sums, counts = self.state[3:]
        for i, loss in losses.items():
            sums[i] += loss
            counts[i] += 1
        chosen = self._trained
        if not chosen or not bool(counts[chosen].all()):
            return
        means = sums / counts.clamp(min=1)
        if bool(last[chosen].all()):
            self._move(torch.log(last[chosen] + _EPS) - torch.log(means[chosen] + _EPS))
        self.state[3:] = torch.stack([means, torch.zeros_like(means), torch.zeros_like(means)])

    def _move(self, falls: torch.Tensor) -> None:
        """Move the logits of the trained tasks by the fall of their log losses."""
        chosen, logits = self._trained, self.state[0, self._trained]
        z = torch.softmax(logits, dim=0)
        gradient = z * (falls - (z * falls).sum()) + _GAMMA * logits
        self.moves += 1
        corrected = []
        for moment, beta, value in zip(self.state[1:3], _BETAS, (gradient, gradient**2), strict=True):
            moment[chosen] = beta * moment[chosen] + (1 - beta) * value
            corrected.append(moment[chosen] / (1 - beta ** int(self.moves)))
        self.state[0, chosen] = logits - _RATE * corrected[0] / (corrected[1].sqrt() + _EPS)

    def _values(self, known: list[int]) -> dict[int, float]:
        logits, _, _, last, sums, counts = self.state.tolist()
        ratios = {i: math.exp(logits[i]) / ((last[i] or sums[i] / counts[i]) + _EPS) for i in known}
        return {i: len(known) * ratio / sum(ratios.values()) for i, ratio in ratios.items()}


_KINDS = {kind.name: kind for kind in (Scale, Uncertainty, Famo)}


def loss_balance(name: str, loss_weights: Mapping[str, float]) -> LossBalance:
    """The balance of a name, for the factors of the model's tasks; without weights for aggregations of gradients."""
    return _KINDS[name](loss_weights) if name in _KINDS else LossBalance()


def split_group(optimizer: torch.optim.Optimizer, balance: LossBalance) -> None:
    """Move a balance's parameters into a group of the optimiser of their own: with their rate, without weight decay."""
    own = dict.fromkeys(balance.parameters())
    if not own:
        return
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in own]
    options |= {"lr": _RATE, "weight_decay": 0.0} | ({"name": "balance"} if "name" in options else {})
    optimizer.add_param_group({**options, "params": list(own)})
