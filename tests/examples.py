"""The small example that tests of several folders read; made once for all processes of a test run."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from rslp.example.build import build


def shared_example(factory: pytest.TempPathFactory) -> Path:
    """Path of the example at 2 % of its size: to be read, and copied before anything in it is changed."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "shared_example"
    with FileLock(folder / "shared_example.lock"):
        build(path, size=0.02, seed=0, workers=0)
    return path
