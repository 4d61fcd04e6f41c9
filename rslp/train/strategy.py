"""Several processes under Lightning: who is who, and gradients that are summed once per optimiser step."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import chain
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Module
from torch.optim import Optimizer

from rslp.train import collectives
from rslp.train.world import read_world


class RanksEnvironment(ClusterEnvironment):
    """Tells Lightning what ``RSLP_RANKS`` says, whatever other variables a process has inherited."""

    def __init__(self) -> None:
        super().__init__()
        self._world = read_world(os.environ)

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts no process of its own."""
        return True

    @property
    def main_address(self) -> str:
        """Host name of the machine of rank 0."""
        return self._world.address

    @property
    def main_port(self) -> int:
        """Where rank 0 listens."""
        return self._world.port

    @staticmethod
    def detect() -> bool:
        """It is chosen, never guessed."""
        return False

    def world_size(self) -> int:
        """Number of processes."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """Nothing: the environment says it."""

    def global_rank(self) -> int:
        """Number of this process."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: the environment says it."""

    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return self._world.local_rank

    def node_rank(self) -> int:
        """Number of the machine."""
        return self._world.node


class SummedGradients(DDPStrategy):
    """Data parallelism without the wrapper around the model.

    Losses are divided by counts over all processes before they are differentiated, so gradients are to be summed, not
    averaged, and once per optimiser step, after the backward pass of its last batch. Parameters may have gradients in
    some steps only (decoders of datasets that are not in a step), and a process may have no sample of a batch.
    """

    def __init__(self) -> None:
        super().__init__(cluster_environment=RanksEnvironment())

    def configure_ddp(self) -> None:
        """Begin with the weights and buffers of rank 0, in place of wrapping the model."""
        model = self._module()
        collectives.broadcast(chain(model.parameters(), model.buffers()))

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Sum the gradients between the backward pass and everything that looks at them (clipping, callbacks).

        Args:
            optimizer: the optimiser.
            closure: does the forward and backward passes.
            model: the module, for the precision plugin.
            **kwargs: of Lightning, handed on.
        """

        def summing() -> Any:
            result = closure()
            collectives.sum_gradients(self._module().parameters())
            return result

        return super().optimizer_step(optimizer, summing, model, **kwargs)

    def on_validation_start(self) -> None:
        """Judge one model: running statistics have gone different ways since the start."""
        collectives.broadcast(self._module().buffers())

    def _module(self) -> Module:
        if self.model is None:
            raise RuntimeError("the strategy has no model yet")
        return self.model
