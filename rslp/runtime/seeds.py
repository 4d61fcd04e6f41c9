"""Seeds: a stable one from any parts, and the global generators of Python, numpy and torch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stable_seed(*parts: object) -> int:
    """A 64-bit seed from any printable parts, the same in every process and on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's global generators for a device.

    On the CPU not by ``torch.manual_seed``, which also registers a seed for GPUs that are not in use, with a costly
    stack trace.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with Python's, numpy's and torch's global generators seeded, and restore them afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
