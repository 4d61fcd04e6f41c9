"""Checksums in our files, so that damage is noticed: of JSON, of YAML that we write, and of the archives of torch.save.

A file without a checksum, as earlier versions wrote them, is taken as it is.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from rslp.errors import RunError
from rslp.io.atomic import write_atomic

CHECKSUM_KEY = "crc32"
_FIRST_LINE = "crc32 of all lines below: "
# What zipfile, pickle and torch, which trust what they read, make of a file that is damaged or something else.
LOAD_ERRORS = (
    *(RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError, AttributeError, AssertionError, ImportError),
    *(OverflowError, MemoryError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error),
)
# torch takes such a record for a folder, and leaves the tensor as the memory was.
_FOLDER = 0x10


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, with a checksum as its last key, so that a crash leaves the old content or the new."""
    write_atomic(path, json.dumps({**content, CHECKSUM_KEY: _checksum_of(content)}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds, without its checksum; None where there is no such file.

    Raises:
        RunError: it can't be read, is no JSON object, or its checksum is that of another content.
    """
    try:
        content = json.loads(path.read_bytes().decode())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged, or can't be read: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object")
    written = content.pop(CHECKSUM_KEY, None)
    if written is not None and written != _checksum_of(content):
        raise RunError(
            f"{path} is damaged, or was changed by hand: its checksum ({CHECKSUM_KEY}) is that of another content"
        )
    return content


def _checksum_of(content: Mapping[str, Any]) -> str:
    # Read back first: a tuple comes back as a list, a key that is a number as a text.
    return checksum(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())


def checksum(raw: bytes) -> str:
    """The CRC-32 of some bytes, hex."""
    return f"{zlib.crc32(raw):08x}"


def with_checksum(text: str) -> str:
    """A text behind a comment (YAML) that holds its checksum: in the first line, which a cut leaves."""
    return f"# {_FIRST_LINE}{checksum(text.encode())}\n{text}"


def is_unchanged(text: str) -> bool:
    """Whether a text is as ``with_checksum`` gave it; True for one without a checksum."""
    first, _, rest = text.partition("\n")
    return _FIRST_LINE not in first or text == with_checksum(rest)


def archive_damage(file: Path | BinaryIO, *, older: bool = False) -> str:
    """What is wrong with an archive of torch.save: torch itself does not look at the checksums of its records.

    Args:
        file: a path, or a stream, which stands at its beginning afterwards; it is read once.
        older: whether torch's format from before archives is taken: it has no checksums, so nothing is said of it.

    Returns:
        words for a message; empty if every record is as it was written.
    """
    try:
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream:
            if older and not zipfile.is_zipfile(stream):
                stream.seek(0)
                return ""
            with zipfile.ZipFile(stream) as archive:
                folders = [record.filename for record in archive.infolist() if record.external_attr & _FOLDER]
                torn = next(iter(folders), None) or archive.testzip()
            stream.seek(0)
    except LOAD_ERRORS as error:
        return f"it is cut off or damaged, or no archive of torch.save ({error})"
    return f"it is damaged: the checksum of its part {torn!r} is that of another content" if torn else ""
