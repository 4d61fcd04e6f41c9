"""One small example for the tests that only read it."""

from pathlib import Path

import pytest

from rslp.example.build import build


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "example"
    build(path, size=0.02, seed=0, workers=0)
    return path
