"""Paths in configs: which values are paths, where a relative one is looked up, and how it travels to another folder.

The contract: absolute, remote (``scheme://``) and ``${VAR}`` paths stay as written. A relative path is looked up beside
the file that names it (and further folders that the caller names); in a run config it is written relative to that run
config, so that it never depends on the current directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rslp.errors import ConfigError, KeyPath, Problem, dotted
from rslp.io.objectstore import MOUNT_WEKA, WEKA
from rslp.io.yaml import Unquoted, plain_scalar

Line = Callable[[KeyPath], int | None]

# Arguments whose value is a path to something that exists, wherever they stand below `init_args` or at the root.
PATH_ARGS = frozenset(
    {
        "all_dataset_info_path",
        "backbone_ckpt_path",
        "checkpoint_dir",
        "checkpoint_path",
        "ckpt_path",
        "config_fname",
        "helios_checkpoint_path",
        "metadata_path",
        "model_path",
        "pretrained_path",
        "restore_path",
        "weights_path",
    }
)

# These may also hold the id of a published model, which looks like a relative path of two parts.
_MODEL_ARGS = frozenset({"checkpoint_path", "helios_checkpoint_path", "model_path", "pretrained_path"})
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z|(?i:olmoearth)[-_][vV]\d[\w.-]*\Z")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Anchored(str):
    """An absolute path that was written as a relative one; ``relativise_paths`` makes it relative again."""

    __slots__ = ()


def is_portable(path: str) -> bool:
    """Tell whether a path stays as it is written: absolute, remote, starting with ``~`` or with a ``${VAR}`` in it."""
    return path.startswith(("/", "~")) or bool(_REMOTE.match(path)) or bool(_VARIABLE.search(path))


def find_file(path: str, folders: Sequence[str]) -> str | None:
    """Look a file or folder up.

    Args:
        path: as written; a portable path is given back as it is, without looking.
        folders: where to look, in this order.

    Returns:
        The absolute path of the first that exists, or None.
    """
    if is_portable(path):
        return path
    for folder in folders:
        if "://" in folder:
            return f"{folder}/{path}"
        if (Path(folder) / path).exists():
            return os.path.normpath(Path(folder) / path)
    return None


def shipped_config(relative: str) -> Path:
    """Find a config that ships with rslp.

    Args:
        relative: path below ``data/helios``, for example ``v3_multitask/base.yaml``.

    Returns:
        The file in the checkout, or in the installed package (``rslp/_data/helios``).

    Raises:
        ConfigError: there is no such file.
    """
    package = Path(__file__).resolve().parents[1]
    roots = (package.parent / "data" / "helios", package / "_data" / "helios")
    for root in roots:
        if (root / relative).exists():
            return root / relative
    raise ConfigError(Problem(f"no such shipped config; looked in {', '.join(map(str, roots))}", file=relative))


def anchor_paths(tree: Any, folders: Sequence[str], *, name: str, line: Line, base: KeyPath = ()) -> Any:
    """Make the relative paths of a config absolute by looking them up; other paths stay as written.

    Args:
        tree: the config; it is not changed.
        folders: where to look, best first.
        name: the file's name in messages.
        line: gives the line of a key path in that file.
        base: where the tree stands in its file.

    Returns:
        The tree with ``Anchored`` values.

    Raises:
        ConfigError: relative paths that are nowhere to be found, all of them.
    """
    problems: list[Problem] = []

    def anchor(path: str, at: KeyPath) -> str:
        found = find_file(path, folders)
        # A path with a brace in it has a left-over placeholder, which is a fault of its own.
        if found is None and (_is_model_id(path, at, folders) or "{" in path):
            return path
        if found is None:
            tried = ", ".join(dict.fromkeys(folders))
            problems.append(Problem(f"{path!r} does not exist; looked in {tried}", name, line(at), dotted(at)))
            return path
        return path if found == path else Anchored(found)

    result = _each_path(tree, anchor, base)
    if problems:
        raise ConfigError(problems)
    return result


def resolve_paths(tree: Any, base_dir: str | Path, *, name: str = "", line: Line | None = None) -> Any:
    """Make a run config usable in this process: variables expanded everywhere, and its paths absolute.

    Args:
        tree: the run config; it is not changed.
        base_dir: the run config's folder, which its relative paths refer to.
        name: the file's name in messages.
        line: gives the line of a key path in that file.

    Returns:
        The config with ``${VAR}`` expanded and relative paths absolute; a value that stood without quotes may become a
        number. The id of a published model stays.

    Raises:
        ConfigError: environment variables that are not set, and paths that nothing can read, all of them.
    """
    problems: list[Problem] = []

    def expand(text: str, at: KeyPath) -> Any:
        for variable in _VARIABLE.findall(text):
            if variable not in os.environ:
                what = f"the environment variable {variable} is not set; {str(text)!r} needs it"
                problems.append(Problem(what, name, None if line is None else line(at), dotted(at)))
        full = _VARIABLE.sub(lambda match: os.environ.get(match.group(1), match.group()), text)
        return plain_scalar(full) if isinstance(text, Unquoted) and not _is_path(at) else full

    def resolve(path: str, at: KeyPath) -> Any:
        full = expand(path, at)
        if not _is_path(at):
            return full
        problems.extend(_unreadable(full, name, None if line is None else line(at), dotted(at)))
        if full.startswith("~"):
            return str(Path(full).expanduser())
        if full.startswith("/") or _REMOTE.match(full):
            return full
        found = find_file(full, [str(base_dir)])
        if found is None and _is_model_id(full, at, [str(base_dir)]):
            return full
        return found or os.path.normpath(Path(base_dir).absolute() / full)

    result = _each_text(tree, resolve, ())
    if problems:
        raise ConfigError(problems)
    return result


def paths_in(tree: Any) -> list[str]:
    """List the paths that a config names, each once, as they are written."""
    found: dict[str, None] = {}

    def keep(path: str, _: KeyPath) -> str:
        found[path] = None
        return path

    _each_path(tree, keep, ())
    return list(found)


def relativise_paths(tree: Any, base_dir: str | Path) -> Any:
    """Write anchored paths relative to a folder.

    Args:
        tree: a config from ``anchor_paths``; it is not changed.
        base_dir: the folder of the file that the config will be written to.

    Returns:
        The config with plain texts; a path that was absolute from the start is left alone.
    """
    if isinstance(tree, Anchored):
        return (
            str(tree) if "://" in str(base_dir) or "://" in tree else os.path.relpath(tree, Path(base_dir).absolute())
        )
    if isinstance(tree, dict):
        return {key: relativise_paths(value, base_dir) for key, value in tree.items()}
    if isinstance(tree, list):
        return [relativise_paths(value, base_dir) for value in tree]
    return tree


def _each_path(tree: Any, change: Callable[[str, KeyPath], str], at: KeyPath) -> Any:
    return _each_text(tree, lambda text, at: change(text, at) if _is_path(at) else text, at)


def _each_text(tree: Any, change: Callable[[str, KeyPath], Any], at: KeyPath) -> Any:
    if isinstance(tree, dict):
        return {key: _each_text(value, change, (*at, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_each_text(value, change, (*at, position)) for position, value in enumerate(tree)]
    return change(tree, at) if isinstance(tree, str) and tree else tree


def _is_path(at: KeyPath) -> bool:
    if not at:
        return False
    if at[-1] == "path":
        # `path` is the dataset's folder in a data module's arguments, and anything at all elsewhere.
        return at[-3:-1] == ("data", "init_args") or (at[-4:-3] == ("data_modules",) and at[-2] == "init_args")
    return at[-1] in PATH_ARGS


def _is_model_id(path: str, at: KeyPath, folders: Sequence[str]) -> bool:
    if at[-1] not in _MODEL_ARGS or not _MODEL_ID.match(path):
        return False
    # `models/encodr` beside a folder `models` is a misspelt path, not a model of an owner called `models`.
    owner = path.split("/")[0]
    return "/" not in path or not any((Path(folder) / owner).is_dir() for folder in folders)


def _unreadable(path: str, *place: Any) -> list[Problem]:
    return [Problem(f"{path!r} can't be read: {MOUNT_WEKA}", *place)] if path.startswith(WEKA) else []
