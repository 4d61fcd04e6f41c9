"""Put a run's config into its directory in an object store: if nobody trains there, and back if it comes to nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rslp.files import Store, dump_yaml, with_checksum
from rslp.launch.job import Mode
from rslp.launch.lease import Pace, leased
from rslp.run import RunDir

_NORMAL = Pace()


@contextmanager
def settled_in_store(
    store: Store, config: Mapping[str, Any], *, mode: Mode = "fit", pace: Pace = _NORMAL
) -> Iterator[None]:
    """Give a run its config while it is submitted; if that fails, the config is as before.

    Args:
        store: the run directory; its lease is held meanwhile, so that a training keeps its config.
        config: the config.
        mode: what the run is submitted for: an evaluation leaves a config that is there already, and a prediction has
            one of its own, which goes beside a training.
        pace: how often things happen.

    Raises:
        RunError: another job trains in this run.
        StoreError: the store can't be reached.
    """
    name = RunDir(Path()).config_of(mode).name
    with leased(store, pace) if mode != "predict" else nullcontext():
        former = store.read(name)
        if mode in ("validate", "test") and former is not None:
            yield
            return
        store.write(name, with_checksum(dump_yaml(config)).encode())
        try:
            yield
        except BaseException:
            if former is None:
                store.delete(name)
            else:
                store.write(name, former)
            raise
