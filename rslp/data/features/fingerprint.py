"""Fingerprints of all that features depend on besides their window's files: config, weights, code and versions.

A run is made from its config alone, so the parts of the config that describe the dataset and the encoder decide how a
sample is read, cropped, transformed and encoded, together with the files and the classes that they name.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import rslp

FORMAT = 1
_PACKAGES = ("torch", "numpy", "rslearn", "olmoearth-pretrain-minimal")
# Keys of a dataset's description that have no influence on a sample.
_IRRELEVANT = frozenset({"batch_size", "num_workers", "shuffle", "sampler", "name"})
# Files above this size (bytes) are identified by size, times and inode in place of their content.
_LARGE = 64 << 20
_CHUNK = 1 << 24


def json_fingerprint(*parts: Any) -> str:
    """The fingerprint of JSON values, 24 hex digits."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()[:24]


def of_dataset(description: Any, *, config: bytes) -> Any:
    """JSON values that decide how samples are read and transformed, from a dataset's part of the run config.

    ``config`` is the content of its ``config.json``.
    """
    return [relevant(description), hashlib.sha256(config).hexdigest(), referenced_digests(description)]


def relevant(description: Any) -> Any:
    """A dataset's part of the run config, without the keys that have no influence on a sample."""
    if isinstance(description, Mapping):
        return {key: relevant(value) for key, value in description.items() if key not in _IRRELEVANT}
    return [relevant(value) for value in description] if isinstance(description, list) else description


def software_versions() -> dict[str, str]:
    """The versions of the packages that compute features, and a digest of our own code."""
    return {name: version(name) for name in _PACKAGES} | {"rslp": _own_code()}


def referenced_digests(description: Any) -> dict[str, str]:
    """Digests of the files that a config names, and of the source files of the classes that it names."""
    digests: dict[str, str] = {}
    for text in _texts(description):
        if text not in digests and (digest := _class_digest(text) or _path_digest(text)):
            digests[text] = digest
    return digests


def weights_digest(modules: Iterable[torch.nn.Module]) -> str:
    """A digest of all parameters and buffers, with their names, types and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for number, module in enumerate(modules):
        for name, value in sorted(module.state_dict(keep_vars=True).items()):
            if not isinstance(value, torch.Tensor):
                digest.update(f"{number} {name} {value!r}".encode())
                continue
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{number} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.numel():
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _class_digest(text: str) -> str | None:
    """The digest of the source of the class that a text names; None if it names none, or one of a listed package."""
    module, _, name = text.rpartition(".")
    if not module.replace(".", "").isidentifier() or not name.isidentifier():
        return None
    loaded = sys.modules.get(module)
    kind = getattr(loaded, name, None)
    if not isinstance(kind, type):
        return None
    files = {_source(base) for base in kind.__mro__}
    return "+".join(sorted(_content_digest(path) for path in files if path is not None)) or None


def _source(kind: type) -> Path | None:
    """The file of a class; None for those of packages whose versions are part of the fingerprint."""
    package = kind.__module__.partition(".")[0]
    if package in ("rslp", "builtins", "torch", "rslearn", "olmoearth_pretrain_minimal"):
        return None
    try:
        return Path(inspect.getfile(import_module(kind.__module__)))
    except TypeError:
        return None


def _path_digest(text: str) -> str | None:
    if "/" not in text or "://" in text or len(text) > 4096 or "\n" in text:
        return None
    path = Path(text)
    if not path.is_file():
        return None
    status = path.stat()
    if status.st_size <= _LARGE:
        return _content_digest(path)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _content_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@cache
def _own_code() -> str:
    """A digest of this package's modules, so that features of another state of the code are not used."""
    digest = hashlib.sha256()
    root = Path(rslp.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
