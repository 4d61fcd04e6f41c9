"""What a window's folder looks like: a listing with sizes, times and inodes, and digests of it.

Nothing heavy is imported here: processes that only look at folders start at once.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rslp.errors import DataError
from rslp.runtime.slow_reads import refuse_pipe

# A file that was written this short a time before it was looked at may be written again within the same tick of the
# file system's clock, with the same size: what was seen of it is not trusted later.
TICK_NS = 100_000_000
# Some file systems keep whole seconds.
COARSE_TICK_NS = 2_000_000_000
_SECOND_NS = 1_000_000_000
DIGEST = 16
NEVER = bytes(DIGEST)
MARKER = "completed"
# For so few entries it does not pay to open the window's folder.
_FEW = 3
# Times of writing and of change (ns), size and inode.
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class WindowState:
    """A window's folder at one moment; only what the given layers hold is looked at.

    Attributes:
        group: the window's group.
        name: the window's name.
        bounds: pixels of the window's projection: x0, y0, x1, y1.
        projection: JSON as stored.
        times: JSON of the time range, or ``null``.
        options: JSON of the options.
        completed: folders of completed item groups, joined by ``|``.
        layout: relative paths of what has a time stamp that tells of changes, one per line.
        shortcut: digest of all those time stamps, folders' included; equal means that nothing changed.
        base: digest of what every record of the window depends on.
        layers: by layer, digest of its files.
        fresh: something was written a moment ago, so that a digest may not tell of the next change.
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
    """Look at one window; None for what is none: a file, or a folder without a ``metadata.json``.

    Args:
        root: the window's folder.
        group: its group.
        name: its name.
        layers: layers whose files matter, sorted.

    Raises:
        OSError: something vanished meanwhile, or can't be read.
        ValueError: the bounds are no whole pixels.
        DataError: ``metadata.json`` is not what rslearn writes.
    """
    now = time.time_ns()
    try:
        shape = _first_entries(root)
        refuse_pipe(f"{root}/metadata.json")
        raw = (Path(root) / "metadata.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"{root}/metadata.json can't be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(str(error)) from error
    metadata = parsed_metadata(raw, root)
    folders = sorted(e.name for e in os.scandir(f"{root}/layers") if e.is_dir()) if "layers" in shape else []
    files: dict[str, list[str]] = {layer: [] for layer in layers}
    timed = ["", *shape]
    completed = []
    for folder in folders:
        layer = folder.partition(".")[0]
        if layer not in files or folder.startswith("."):
            continue
        found = list(_walk(f"{root}/", f"layers/{folder}"))
        timed += [path for path in found if not path.endswith(f"/{MARKER}")]
        files[layer] += [path for path in found if not path.endswith("/")]
        if f"layers/{folder}/{MARKER}" in found:
            completed.append(folder)
    stamps = dict(zip(timed, _stamps(root, timed), strict=True))
    place = location_text(group, name, metadata)
    fresh = any(_fresh(stamp, now) for stamp in stamps.values())
    return WindowState(
        group=group,
        name=name,
        bounds=pixel_bounds(metadata, root),
        projection=json.dumps(metadata["projection"]),
        times=json.dumps(metadata.get("time_range") or None),
        options=json.dumps(metadata["options"]),
        completed="|".join(completed),
        layout="\n".join(timed),
        shortcut=NEVER if fresh else digest(array("q", [v for stamp in stamps.values() for v in stamp]).tobytes()),
        base=_of_files(place, ["items.json"] if "items.json" in shape else [], stamps, now),
        layers={layer: _of_files(layer + place, paths, stamps, now) for layer, paths in files.items()},
        fresh=fresh,
    )


def stamp_digest(root: str, layout: str, *, at: int | None = None) -> bytes | None:
    """The digest of the time stamps now; None when something is gone.

    Args:
        root: the window's folder.
        layout: of ``Seen``.
        at: an open folder that ``root`` is relative to.
    """
    try:
        return digest(array("q", [v for stamp in _stamps(root, layout.split("\n"), at=at) for v in stamp]).tobytes())
    except OSError:
        return None


@contextmanager
def open_folder(folder: str, *, at: int | None = None) -> Iterator[int]:
    """A folder whose entries are found by names relative to it: the kernel has fewer names to look up."""
    handle = os.open(folder, os.O_RDONLY, dir_fd=at)
    try:
        yield handle
    finally:
        os.close(handle)


def _first_entries(root: str) -> list[str]:
    names = {entry.name for entry in os.scandir(root)}
    return [name for name in ("items.json", "layers", "metadata.json") if name in names]


def _walk(root: str, folder: str) -> Iterator[str]:
    """Paths below a folder, sorted; folders end with a slash."""
    yield folder + "/"
    for entry in sorted(os.scandir(root + folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(root, f"{folder}/{entry.name}")
        else:
            yield f"{folder}/{entry.name}"


def _stamps(root: str, paths: Sequence[str], *, at: int | None = None) -> list[Stamp]:
    if len(paths) <= _FEW:
        return [_stamp(f"{root}/{path}" if path else root, at) for path in paths]
    with open_folder(root, at=at) as handle:
        return [_stamp(path or ".", handle) for path in paths]


def _stamp(path: str, at: int | None) -> Stamp:
    state = os.stat(path, dir_fd=at)
    # The time of change can't be set: it tells of content that was exchanged with size and time of writing kept.
    return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino


def _of_files(salt: str, paths: Sequence[str], stamps: dict[str, Stamp], now: int) -> bytes:
    lines = [salt]
    for path in paths:
        stamp = stamps.get(path)
        # A marker counts by being there.
        lines.append(f"{path} {stamp}" if stamp else path)
        if stamp and _fresh(stamp, now):
            # No later look will match this one.
            lines.append(os.urandom(DIGEST).hex())
    return digest("\n".join(lines).encode())


def _fresh(stamp: Stamp, now: int) -> bool:
    return any(abs(now - at) < (TICK_NS if at % _SECOND_NS else COARSE_TICK_NS) for at in stamp[:2])


def location_text(group: str, name: str, metadata: dict[str, Any]) -> str:
    """Where a window lies, in a text that goes into every digest of it."""
    return json.dumps([group, name, metadata["projection"], metadata["bounds"]], sort_keys=True)


def digest(raw: bytes) -> bytes:
    """A digest of ``DIGEST`` bytes."""
    return blake2b(raw, digest_size=DIGEST).digest()


def parsed_metadata(raw: bytes, root: str) -> dict[str, Any]:
    """A window's ``metadata.json``.

    Raises:
        DataError: it is not what rslearn writes.
    """
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
    return metadata


def pixel_bounds(metadata: dict[str, Any], root: str) -> tuple[int, int, int, int]:
    """A window's bounds: x0, y0, x1, y1.

    Raises:
        ValueError: they are no whole pixels.
    """
    x0, y0, x1, y1 = metadata["bounds"]
    if not all(isinstance(value, int) for value in (x0, y0, x1, y1)):
        raise ValueError(f"{root}/metadata.json: the bounds {metadata['bounds']} are not whole pixels")
    return x0, y0, x1, y1
