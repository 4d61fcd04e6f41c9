"""What libraries say of themselves, and several processes of one thing: a run's user is spared both."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from rslp.train.world import World

_LIBRARIES = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
# Warnings of libraries about themselves or about what is done here on purpose.
_HINTS = (
    ".*does not have many workers",
    ".*is smaller than the logging interval",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "Found .* module\\(s\\) in eval mode",
    # Values that all processes share already.
    "It is recommended to use `self.log\\(.*sync_dist=True",
    "The `srun` command is available on your system but is not used",
    # Ours gives every sample once.
    "You are using a custom batch sampler `StepSampler` for prediction",
)


def quiet_libraries(world: World) -> None:
    """Leave out hints on hardware and notes on progress, and what one process of this machine says already.

    Args:
        world: the processes of the job; of those on one machine, the first says what befalls the machine's disk.
    """
    _quiet_parser()
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _HINTS:
        warnings.filterwarnings("ignore", message=message)
    if world.local_rank:
        logging.getLogger("rslp").setLevel(logging.ERROR)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Let libraries say nothing at all for a while."""
    _quiet_parser()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _quiet_parser() -> None:
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
