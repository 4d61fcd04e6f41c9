"""Find and read the files that a multi-dataset config names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rslp.config import Anchor, MultiDatasetConfig, Sources, config_kind
from rslp.errors import ConfigError, KeyPath, Problem
from rslp.io import Document, anchor_paths, find_file, is_remote, read_yaml, shipped_config

SHIPPED_BASE = "v3_multitask/base.yaml"
_WANTED = {"base_cfg": ("base config", "run config"), "dataset_cfgs": ("dataset config",)}


def read_sources(multi_config: MultiDatasetConfig) -> Sources:
    """Read every file that the config names.

    Raises:
        ConfigError: all files that are missing, broken or of the wrong kind.
    """
    problems: list[Problem] = []
    base = _read_base(multi_config, problems)
    datasets = []
    for entry in multi_config.entries:
        key_paths = [_cfg_key_path(multi_config.document, entry.key_path, i) for i in range(len(entry.cfgs))]
        pairs = zip(entry.cfgs, key_paths, strict=True)
        documents = [_read(multi_config, path, key_path, "dataset_cfgs", problems) for path, key_path in pairs]
        datasets.append(tuple(document for document in documents if document is not None))
    info = _read_info(multi_config, base, problems) if base is not None else None
    if problems or base is None:
        raise ConfigError(dict.fromkeys(problems))
    return Sources(base, tuple(datasets), info)


def _read_base(multi_config: MultiDatasetConfig, problems: list[Problem]) -> Document | None:
    if multi_config.base_cfg is not None:
        return _read(multi_config, multi_config.base_cfg, ("base_cfg",), "base_cfg", problems)
    path = shipped_config(SHIPPED_BASE)
    return read_yaml(path, name=display_path(str(path)))


def _read_info(multi_config: MultiDatasetConfig, base: Document, problems: list[Problem]) -> Document | None:
    path = base.data.get("all_dataset_info_path") if isinstance(base.data, Mapping) else None
    if not isinstance(path, str):
        return None
    folders = [base.folder, *folders_of(multi_config)]
    info = _find_and_read(path, folders, base, ("all_dataset_info_path",), problems)
    if info is not None and not isinstance(info.data, Mapping):
        problems.append(Problem("is no table of datasets: a mapping is wanted", info.name))
    return info


def _read(
    multi_config: MultiDatasetConfig, path: str, key_path: KeyPath, key: str, problems: list[Problem]
) -> Document | None:
    document = _find_and_read(path, folders_of(multi_config), multi_config.document, key_path, problems)
    if document is None:
        return None
    kind = config_kind(document.data)
    if kind == "multi-dataset config" or not isinstance(document.data, Mapping) or (kind and kind not in _WANTED[key]):
        actual = f"a {kind}" if kind else "no config: a mapping with data and model is wanted"
        actual = "empty" if document.data is None else actual
        problems.append(Problem(f"is {actual}, but {key} names it; a {_WANTED[key][0]} is wanted", document.name))
        return None
    return document


def _find_and_read(
    path: str, folders: list[str], namer: Document, key_path: KeyPath, problems: list[Problem]
) -> Document | None:
    """Read a file that another one names at ``key_path``; None, and a problem more, where that fails."""
    expanded = os.path.expandvars(path)
    if "${" in expanded:
        problems.append(namer.problem(f"{path!r} needs an environment variable that is not set", key_path))
        return None
    file = find_file(str(Path(expanded).expanduser()) if expanded.startswith("~") else expanded, folders)
    if file is None or (not is_remote(file) and not Path(file).exists()):
        looked_in = f"; looked in {', '.join(dict.fromkeys(folders))}" if file is None else ""
        problems.append(namer.problem(f"{path!r} does not exist{looked_in}", key_path))
        return None
    if not is_remote(file) and not Path(file).is_file() and not Path(file).is_dir():
        problems.append(namer.problem(f"{path!r} is no regular file", key_path))
        return None
    try:
        return read_yaml(file, name=display_path(file))
    except ConfigError as error:
        for problem in error.problems:
            # A remote file that cannot be read is reported where it is named.
            unread = is_remote(file) and not problem.line
            problems.append(namer.problem(f"{path!r} {problem.what}", key_path) if unread else problem)
        return None


def _cfg_key_path(document: Document, entry: KeyPath, position: int) -> KeyPath:
    """The key path of a file of an entry, in whichever form the entry is written."""
    forms = ((*entry, "cfgs", position), (*entry, "cfgs"), (*entry, position), entry)
    return next((form for form in forms if document.line(form) is not None), entry)


def folders_of(multi_config: MultiDatasetConfig) -> list[str]:
    """The folders in which paths of the multi-dataset config are looked up."""
    return [multi_config.document.folder, str(Path.cwd())]


def anchor_for(multi_config: MultiDatasetConfig) -> Anchor:
    """The ``Anchor`` that looks relative paths up beside their file, then beside the multi-dataset config."""

    def anchor(tree: Any, document: Document, source: KeyPath) -> Any:
        folders = [document.folder, *folders_of(multi_config)]
        return anchor_paths(
            tree, folders, name=document.name, line=lambda key_path: document.nearest_line((*source, *key_path))
        )

    return anchor


def all_documents(multi_config: MultiDatasetConfig, sources: Sources) -> list[Document]:
    """Every file that a run config is made from, the multi-dataset config first."""
    documents = [multi_config.document, sources.base, *(file for files in sources.datasets for file in files)]
    return documents if sources.info is None else [*documents, sources.info]


def path_of(document: Document) -> str:
    """A document's absolute path."""
    return f"{document.folder}/{document.name.rsplit('/', 1)[-1]}"


def display_path(path: str) -> str:
    """A path for messages: relative to the current directory where it lies below it."""
    if is_remote(path) or not Path(path).is_relative_to(Path.cwd()):
        return path
    return os.path.relpath(path)
