"""Where a dataset's store lies, and who may write to it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem
from upath import UPath

from rslp.files import locks
from rslp.train import preemption

FOLDER = ".rslp-store"
CACHE = "RSLP_CACHE"


def store_folder(dataset: UPath, store: str) -> Path:
    """The folder of a dataset's store.

    Args:
        dataset: the dataset's folder, local or remote.
        store: ``auto``: beside the windows if they are local and the folder can be written, else in the folder of
            ``RSLP_CACHE`` (default ``~/.cache/rslp``). Anything else is a folder that holds the stores of all datasets.
    """
    if store == "auto":
        if isinstance(dataset.fs, LocalFileSystem):
            beside = Path(dataset.path) / FOLDER
            if os.access(beside if beside.exists() else beside.parent, os.W_OK):
                return beside
        store = os.environ.get(CACHE) or "~/.cache/rslp"
    name = f"{dataset.name}-{hashlib.sha256(str(dataset).encode()).hexdigest()[:12]}"
    return Path(store).expanduser() / "stores" / name


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that a folder, or its nearest parent that exists, lies on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a store, or a bank of features, for one writer; others wait, and say for whom.

    Raises:
        Preempted: this process was asked to leave while it waited.
    """
    wait = locks.waiting(f"is writing to {folder}", leave=preemption.leave_if_asked)
    with locks.locked(folder / "lock", busy=wait):
        yield
