"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new one.

    Args:
        path: where to write; missing folders are made. Remote paths (``gs://…``) are written in one put.
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
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder: a rename is atomic within one file system only.
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(_mode(target))
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _mode(target: Path) -> int:
    """The permissions the file has, or that a plain ``open`` would have given it."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
