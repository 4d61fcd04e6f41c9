"""Paths in configs: which values are paths, and their two forms: absolute in memory, relative in a written file.

``anchor_paths`` makes the paths of a file that was read absolute, ``relativise_paths`` makes them relative to the file
that is written, and ``resolve_paths`` prepares a run config for use, its variables too. In files, absolute, remote
(``scheme://``) and ``${VAR}`` paths stay as written. A relative path is looked up beside the file that names it, and in
further folders that the caller names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rslp.errors import ConfigError, KeyPath, Problem, dotted
from rslp.io.objectstore import MOUNT_WEKA, WEKA, is_remote
from rslp.io.yaml import Unquoted, plain_scalar

Line = Callable[[KeyPath], int | None]

# Arguments whose value is the path of an existing file or folder, at any depth of a config.
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
        "olmoearth_checkpoint_path",
        "pretrained_path",
        "restore_path",
        "weights_path",
    }
)

# These may also hold the id of a published model, which looks like a relative path of two parts.
_MODEL_ARGS = frozenset(
    {"checkpoint_path", "helios_checkpoint_path", "model_path", "olmoearth_checkpoint_path", "pretrained_path"}
)
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z|(?i:olmoearth)[-_][vV]\d[\w.-]*\Z")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Anchored(str):
    """An absolute path that was written as a relative one; ``relativise_paths`` makes it relative again."""

    __slots__ = ()


def is_portable(path: str) -> bool:
    """Whether a path stays as it is written: absolute, remote, starting with ``~`` or with a ``${VAR}`` in it."""
    return path.startswith(("/", "~")) or bool(_REMOTE.match(path)) or bool(_VARIABLE.search(path))


def find_file(path: str, folders: Sequence[str]) -> str | None:
    """Look a file or folder up.

    Args:
        path: as written; a portable path is returned as it is, without a look-up.
        folders: folders to look in, in this order.

    Returns:
        The absolute path of the first that exists, or None. In a remote folder, every path is taken to exist.
    """
    if is_portable(path):
        return path
    for folder in folders:
        if is_remote(folder):
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


def anchor_paths(tree: Any, folders: Sequence[str], *, name: str, line: Line) -> Any:
    """Make the relative paths of a config absolute by looking them up; other paths stay as written.

    Args:
        tree: the config; it is not changed.
        folders: folders to look in, in this order.
        name: the file's name in messages.
        line: gives the line of a key path in that file.

    Returns:
        The tree with ``Anchored`` values.

    Raises:
        ConfigError: all relative paths that do not exist in any of the folders.
    """
    problems: list[Problem] = []

    def anchor(path: str, key_path: KeyPath) -> str:
        absolute = find_file(path, folders)
        # A path with a brace in it has a left-over placeholder, which is a problem of its own.
        if absolute is None and (_is_model_id(path, key_path, folders) or "{" in path):
            return path
        if absolute is None:
            tried = ", ".join(dict.fromkeys(folders))
            problems.append(
                Problem(f"{path!r} does not exist; looked in {tried}", name, line(key_path), dotted(key_path))
            )
            return path
        return path if absolute == path else Anchored(absolute)

    result = _each_path(tree, anchor)
    if problems:
        raise ConfigError(problems)
    return result


def resolve_paths(tree: Any, base_dir: str | Path, *, name: str = "", line: Line | None = None) -> Any:
    """Prepare a run config for use in this process: expand its variables, and make its paths absolute.

    Args:
        tree: the run config; it is not changed.
        base_dir: the run config's folder, which its relative paths refer to.
        name: the file's name in messages.
        line: gives the line of a key path in that file.

    Returns:
        The config with ``${VAR}`` expanded and relative paths absolute; an unquoted value may become a number. The id
        of a published model stays.

    Raises:
        ConfigError: all environment variables that are not set, and all paths on file systems that are not mounted.
    """
    problems: list[Problem] = []

    def add(message: str, key_path: KeyPath) -> None:
        problems.append(Problem(message, name, None if line is None else line(key_path), dotted(key_path)))

    def expand(text: str, key_path: KeyPath) -> Any:
        for variable in _VARIABLE.findall(text):
            if variable not in os.environ:
                add(f"the environment variable {variable} is not set; {str(text)!r} needs it", key_path)
        full = _VARIABLE.sub(lambda match: os.environ.get(match.group(1), match.group()), text)
        return plain_scalar(full) if isinstance(text, Unquoted) and not _is_path(key_path) else full

    def resolve(path: str, key_path: KeyPath) -> Any:
        full = expand(path, key_path)
        if not _is_path(key_path):
            return full
        if full.startswith(WEKA):
            add(f"{full!r} can't be read: {MOUNT_WEKA}", key_path)
        return _absolute(full, key_path, str(base_dir))

    result = _each_text(tree, resolve, ())
    if problems:
        raise ConfigError(problems)
    return result


def _absolute(path: str, key_path: KeyPath, folder: str) -> str:
    if path.startswith("~"):
        return str(Path(path).expanduser())
    absolute = find_file(path, [folder])
    if absolute is None and _is_model_id(path, key_path, [folder]):
        return path
    return absolute or os.path.normpath(Path(folder).absolute() / path)


def paths_in(tree: Any) -> list[str]:
    """List the paths that a config names, each once, as they are written."""
    paths: dict[str, str] = {}
    _each_path(tree, lambda path, _: paths.setdefault(path, path))
    return list(paths)


def relativise_paths(tree: Any, base_dir: str | Path) -> Any:
    """Make anchored paths relative to the folder of the file that the config is written to.

    Args:
        tree: a config from ``anchor_paths``; it is not changed.
        base_dir: that folder.

    Returns:
        The config with plain texts; a path that was written as an absolute one stays.
    """
    if isinstance(tree, Anchored):
        remote = is_remote(str(base_dir)) or is_remote(tree)
        return str(tree) if remote else os.path.relpath(tree, Path(base_dir).absolute())
    if isinstance(tree, dict):
        return {key: relativise_paths(value, base_dir) for key, value in tree.items()}
    if isinstance(tree, list):
        return [relativise_paths(value, base_dir) for value in tree]
    return tree


def _each_path(tree: Any, change: Callable[[str, KeyPath], str]) -> Any:
    return _each_text(tree, lambda text, key_path: change(text, key_path) if _is_path(key_path) else text, ())


def _each_text(tree: Any, change: Callable[[str, KeyPath], Any], key_path: KeyPath) -> Any:
    if isinstance(tree, dict):
        return {key: _each_text(value, change, (*key_path, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_each_text(value, change, (*key_path, position)) for position, value in enumerate(tree)]
    return change(tree, key_path) if isinstance(tree, str) and tree else tree


def _is_path(key_path: KeyPath) -> bool:
    if not key_path:
        return False
    if key_path[-1] == "path":
        # `path` is the dataset's folder in a data module's arguments, and anything at all elsewhere.
        return key_path[-3:-1] == ("data", "init_args") or (
            key_path[-4:-3] == ("data_modules",) and key_path[-2] == "init_args"
        )
    return key_path[-1] in PATH_ARGS


def _is_model_id(path: str, key_path: KeyPath, folders: Sequence[str]) -> bool:
    if key_path[-1] not in _MODEL_ARGS or not _MODEL_ID.match(path):
        return False
    # `models/encodr` beside a folder `models` is a misspelt path, not a model of an owner called `models`.
    owner = path.split("/")[0]
    return "/" not in path or not any((Path(folder) / owner).is_dir() for folder in folders)
