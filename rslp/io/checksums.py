"""Checksums that reveal damaged files: in the JSON and YAML files of runs, and in archives of torch.save.

A file without a checksum, from an earlier version, is accepted.
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
# Errors that zipfile, pickle and torch raise on a file that is damaged, or of another kind.
LOAD_ERRORS = (
    *(RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError, AttributeError, AssertionError, ImportError),
    *(OverflowError, MemoryError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error),
)
# torch takes a record with this bit for a folder, and leaves its tensor uninitialised.
_FOLDER = 0x10


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, atomically, with a checksum as its last key."""
    write_atomic(path, json_with_checksum(content))


def json_with_checksum(content: Mapping[str, Any]) -> str:
    """An object as JSON, with a checksum as its last key."""
    return json.dumps({**content, CHECKSUM_KEY: _checksum_of(content)}, indent=1) + "\n"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, without its checksum; None where there is no such file.

    Raises:
        RunError: it cannot be read, is no JSON object, or has a wrong checksum.
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
    # Converted to JSON and back first: tuples become lists, and keys that are numbers become texts.
    return checksum(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())


def checksum(raw: bytes) -> str:
    """The CRC-32 of the bytes, in hexadecimal."""
    return f"{zlib.crc32(raw):08x}"


def with_checksum(text: str) -> str:
    """The text after a first line, a YAML comment, that holds its checksum (a cut-off file keeps its first line)."""
    return f"# {_FIRST_LINE}{checksum(text.encode())}\n{text}"


def is_unchanged(text: str) -> bool:
    """Whether a text fits the checksum in its first line; True for a text without one."""
    first, _, rest = text.partition("\n")
    return _FIRST_LINE not in first or text == with_checksum(rest)


def archive_damage(file: Path | BinaryIO, *, older: bool = False) -> str:
    """Verify the checksums of all records of an archive of torch.save; torch itself does not.

    Args:
        file: a path, or a stream, which is rewound afterwards; it is read once.
        older: accept torch's older format, which is no archive and has no checksums.

    Returns:
        The damage, in words for a message; empty if there is none.
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
