"""A plateau scheduler that follows the validation score, and the validation loss while the score does not move.

A score stays at 0 until a model is better than its baseline; the learning rate must not fall meanwhile.
"""

from __future__ import annotations

import math

from torch.optim.lr_scheduler import ReduceLROnPlateau

# An attribute of the scheduler, so that its state in a checkpoint holds it.
_LOSS = "loss_at_best"


def forgive_ties(scheduler: ReduceLROnPlateau, value: float, *, loss: float) -> None:
    """Before a step: make it no bad epoch if the value equals the best one so far and the loss is lower than with it.

    Args:
        scheduler: its ``threshold`` says by how much, relative to the loss.
        value: what it is about to be given, the lower the better.
        loss: the validation loss.
    """
    before = getattr(scheduler, _LOSS, math.inf)
    tie = value == scheduler.best and loss < before * (1 - scheduler.threshold)
    if tie:
        # The step adds one.
        scheduler.num_bad_epochs = -1
    if tie or value < scheduler.best:
        setattr(scheduler, _LOSS, loss)
