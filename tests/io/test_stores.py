"""The few things that runs do on object stores, against servers that speak S3 and Google Cloud Storage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rslp.errors import StoreError
from rslp.io import ObjectStore, is_remote
from rslp.launch.lease import LeaseTiming
from rslp.launch.remote import run_in_copy
from tests.stores import Server

BUCKET = "bucket"


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(request.param)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        server.bucket(BUCKET, patch)
        yield server
    server.stop()


@pytest.fixture
def store(server: Server, request: pytest.FixtureRequest) -> ObjectStore:
    name = request.node.name.partition("[")[0]
    return ObjectStore(f"{server.scheme}://{BUCKET}/{name}", patience=2)


# aiohttp about how gcsfs hands it a block of a large file
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_what_is_written_is_read(store: ObjectStore, tmp_path: Path) -> None:
    assert store.read("a.txt") is None and store.sizes() == {}
    store.write("a.txt", b"one")
    store.write("a.txt", b"three")
    (tmp_path / "big").write_bytes(b"0123456789" * 700_000)
    store.upload(tmp_path / "big", "sub/big")
    store.copy("sub/big", "sub/copy")
    assert store.sizes() == {"a.txt": 5, "sub/big": 7_000_000, "sub/copy": 7_000_000}
    store.download("sub/copy", tmp_path / "deep" / "back")
    assert (tmp_path / "deep" / "back").read_bytes() == (tmp_path / "big").read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["back"]
    store.delete("sub/big")
    store.delete("sub/big")
    assert store.read("a.txt") == b"three" and "sub/big" not in store.sizes()
    with pytest.raises(FileNotFoundError):
        store.download("none", tmp_path / "none")


def test_what_is_there_is_not_created(store: ObjectStore) -> None:
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.read("a") == b"1"


def test_a_bucket_that_is_not_there(server: Server) -> None:
    store = ObjectStore(f"{server.scheme}://no-such-bucket-here/a", patience=1)
    if server.scheme == "gs":
        pytest.skip("the emulator makes buckets as they are named")
    with pytest.raises(StoreError, match="there is no such bucket"):
        store.write("a", b"1")


def test_a_run_in_a_copy(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSLP_SCRATCH", str(tmp_path))
    location = f"{store.root}/projects/p/e"
    ObjectStore(location).write("config.yaml", b"a: 1")
    code = (
        "import sys, pathlib; here = pathlib.Path(sys.argv[2]); assert (here / 'config.yaml').read_text() == 'a: 1'\n"
    )
    code += (
        "(here / 'checkpoints').mkdir(); (here / 'checkpoints/last.ckpt').write_text('w'); (here / 'DONE.json').touch()"
    )
    timing = LeaseTiming(beat=0.5, confirm=0.1, push=0.2)
    assert run_in_copy(location, (sys.executable, "-c", code), mode="fit", timing=timing) == 0
    assert set(ObjectStore(location).sizes()) == {"config.yaml", "checkpoints/last.ckpt", "DONE.json"}


def test_what_no_client_knows_and_what_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"nonsense://a: Protocol not known"):
        ObjectStore("nonsense://a").read("b")


def test_patience_has_an_end() -> None:
    class Gone(ObjectStore):
        calls = 0

    def fail(system: object, path: str) -> None:
        Gone.calls += 1
        raise ConnectionError("refused\nby all")

    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"memory://x/a can't be reached: refused\Z"):
        Gone("memory://x", patience=1.6)._do(fail, "a")
    assert Gone.calls == 3 and time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('Could not connect to "http://127.0.0.1:40131/b/a-403.json"', "can't be reached: Could not"),
        ("no answer for /runs/401/x/Forbidden.json", "can't be reached: no answer"),
        ("An error occurred (403) when calling the HeadObject operation: Forbidden", "access denied: An error"),
        ("An error occurred (AccessDenied) when calling PutObject", "access denied: An error"),
        ("Forbidden: https://storage/b/o, 403", "access denied: Forbidden"),
        ("Error 401: no credentials", "access denied: Error"),
    ],
)
def test_a_number_in_an_address_is_no_denial(said: str, message: str) -> None:
    def fail(system: object, path: str) -> None:
        raise OSError(said)

    with pytest.raises(StoreError, match=message):
        ObjectStore("memory://x", patience=0)._do(fail, "a")


@pytest.mark.parametrize(("path", "remote"), [("s3://a", True), ("gs://a/b", True), ("/a/b", False), ("a:b", False)])
def test_remote(path: str, remote: bool) -> None:
    assert is_remote(path) is remote


def test_what_is_waited_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_bytes(b"1")
    store = ObjectStore(f"file://{tmp_path}")
    assert store.read("a") == b"1"
    assert capsys.readouterr().err == ""
    system = store._system_and_path[0]
    cat = system.cat_file
    monkeypatch.setattr("rslp.io.objectstore._SLOW", 0.05)
    monkeypatch.setattr(system, "cat_file", lambda path: (time.sleep(0.5), cat(path))[1])
    assert store.read("a") == b"1"
    assert capsys.readouterr().err == f"waiting for file://{tmp_path}/a\n"
