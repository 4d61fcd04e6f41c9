"""Put a run's config into its directory in an object store: if nobody trains there, and back if it comes to nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rslp.files import Store, dump_yaml
from rslp.launch.lease import Pace, leased

NAME = "config.yaml"
_NORMAL = Pace()


@contextmanager
def settled_in_store(
    store: Store, config: Mapping[str, Any], *, keep: bool = False, pace: Pace = _NORMAL
) -> Iterator[None]:
    """Give a run its config while it is submitted; if that fails, the config is as before.

    Args:
        store: the run directory; its lease is held meanwhile, so that a training keeps its config.
        config: the config.
        keep: leave a config that is there already, as an evaluation of a trained run does.
        pace: how often things happen.

    Raises:
        RunError: another job trains in this run.
        StoreError: the store can't be reached.
    """
    with leased(store, pace):
        former = store.read(NAME)
        if keep and former is not None:
            yield
            return
        store.write(NAME, dump_yaml(config).encode())
        try:
            yield
        except BaseException:
            if former is None:
                store.delete(NAME)
            else:
                store.write(NAME, former)
            raise
