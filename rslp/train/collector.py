"""The garbage collector during a start: it would search ever more modules again and again, and find nothing."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_off(*, keep: bool = False) -> Iterator[None]:
    """Run a block without collections; it should make little but what stays.

    Args:
        keep: whether everything that there is afterwards stays to the end of the process and need not be searched
            again, here or in the reading workers.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if keep:
            gc.freeze()
            # What the interpreter can't take apart at its end, native modules report as leaked, in pages.
            atexit.register(gc.unfreeze)
        if was_on:
            gc.enable()
