"""One small example for the tests that only read it."""

from pathlib import Path

import pytest

from tests.examples import shared_example


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_example(tmp_path_factory)
