"""A Beaker and an object store on loopback, with a tiny run config to send there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests import tiny
from tests.hold import holding
from tests.stores import Server, store_server

if TYPE_CHECKING:
    from tests.beaker.loopback import Loopback

DEFAULT_SECRETS = ("RSLEARN_WANDB_API_KEY", "RSLEARN_WEKA_KEY", "RSLEARN_WEKA_SECRET", "RSLEARN_GCP_CREDENTIALS")


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One certificate for all: gRPC reads the roots that it trusts once in a process."""
    from tests.beaker.loopback import make_certificate

    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def beaker(tmp_path: Path, identity: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    from tests.beaker.loopback import Loopback

    folder = tmp_path / "beaker"
    folder.mkdir()
    with Loopback(folder, key=identity[0], certificate=identity[1]) as loopback:
        loopback.secrets |= dict.fromkeys(DEFAULT_SECRETS, "-".join(("nobody", "may", "see", "this", "1")))
        for name, value in loopback.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("BEAKER_TOKEN", raising=False)
        yield loopback


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with store_server("s3", monkeypatch) as server:
        monkeypatch.setenv("RSLP_PREFIX", "s3://bucket")
        yield server


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, with a config of a run that holds while `../hold` exists."""
    place = tmp_path / "user"
    place.mkdir()
    datasets = {kind: (str(tiny.write_dataset(tmp_path / kind, kind)), kind) for kind in ("classify", "regress")}
    config = holding(tiny.run_config(datasets, epochs=3), tmp_path / "hold")
    (place / "OUT.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(place)
    return place
