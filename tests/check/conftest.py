"""One small example for all tests of the check, and cheap copies of it in which faults are planted."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from rslp.example.build import build
from tests.check.copies import Copy

os.environ.setdefault("RSLEARN_LOGLEVEL", "WARNING")


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "example"
    # Pictures of it take longer than all the rest, and are looked at elsewhere (tests/example).
    with patch("rslp.example.preview.draw"):
        build(path, size=0.02, seed=0, workers=0)
    return path


@pytest.fixture(scope="session")
def sound(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    copy = Copy.of(example, tmp_path_factory.mktemp("sound"))
    copy.compose()
    return copy
