"""Write files atomically, and name the file that could not be written because the disk is full."""

from __future__ import annotations

import errno
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rslp.errors import DiskError, UserError
from rslp.io.locks import holder, locked, no_links

# Full, over a quota, over a limit on the size of files, mounted for reading alone.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def full_disk(error: OSError, path: Path | None = None, *, needed: int = 0) -> DiskError | None:
    """The error for a file that could not be written; None if the disk is not the reason.

    Args:
        error: the system's error.
        path: the file, if a write has failed; without it, the file that the error names.
        needed: number of bytes to be written; 0 where it is not known.
    """
    if isinstance(error, DiskError):
        return error
    # EIO may come from a read, too.
    if error.errno not in (*_FULL, errno.EIO):
        return None
    file = path or (Path(os.fsdecode(error.filename)) if error.filename else None)
    what = "read or written" if error.errno == errno.EIO and path is None else "written"
    message = f"{file or 'a file'} can't be {what}: {error.strerror}"
    if file is not None:
        folder = next(folder for folder in file.absolute().parents if folder.is_dir())
        room = f"{needed:,} bytes needed, " if needed else ""
        message += f" ({room}{shutil.disk_usage(folder).free:,} bytes free in {folder})"
    return DiskError(error.errno, message)


class _ErrorKeepingFile(io.FileIO):
    """A new file that stores its write error: torch raises an error of its own in its place."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def atomic_stream(target: Path, *, needed: Callable[[], int] = lambda: 0) -> Iterator[BinaryIO]:
    """A stream into a new file that replaces the target at the end of the block.

    A reader, or a crash, sees either the old content or the new one. The old file itself is never written to, so other
    names of it (hard links) keep its content. The new file has the permissions that a plain ``open`` gives it.

    Args:
        target: the file's path; missing folders are made.
        needed: gives the size of the new file in bytes, for the message when the disk is full.

    Raises:
        DiskError: the disk is full, or fails; nothing has changed.
    """
    # In the target's own folder: a rename is atomic within one file system only.
    temporary, failure = _temporary(target), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        raw = _ErrorKeepingFile(temporary, "xb")
        try:
            with io.BufferedWriter(raw) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            failure = raw.failure
        temporary.replace(target)
        _sync_folder(target.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = failure or error
        if isinstance(cause, OSError) and (full := full_disk(cause, target, needed=needed())):
            raise full from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Append to a file, all of the content or nothing.

    Args:
        path: the file; it and its folder are made where they are missing.
        content: the bytes to append.

    Raises:
        DiskError: the disk is full, or fails; nothing has changed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0, opener=no_links) as stream:
            before, rest = stream.tell(), memoryview(content)
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
            except OSError:
                stream.truncate(before)
                raise
    except OSError as error:
        if full := full_disk(error, path, needed=len(content)):
            raise full from error
        raise


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new one.

    Args:
        path: the file; missing folders are made. Remote paths (``gs://…``) are written in one put. An existing file
            keeps its permissions.
        content: the whole content; text is written as UTF-8.
    """
    raw = content.encode() if isinstance(content, str) else content
    if "://" in str(path):
        # Imported here: most commands write to the local disk alone, and need not wait for the import.
        import fsspec

        with fsspec.open(str(path), "wb") as stream:
            stream.write(raw)
        return
    target = Path(path)
    with atomic_stream(target, needed=lambda: len(raw)) as stream:
        stream.write(raw)
        if target.exists():
            os.fchmod(stream.fileno(), target.stat().st_mode & 0o777)


def link_or_copy(source: Path, target: Path) -> None:
    """Make the target another name of a file: a hard link, or a copy where the file system has no links.

    Args:
        source: the file; it is replaced by others later on, never written to.
        target: the other name, in the same folder.
    """
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        with atomic_stream(target, needed=lambda: source.stat().st_size) as stream, source.open("rb") as content:
            shutil.copyfileobj(content, stream)
        return
    try:
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden new folder beside a target, for ``replace_folder``; removed at the end of the block where it still is.

    What a process left that was killed in its block is removed first; if it was killed while it replaced the target,
    the former target is put back.

    Args:
        target: the path that the folder will have; missing folders above it are made, and removed if nothing comes.

    Raises:
        UserError: another process is making the target.
        OSError: the folder can't be made.
    """

    def refuse(lock: Path) -> NoReturn:
        raise UserError(f"{target}: {holder(lock)} is writing it; start again when that has ended")

    new, former, lock = (target.with_name(f".{target.name}.{ending}") for ending in ("tmp", "old", "lock"))
    parent_is_new = not target.parent.exists()
    try:
        with locked(lock, busy=refuse):
            try:
                if former.exists() and not target.exists():
                    former.rename(target)
                for leftover in (new, former):
                    shutil.rmtree(leftover, ignore_errors=True)
                new.mkdir()
                yield new
            finally:
                shutil.rmtree(new, ignore_errors=True)
                lock.unlink(missing_ok=True)
    finally:
        if parent_is_new:
            with suppress(OSError):
                target.parent.rmdir()


def replace_folder(target: Path, new: Path) -> None:
    """Move a complete folder to its place, where another may be, which is removed.

    Args:
        target: the place.
        new: the folder of ``new_folder``.
    """
    former = new.with_suffix(".old")
    if target.exists():
        target.rename(former)
    new.rename(target)
    shutil.rmtree(former, ignore_errors=True)


def _temporary(target: Path) -> Path:
    """A new name in the target's folder; ``RunDir.sweep`` removes such files after a crash."""
    return target.with_name(f".{uuid.uuid4().hex}.tmp")


def _sync_folder(folder: Path) -> None:
    """Have the disk take what was renamed in a folder.

    Raises:
        DiskError: the disk is full, or fails.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # The system names no file here.
        raise full_disk(error, folder) or error from error
    finally:
        os.close(handle)
