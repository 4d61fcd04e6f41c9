"""Find and read the files that a multi-dataset config names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rslp.config import Anchor, MultiDatasetConfig, Sources, config_kind
from rslp.errors import ConfigError, KeyPath, Problem, dotted
from rslp.io import Document, anchor_paths, find_file, read_yaml, shipped_config

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
        places = [_place(multi_config.document, entry.at, position) for position in range(len(entry.cfgs))]
        pairs = zip(entry.cfgs, places, strict=True)
        found = [_read(multi_config, path, at, "dataset_cfgs", problems) for path, at in pairs]
        datasets.append(tuple(document for document in found if document is not None))
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
    info = _read_found(path, folders, base, ("all_dataset_info_path",), problems)
    if info is not None and not isinstance(info.data, Mapping):
        problems.append(Problem("is no table of datasets: a mapping is wanted", info.name))
    return info


def _read(
    multi_config: MultiDatasetConfig, path: str, at: KeyPath, key: str, problems: list[Problem]
) -> Document | None:
    document = _read_found(path, folders_of(multi_config), multi_config.document, at, problems)
    if document is None:
        return None
    kind = config_kind(document.data)
    if kind == "multi-dataset config" or not isinstance(document.data, Mapping) or (kind and kind not in _WANTED[key]):
        told = f"a {kind}" if kind else "no config: a mapping with data and model is wanted"
        told = "empty" if document.data is None else told
        problems.append(Problem(f"is {told}, but {key} names it; a {_WANTED[key][0]} is wanted", document.name))
        return None
    return document


def _read_found(
    path: str, folders: list[str], namer: Document, at: KeyPath, problems: list[Problem]
) -> Document | None:
    key = dotted(at)
    expanded = os.path.expandvars(path)
    if "${" in expanded:
        what = f"{path!r} needs an environment variable that is not set"
        problems.append(Problem(what, namer.name, namer.nearest_line(at), key))
        return None
    found = find_file(str(Path(expanded).expanduser()) if expanded.startswith("~") else expanded, folders)
    if found is None or ("://" not in found and not Path(found).exists()):
        tried = f"; looked in {', '.join(dict.fromkeys(folders))}" if found is None else ""
        problems.append(Problem(f"{path!r} does not exist{tried}", namer.name, namer.nearest_line(at), key))
        return None
    if "://" not in found and not Path(found).is_file() and not Path(found).is_dir():
        problems.append(Problem(f"{path!r} is no regular file", namer.name, namer.nearest_line(at), key))
        return None
    try:
        return read_yaml(found, name=display_path(found))
    except ConfigError as error:
        for problem in error.problems:
            # A file on a store that can't be had is told where it is named.
            place = (namer.name, namer.nearest_line(at), key)
            told = Problem(f"{path!r} {problem.what}", *place) if "://" in found and not problem.line else problem
            problems.append(told)
        return None


def _place(document: Document, at: KeyPath, position: int) -> KeyPath:
    """Find where the multi-dataset config names a file of an entry, in whichever form it is written."""
    forms = ((*at, "cfgs", position), (*at, "cfgs"), (*at, position), at)
    return next((form for form in forms if document.line(form) is not None), at)


def folders_of(multi_config: MultiDatasetConfig) -> list[str]:
    """Give where the paths in the multi-dataset config are looked up."""
    return [multi_config.document.folder, str(Path.cwd())]


def anchor_for(multi_config: MultiDatasetConfig) -> Anchor:
    """Make the function that makes relative paths absolute: beside their file first, then where the recipe's are."""

    def anchor(tree: Any, document: Document, source: KeyPath) -> Any:
        folders = [document.folder, *folders_of(multi_config)]

        def line(at: KeyPath) -> int | None:
            return document.nearest_line((*source, *at))

        return anchor_paths(tree, folders, name=document.name, line=line)

    return anchor


def all_documents(multi_config: MultiDatasetConfig, sources: Sources) -> list[Document]:
    """Give every file that a run config is made from, the multi-dataset config first."""
    documents = [multi_config.document, sources.base, *(one for many in sources.datasets for one in many)]
    return documents if sources.info is None else [*documents, sources.info]


def path_of(document: Document) -> str:
    """Give a document's absolute path."""
    return f"{document.folder}/{document.name.rsplit('/', 1)[-1]}"


def display_path(path: str) -> str:
    """Show a path from the current directory when it lies below it."""
    if "://" in path or not Path(path).is_relative_to(Path.cwd()):
        return path
    return os.path.relpath(path)
