"""Write files whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A stream into a new file that takes the target's place at the end of the block.

    A reader, or a crash, sees either the old content or the new one. The old file itself is never written to, so other
    names of it (hard links) keep what they had. The new file has the permissions that a plain ``open`` gives it.

    Args:
        target: where the file will be; missing folders are made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder: a rename is atomic within one file system only.
    temporary = _temporary(target)
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new one.

    Args:
        path: where to write; missing folders are made. Remote paths (``gs://…``) are written in one put. A file that is
            there keeps its permissions.
        content: the whole content; text is written as UTF-8.
    """
    raw = content.encode() if isinstance(content, str) else content
    if "://" in str(path):
        # Imported here: nine of ten commands never leave the local disk, and need not pay for it.
        import fsspec

        with fsspec.open(str(path), "wb") as stream:
            stream.write(raw)
        return
    target = Path(path)
    with replacing(target) as stream:
        stream.write(raw)
        if target.exists():
            os.fchmod(stream.fileno(), target.stat().st_mode & 0o777)


def same_file(source: Path, target: Path) -> None:
    """Make the target another name of a file: a hard link, or a copy where the file system has no links.

    Args:
        source: the file; it is replaced by others later on, never written to.
        target: the other name, in the same folder.
    """
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        with replacing(target) as stream, source.open("rb") as content:
            shutil.copyfileobj(content, stream)
        return
    try:
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _temporary(target: Path) -> Path:
    """A new name in the target's folder; ``RunDir.sweep`` removes such files after a crash."""
    return target.with_name(f".{uuid.uuid4().hex}.tmp")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
