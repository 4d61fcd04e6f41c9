"""One server of each kind for all tests of a process; each test has a bucket of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from rslp.io import ObjectStore
from tests.stores import Server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    server = Server("s3")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A run directory in a bucket of its own."""
    return ObjectStore(f"{s3_server.bucket(f'bucket-{next(_numbers)}', monkeypatch)}/projects/tests/tiny", patience=5)
