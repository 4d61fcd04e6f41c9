"""Object stores: the few operations that runs need, repeated while the network fails; each refusal is one line."""

from __future__ import annotations

import logging
import posixpath
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Timer
from typing import Any, TypeVar

from rslp.errors import RunError, StoreError
from rslp.io.atomic import full_disk, write_atomic

Answer = TypeVar("Answer")

# Errors beside OSError that the clients raise when a store cannot be reached; only of modules that are imported.
_CLIENT_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "httpx": ("HTTPError",),
    "httpx2": ("HTTPError",),
}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
# Words of an error's text; not parts of an address or a path, such as the port 40131.
_DENIED = re.compile(
    r"(?<![\w./:-])(403|401|Forbidden|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch)(?![\w/-])"
)
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
WEKA = "weka://"
MOUNT_WEKA = (
    "Weka is a file system: mount the bucket (on Beaker: --mounts+=weka://BUCKET:/weka/BUCKET), "
    "and give the path that it is mounted at (/weka/BUCKET/…)"
)
# After this time a message says what is waited for, s.
_SLOW = 5.0


def is_remote(path: str) -> bool:
    """Whether a path lies on an object store (``s3://…``, ``gs://…``) and not on a disk."""
    return "://" in path


@dataclass(frozen=True)
class ObjectStore:
    """A folder on any object store that fsspec supports.

    Writes are atomic on S3 and Google Cloud Storage: a reader sees the old object or the new one.

    Attributes:
        root: the folder's URL.
        patience: how long to repeat an operation while the store cannot be reached, s.
    """

    root: str
    patience: float = 600

    @cached_property
    def _system_and_path(self) -> tuple[Any, str]:
        import fsspec

        # Google's client logs each attempt with a traceback; our errors say it in one line.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        try:
            # A cached listing would hide new objects of other machines.
            system, path = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            reason = MOUNT_WEKA if self.root.startswith(WEKA) else str(error).strip()
            raise StoreError(f"{self.root}: {reason}") from error
        return system, path.rstrip("/")

    def url(self, name: str) -> str:
        """The URL of an object, as a person would name it."""
        return f"{self.root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """The whole content of an object; None when there is no such object."""
        # Google's client tries for a minute before it raises an error.
        slow = Timer(_SLOW, sys.stderr.write, [f"waiting for {self.url(name)}\n"])
        slow.daemon = True
        slow.start()
        try:
            content: bytes = self._do(lambda system, path: system.cat_file(path), name)
        except FileNotFoundError:
            return None
        finally:
            slow.cancel()
        return content

    def write(self, name: str, content: bytes) -> None:
        """Put an object, or replace it."""
        self._do(lambda system, path: system.pipe_file(path, content), name)

    def create(self, name: str, content: bytes) -> bool:
        """Put an object unless there is one of that name.

        Returns:
            Whether it was put. A store without conditional puts may return True to two writers at once.
        """
        if self.read(name) is not None:
            return False
        try:
            self._do(lambda system, path: system.pipe_file(path, content, mode="create"), name)
        except FileExistsError:
            return False
        return True

    def upload(self, source: Path, name: str) -> None:
        """Put a file as an object."""
        self._do(lambda system, path: system.put_file(str(source), path), name)

    def download(self, name: str, target: Path) -> None:
        """Get an object as a file, which appears only when it is complete.

        Raises:
            FileNotFoundError: there is no such object.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.part")
        self._do(lambda system, path: system.get_file(path, str(partial)), name)
        partial.replace(target)

    def copy(self, name: str, other: str) -> None:
        """Copy an object within the store."""
        self._do(lambda system, path: system.cp_file(path, self._key(other)), name)

    def delete(self, name: str) -> None:
        """Remove an object, if it exists."""
        try:
            self._do(lambda system, path: system.rm_file(path), name)
        except FileNotFoundError:
            return

    def sizes(self) -> dict[str, int]:
        """The size of every object in the folder and below, bytes, by its name relative to the folder."""
        start = len(self._system_and_path[1]) + 1
        try:
            objects = self._do(lambda system, path: system.find(path, detail=True), "")
        except FileNotFoundError:
            return {}
        # A key may be any text; as a path on this machine it must not lead out of its folder.
        plain = [name for name in objects if name.isprintable() and not {"", ".", ".."} & set(name[start:].split("/"))]
        return {name[start:]: int(objects[name]["size"]) for name in plain}

    def _key(self, name: str) -> str:
        return posixpath.join(self._system_and_path[1], name) if name else self._system_and_path[1]

    def _do(self, action: Callable[[Any, str], Answer], name: str) -> Answer:
        """Act on an object; the action is repeated while the store cannot be reached.

        Raises:
            StoreError: no access, no such bucket, or the store could not be reached for ``patience`` seconds.
            FileNotFoundError: no such object.
            FileExistsError: the object to be created exists.
        """
        system, key, end, wait = (
            self._system_and_path[0],
            self._key(name),
            time.monotonic() + self.patience,
            _FIRST_WAIT,
        )
        while True:
            try:
                return action(system, key)
            except FileExistsError:
                raise
            except _connection_errors() as error:
                self._raise_if_final(error, name)
                if time.monotonic() + wait > end:
                    raise StoreError(f"{self.url(name)} can't be reached: {_first_line(error)}") from error
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _raise_if_final(self, error: BaseException, name: str) -> None:
        """Raise an error that would come again, however often the action is repeated."""
        message, kind = str(error), type(error).__name__
        if "bucket" in message.lower() and "does not exist" in message:
            raise StoreError(f"{self.url(name)}: there is no such bucket") from error
        if isinstance(error, FileNotFoundError):
            raise error
        if kind in _NO_CREDENTIALS:
            raise StoreError(f"{self.root} needs credentials, and none were found: {_first_line(error)}") from error
        if isinstance(error, PermissionError) or _DENIED.search(message):
            raise StoreError(f"{self.url(name)}: access denied: {_first_line(error)}") from error


@dataclass(frozen=True)
class Folder:
    """A folder on a disk, with those operations of ``ObjectStore`` that read and write a whole file.

    Attributes:
        root: the folder.
    """

    root: Path

    def read(self, name: str) -> bytes | None:
        """The whole content of a file; None when there is no such file."""
        path = self.root / name
        return path.read_bytes() if path.exists() else None

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it, atomically; raise ``DiskError`` or ``RunError`` if that is not possible."""
        path = self.root / name
        try:
            write_atomic(path, content)
        except OSError as error:
            raise full_disk(error, path) or RunError(f"{path} can't be written: {error.strerror}") from error

    def delete(self, name: str) -> None:
        """Remove a file, if it exists."""
        (self.root / name).unlink(missing_ok=True)


def _connection_errors() -> tuple[type[BaseException], ...]:
    loaded = [(sys.modules[module], names) for module, names in _CLIENT_ERRORS.items() if module in sys.modules]
    return (OSError, *(getattr(module, name) for module, names in loaded for name in names))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
