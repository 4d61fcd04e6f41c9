"""Stage 1 with files: find and read those that a config names, compose, write; the only module here that uses files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rslp.config.compose import Anchor, RunConfig, Sources, compose
from rslp.config.merge import ClassReplacement, Overlay, differences, merge_overlays
from rslp.config.multi_dataset import MultiDatasetConfig, config_kind, read_multi_dataset_config
from rslp.config.notes import class_replacement_problems
from rslp.config.placeholders import Filler, placeholder_names
from rslp.config.provenance import explain, header, provenance_text
from rslp.errors import ConfigError, KeyPath, Problem
from rslp.io import (
    Document,
    anchor_paths,
    dump_yaml,
    find_file,
    full_disk,
    is_remote,
    plain_scalar,
    read_yaml,
    relativise_paths,
    shipped_config,
    write_atomic,
)

_SHIPPED = "data/helios/"
_SHIPPED_BASE = "v3_multitask/base.yaml"
_WANTED = {"base_cfg": ("base config", "run config"), "dataset_cfgs": ("dataset config",)}
# File systems allow 255 bytes, of which temporary names and that of the provenance file need some.
_LONGEST_NAME = 220


@dataclass(frozen=True)
class ComposedRunConfig:
    """A run config that stage 1 has composed, and not written yet.

    Attributes:
        path: the file that ``write`` writes.
        run: the config, with the origin of each value; its relative paths refer to the file's folder.
        documents: the files that it was made from, the multi-dataset config first.
    """

    path: Path
    run: RunConfig
    documents: tuple[Document, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The run config itself, as ``write`` writes it."""
        return self.run.tree

    @property
    def datasets(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the tasks of each dataset, by the dataset's key."""
        return self.run.datasets

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages to the user, one line each: what has no effect, and which old names were replaced."""
        return self.run.notes

    def explain(self, key: str) -> str:
        """Describe which file and line set a value, and which others it wins over.

        Args:
            key: dotted key, such as ``trainer.max_epochs``; list positions are numbers.

        Raises:
            UsageError: the run config has no such key.
        """
        return explain(self.run, key, self._name)

    def differences(self, file: str | Path) -> list[str]:
        """List how the run config in a file differs from this one, one line for each key path.

        Raises:
            ConfigError: the file can't be read.
        """
        return differences(read_yaml(file).data, self.config)

    def write(self) -> Path:
        """Write the run config, and beside it its provenance.

        Returns:
            The path of the run config.

        Raises:
            ConfigError: the folder can't be written.
            DiskError: the disk is full.
        """
        command = f"python make_multidataset_config.py --cfg {shlex.quote(self._name(self.documents[0]))}"
        contents = {
            self.path.with_suffix(".provenance.json"): provenance_text(self.run, self._name),
            self.path: header(self.documents, self._name, command=command) + dump_yaml(self.config),
        }
        for path, text in contents.items():
            try:
                write_atomic(path, text)
            except OSError as error:
                message = f"cannot write {display_path(str(path))}: {error.strerror}"
                raise full_disk(error, path) or ConfigError(_output_problem(message, self.documents[0])) from None
        return self.path

    @property
    def _name(self) -> Callable[[Document], str]:
        """Gives names of files that do not depend on the place of the checkout.

        A shipped file is named from the root of the checkout, another one from the folder of the run config.
        """
        root, names = shipped_config("."), {}
        for path in map(_path_of, self.documents):
            shipped = Path(path).is_relative_to(root)
            local = os.path.relpath(path, root if shipped else self.path.parent)
            names[path] = _SHIPPED + local if shipped else path if "://" in path else local
        return lambda document: names[_path_of(document)]


def compose_file(cfg: str | Path, *, keep_class_paths: bool = False) -> ComposedRunConfig:
    """Make a run config from a multi-dataset config (stage 1); nothing is written yet.

    Args:
        cfg: the multi-dataset config, a YAML file with ``dataset_cfgs`` and ``output_path``.
        keep_class_paths: leave class paths and arguments of earlier versions as they are, instead of migrating them.

    Returns:
        The run config as ``config``, messages as ``notes``, and the methods ``write``, ``explain``, ``differences``.

    Raises:
        ConfigError: all problems of the files, each with file, line and key.
    """
    return compose_config(read_multi_dataset_config(read_yaml(cfg)), keep_class_paths=keep_class_paths)


def compose_config(
    multi_config: MultiDatasetConfig, *, keep_class_paths: bool = False, with_data: bool = True
) -> ComposedRunConfig:
    """Make a run config, as ``compose_file`` does, from a multi-dataset config that was read already.

    Args:
        multi_config: the multi-dataset config.
        keep_class_paths: as there.
        with_data: whether the data has to be there; otherwise paths in the run config stay as the files have them, so
            that it is the same on each machine.

    Raises:
        ConfigError: all problems of the files.
    """
    output = _output_path(multi_config)
    sources = read_sources(multi_config)
    files = (file for files in sources.datasets for file in files)
    documents = [multi_config.document, sources.base, *files, *([sources.info] if sources.info else ())]
    problems = _overwritten_inputs(output, documents, multi_config)
    anchor = _anchor_for(multi_config) if with_data else lambda tree, *_: tree
    try:
        run = compose(multi_config, sources, anchor=anchor, keep_class_paths=keep_class_paths)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    if not with_data:
        return ComposedRunConfig(output, run, tuple(documents))
    origins = {
        key_path: [replace(origin, value=relativise_paths(origin.value, output.parent)) for origin in origins]
        for key_path, origins in run.origins.items()
    }
    run = replace(run, tree=relativise_paths(run.tree, output.parent), origins=origins)
    return ComposedRunConfig(output, run, tuple(documents))


def read_sources(multi_config: MultiDatasetConfig) -> Sources:
    """Read every file that the config names.

    Raises:
        ConfigError: all files that are missing, broken or of the wrong kind.
    """
    problems: list[Problem] = []
    base = _read_base(multi_config, problems)
    datasets = []
    for entry in multi_config.dataset_cfgs:
        key_paths = [
            _cfg_key_path(multi_config.document, multi_config.entry_path(entry), i) for i in range(len(entry.cfgs))
        ]
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
    path = shipped_config(_SHIPPED_BASE)
    return read_yaml(path, name=display_path(str(path)))


def _read_info(multi_config: MultiDatasetConfig, base: Document, problems: list[Problem]) -> Document | None:
    path = base.data.get("all_dataset_info_path") if isinstance(base.data, Mapping) else None
    if not isinstance(path, str):
        return None
    folders = [base.folder, *_folders_of(multi_config)]
    info = _find_and_read(path, folders, base, ("all_dataset_info_path",), problems)
    if info is not None and not isinstance(info.data, Mapping):
        problems.append(Problem("is no table of datasets: a mapping is wanted", info.name))
    return info


def _read(
    multi_config: MultiDatasetConfig, path: str, key_path: KeyPath, key: str, problems: list[Problem]
) -> Document | None:
    document = _find_and_read(path, _folders_of(multi_config), multi_config.document, key_path, problems)
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


def _folders_of(multi_config: MultiDatasetConfig) -> list[str]:
    """The folders in which paths of the multi-dataset config are looked up."""
    return [multi_config.document.folder, str(Path.cwd())]


def _anchor_for(multi_config: MultiDatasetConfig) -> Anchor:
    """The ``Anchor`` that looks relative paths up beside their file, then beside the multi-dataset config."""

    def anchor(tree: Any, document: Document, source: KeyPath) -> Any:
        folders = [document.folder, *_folders_of(multi_config)]
        return anchor_paths(
            tree, folders, name=document.name, line=lambda key_path: document.nearest_line((*source, *key_path))
        )

    return anchor


def _path_of(document: Document) -> str:
    """A document's absolute path."""
    return f"{document.folder}/{document.name.rsplit('/', 1)[-1]}"


def display_path(path: str) -> str:
    """A path for messages: relative to the current directory where it lies below it."""
    if is_remote(path) or not Path(path).is_relative_to(Path.cwd()):
        return path
    return os.path.relpath(path)


def _output_problem(message: str, document: Document) -> Problem:
    """A problem with the output path of the multi-dataset config."""
    return Problem(message, document.name, document.line(("output_path",)), "output_path")


def _output_path(multi_config: MultiDatasetConfig) -> Path:
    """The path of the run config; without ``output_path``, a name made of base and datasets beside the base config."""
    if multi_config.output_path is not None:
        path = Path(os.path.expandvars(multi_config.output_path)).expanduser()
        output = path if path.is_absolute() else Path(multi_config.document.folder) / path
    else:
        base = Path(_SHIPPED + _SHIPPED_BASE if multi_config.base_cfg is None else multi_config.base_cfg)
        parts = [
            f"{Path(entry.cfgs[0]).parent.name}__{Path(entry.cfgs[0]).stem}" for entry in multi_config.dataset_cfgs
        ]
        base_file = multi_config.base_cfg and find_file(multi_config.base_cfg, _folders_of(multi_config))
        folder = Path(base_file).parent if base_file else Path(multi_config.document.folder)
        output = folder / f"{base.stem}__{'__'.join(parts)}.yaml"
    size = len(output.name.encode())
    message = ""
    if "://" in str(multi_config.output_path) or "${" in str(output):
        message = f"must be a local path, with no variable that is not set; got {multi_config.output_path!r}"
    elif output.suffix not in (".yaml", ".yml"):
        message = f"must end in .yaml; got {multi_config.output_path!r}"
    elif size > _LONGEST_NAME:
        message = f"a file's name may have {_LONGEST_NAME} bytes; this one has {size}: {output.name}"
    elif output.is_dir():
        message = f"{multi_config.output_path!r} is a folder"
    if message:
        raise ConfigError(_output_problem(message, multi_config.document))
    return Path(os.path.normpath(output))


def _overwritten_inputs(output: Path, documents: Sequence[Document], multi_config: MultiDatasetConfig) -> list[Problem]:
    """A problem for each input that the run config would overwrite."""
    return [
        _output_problem(f"would overwrite {document.name}, which is an input", multi_config.document)
        for document in {_path_of(document): document for document in documents}.values()
        if "://" not in _path_of(document) and output.exists() and Path(_path_of(document)).samefile(output)
    ]


def merge_configs(
    documents: Sequence[Document], constants: Mapping[str, Any], *, notes: list[str] | None = None
) -> dict[str, Any]:
    """Merge configs, later ones over earlier ones, and fill their placeholders.

    Args:
        documents: the configs, each a mapping.
        constants: value by name (``patch_size`` or ``PATCH_SIZE``); a text is read as unquoted YAML, so ``"8"`` is 8.
        notes: notes for the user, on arguments that were dropped with their class, are appended to it.

    Returns:
        The merged config. Relative paths, which refer to the file that names them, have become ``Anchored`` ones: give
        the config to ``rslp.io.relativise_paths`` before writing it.

    Raises:
        ConfigError: all problems: a file that is no mapping, a placeholder without a constant, a relative path that
            does not exist, an override that cannot be merged.
    """
    typed = {key: plain_scalar(value) if isinstance(value, str) else value for key, value in constants.items()}
    filler = Filler(placeholder_names(typed))
    problems: list[Problem] = []
    overlays = [_overlay(document, filler, problems) for document in documents]
    if problems:
        raise ConfigError(problems)
    replaced: list[ClassReplacement] = []
    merged = merge_overlays(overlays, replaced=replaced)
    dropped, problems = class_replacement_problems(replaced)
    if problems:
        raise ConfigError(problems)
    if notes is not None:
        notes += dropped
    return merged


def _overlay(document: Document, filler: Filler, problems: list[Problem]) -> Overlay:
    if not isinstance(document.data, Mapping):
        problems.append(Problem("is no config: a mapping is wanted", document.name))
        return Overlay({}, (), document, ())
    tree = filler.fill(document.data, lambda message, key: problems.append(document.problem(message, key)))
    try:
        tree = anchor_paths(tree, [document.folder], name=document.name, line=document.nearest_line)
    except ConfigError as error:
        problems += error.problems
    return Overlay(tree, (), document, ())
