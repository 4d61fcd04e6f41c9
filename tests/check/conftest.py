"""One small example for all tests of the check, and cheap copies of it in which faults are planted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.check.copies import Copy
from tests.examples import shared_example

os.environ.setdefault("RSLEARN_LOGLEVEL", "WARNING")


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_example(tmp_path_factory)


@pytest.fixture(scope="session")
def sound(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    copy = Copy.of(example, tmp_path_factory.mktemp("sound"))
    copy.compose()
    return copy
