"""The state of a window's folder: its metadata, and digests of the sizes, times and inodes of its files.

Nothing heavy is imported here, so that processes that only scan folders start at once.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rslp.errors import DataError
from rslp.runtime.slow_reads import refuse_pipe

# A file that was written less than this before a scan may be written again within the same tick of the file system's
# clock, with the same size and time: its digest must not be trusted later.
TICK_NS = 100_000_000
# The same for file systems that store whole seconds.
COARSE_TICK_NS = 2_000_000_000
_SECOND_NS = 1_000_000_000
# Bytes of a digest, and a digest that equals no other.
DIGEST = 16
NEVER = bytes(DIGEST)
# The file that rslearn writes into the folder of a completed item group.
MARKER = "completed"
# For this many files or fewer it does not pay to open the window's folder.
_FEW = 3
# Times of writing and of change (ns), size (bytes) and inode.
Stamp = tuple[int, int, int, int]
# By path below the window's folder: a text that changes with the file, and whether it was written a moment ago.
Files = Mapping[str, tuple[str, bool]]


@dataclass(frozen=True)
class WindowState:
    """A window's folder at one moment, as far as some layers are concerned.

    Attributes:
        group: the window's group.
        name: the window's name.
        bounds: x0, y0, x1, y1 in the window's projection (px).
        projection: JSON as stored.
        times: JSON of the time range, or ``null``.
        options: JSON of the options.
        completed: folders of completed item groups, joined by ``|``.
        layout: relative paths of the files and folders whose stamps show changes, one per line.
        shortcut: digest of all these stamps; if it is equal, nothing changed.
        base: digest of what every record of the window depends on.
        layers: by layer the digest of its files.
        fresh: whether a file was written a moment ago, so that a digest may not show the next change.
    """

    group: str
    name: str
    bounds: tuple[int, int, int, int]
    projection: str
    times: str
    options: str
    completed: str
    layout: str
    shortcut: bytes
    base: bytes
    layers: dict[str, bytes]
    fresh: bool


def scan_window(root: str, group: str, name: str, layers: Sequence[str]) -> WindowState | None:
    """Scan one window; None for a file, or a folder without a ``metadata.json``, which are no windows.

    Args:
        root: the window's folder.
        group: the window's group.
        name: the window's name.
        layers: layers whose files count, sorted.

    Raises:
        OSError: a file vanished during the scan, or can't be read.
        ValueError: the bounds are not whole pixels.
        DataError: ``metadata.json`` is not what rslearn writes.
    """
    now = time.time_ns()
    try:
        entries = _known_entries(root)
        refuse_pipe(f"{root}/metadata.json")
        raw = (Path(root) / "metadata.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"{root}/metadata.json can't be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(str(error)) from error
    paths = ["", *entries]
    for entry in sorted(os.scandir(f"{root}/layers"), key=lambda entry: entry.name) if "layers" in entries else []:
        if entry.is_dir() and layer_of(entry.name) in layers:
            paths += _walk(f"{root}/", f"layers/{entry.name}")
    layout = [path for path in paths if not path.endswith(f"/{MARKER}")]
    stamps = dict(zip(layout, _stamps(root, layout), strict=True))
    unstamped = dict.fromkeys(paths, ("", False))
    files = unstamped | {path: (str(stamp), _is_fresh(stamp, now)) for path, stamp in stamps.items()}
    is_fresh = any(fresh for _, fresh in files.values())
    shortcut = NEVER if is_fresh else digest(array("q", [v for stamp in stamps.values() for v in stamp]).tobytes())
    return window_state(
        root, group, name, raw=raw, layers=layers, files=files, layout="\n".join(layout), shortcut=shortcut
    )


def window_state(
    root: str,
    group: str,
    name: str,
    *,
    raw: bytes,
    layers: Sequence[str],
    files: Files,
    shortcut: bytes,
    layout: str = "",
) -> WindowState:
    """The state of a window, of a folder or on an object store.

    Args:
        root: the window's folder, for messages.
        group: the window's group.
        name: the window's name.
        raw: the content of its ``metadata.json``.
        layers: layers whose files count.
        files: its files and folders, whose paths end with a slash, of these layers; its metadata files.
        shortcut: see ``WindowState``.
        layout: likewise.

    Raises:
        ValueError: the bounds are not whole pixels.
        DataError: ``metadata.json`` is not what rslearn writes.
    """
    metadata = _parsed_metadata(raw, root)
    location = json.dumps([group, name, metadata["projection"], metadata["bounds"]], sort_keys=True)
    folders = [path.split("/")[1] for path in files if path.endswith(f"/{MARKER}") and path.count("/") == 2]
    of_layers: dict[str, list[str]] = {layer: [] for layer in layers}
    for path in files:
        if path.startswith("layers/") and not path.endswith("/"):
            of_layers[layer_of(path.removeprefix("layers/"))].append(path)
    return WindowState(
        group=group,
        name=name,
        bounds=tuple(metadata["bounds"]),
        projection=json.dumps(metadata["projection"]),
        times=json.dumps(metadata.get("time_range") or None),
        options=json.dumps(metadata["options"]),
        completed="|".join(sorted(folders)),
        layout=layout,
        shortcut=shortcut,
        base=_files_digest(location, ["items.json"] if "items.json" in files else [], files),
        layers={layer: _files_digest(layer + location, paths, files) for layer, paths in of_layers.items()},
        fresh=any(is_fresh for _, is_fresh in files.values()),
    )


def layer_of(path: str) -> str:
    """The layer of an item group's folder, or of a path in it; an empty text for a hidden one."""
    return path.partition("/")[0].partition(".")[0]


def stamp_digest(root: str, layout: str, *, dir_fd: int | None = None) -> bytes | None:
    """The present digest ``shortcut`` of a window's stamps; None if a file is gone.

    Args:
        root: the window's folder.
        layout: ``layout`` of its ``WindowState``.
        dir_fd: an open folder to which ``root`` is relative.
    """
    try:
        stamps = _stamps(root, layout.split("\n"), dir_fd=dir_fd)
        return digest(array("q", [v for stamp in stamps for v in stamp]).tobytes())
    except OSError:
        return None


@contextmanager
def open_folder(folder: str, *, dir_fd: int | None = None) -> Iterator[int]:
    """Open a folder; paths relative to it are quicker, since the kernel has fewer names to look up."""
    handle = os.open(folder, os.O_RDONLY, dir_fd=dir_fd)
    try:
        yield handle
    finally:
        os.close(handle)


def _known_entries(root: str) -> list[str]:
    names = {entry.name for entry in os.scandir(root)}
    return [name for name in ("items.json", "layers", "metadata.json") if name in names]


def _walk(root: str, folder: str) -> Iterator[str]:
    """A folder and all paths below it, sorted; folders end with a slash."""
    yield folder + "/"
    for entry in sorted(os.scandir(root + folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(root, f"{folder}/{entry.name}")
        else:
            yield f"{folder}/{entry.name}"


def _stamps(root: str, paths: Sequence[str], *, dir_fd: int | None = None) -> list[Stamp]:
    if len(paths) <= _FEW:
        return [_stamp(f"{root}/{path}" if path else root, dir_fd) for path in paths]
    with open_folder(root, dir_fd=dir_fd) as handle:
        return [_stamp(path or ".", handle) for path in paths]


def _stamp(path: str, dir_fd: int | None) -> Stamp:
    state = os.stat(path, dir_fd=dir_fd)
    # Programs can't set the time of change: it shows content that was replaced with size and time of writing kept.
    return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino


def _is_fresh(stamp: Stamp, now: int) -> bool:
    return any(abs(now - moment) < (TICK_NS if moment % _SECOND_NS else COARSE_TICK_NS) for moment in stamp[:2])


def digest(raw: bytes) -> bytes:
    """A digest of ``DIGEST`` bytes."""
    return blake2b(raw, digest_size=DIGEST).digest()


def _files_digest(salt: str, paths: Sequence[str], files: Files) -> bytes:
    lines = [salt]
    for path in paths:
        text, is_fresh = files[path]
        # Of marker files only their existence counts.
        lines.append(path if path.endswith(f"/{MARKER}") else f"{path} {text}")
        if is_fresh:
            # Random bytes, so that no later scan has the same digest.
            lines.append(os.urandom(DIGEST).hex())
    return digest("\n".join(lines).encode())


def _parsed_metadata(raw: bytes, root: str) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = json.loads(raw)
        _, _, _, _ = metadata["bounds"]
        metadata["projection"]["crs"]
        metadata["options"] = metadata.get("options") or {}
        if not isinstance(metadata["options"], dict):
            raise TypeError("its options are no mapping")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{root}/metadata.json is not what rslearn writes: {reason}") from error
    if not all(isinstance(value, int) for value in metadata["bounds"]):
        raise ValueError(f"{root}/metadata.json: the bounds {metadata['bounds']} are not whole pixels")
    return metadata
