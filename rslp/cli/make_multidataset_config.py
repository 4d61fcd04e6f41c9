"""The workflow of stage 1: read a multi-dataset config and the files that it names, compose and write a run config."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rslp.config import (
    MultiDatasetConfig,
    RunConfig,
    compose,
    differences,
    header,
    provenance_text,
    read_multi_dataset_config,
)
from rslp.config import explain as explain_key
from rslp.config.sources import SHIPPED_BASE, all_documents, anchor_for, display_path, folders_of, path_of, read_sources
from rslp.errors import ConfigError, Problem
from rslp.io import Document, dump_yaml, find_file, full_disk, read_yaml, relativise_paths, shipped_config, write_atomic

_SHIPPED = "data/helios/"
# File systems allow 255 bytes, of which temporary names and that of the provenance file need some.
_LONGEST_NAME = 220


def make_multidataset_config(
    cfg: str, keep_class_paths: bool = False, explain: str | None = None, diff: str | None = None
) -> None:
    """Make one run config from a multi-dataset config.

    Args:
        cfg: The multi-dataset config: a YAML file with dataset_cfgs and output_path.
        keep_class_paths: Leave old class paths and arguments as they are, instead of bringing them up to date.
        explain: Write nothing; print which file and line set this key, for example trainer.max_epochs.
        diff: Write nothing; list how this run config differs from what would be written.
    """
    multi_config = read_multi_dataset_config(read_yaml(cfg))
    output = _output_path(multi_config)
    sources = read_sources(multi_config)
    documents = all_documents(multi_config, sources)
    problems = _overwritten_inputs(output, documents, multi_config)
    try:
        run = compose(multi_config, sources, anchor=anchor_for(multi_config), keep_class_paths=keep_class_paths)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    for note in run.notes:
        sys.stderr.write(f"note: {note}\n")
    names = _FileNames(output.parent)
    overlays = tuple(replace(piece, tree=relativise_paths(piece.tree, output.parent)) for piece in run.overlays)
    run = replace(run, tree=relativise_paths(run.tree, output.parent), overlays=overlays)
    if explain is not None:
        sys.stdout.write(explain_key(run, explain, names) + "\n")
        return
    if diff is not None:
        changes = differences(read_yaml(diff).data, run.tree)
        sys.stdout.write("\n".join(changes or ["no difference"]) + "\n")
        return
    _write(run, output=output, documents=documents, names=names)
    sys.stdout.write(f"wrote {display_path(str(output))} ({len(run.datasets)} datasets: {', '.join(run.datasets)})\n")


@dataclass
class _FileNames:
    """Names of files that do not depend on the place of the checkout.

    A shipped file is named from the root of the checkout, another one from the folder of the run config.
    """

    folder: Path
    cache: dict[str, str] = field(default_factory=dict)

    def __call__(self, document: Document) -> str:
        path = path_of(document)
        if path not in self.cache:
            root = shipped_config(".")
            if Path(path).is_relative_to(root):
                self.cache[path] = _SHIPPED + os.path.relpath(path, root)
            else:
                self.cache[path] = path if "://" in path else os.path.relpath(path, self.folder)
        return self.cache[path]


def _write(run: RunConfig, *, output: Path, documents: Sequence[Document], names: _FileNames) -> None:
    command = f"python make_multidataset_config.py --cfg {shlex.quote(names(documents[0]))}"
    contents = {
        output.with_suffix(".provenance.json"): provenance_text(run, names),
        output: header(documents, names, command=command) + dump_yaml(run.tree),
    }
    for path, text in contents.items():
        try:
            write_atomic(path, text)
        except OSError as error:
            message = f"cannot write {display_path(str(path))}: {error.strerror}"
            raise full_disk(error, path) or ConfigError(_problem(message, documents[0])) from None


def _problem(message: str, document: Document) -> Problem:
    """A problem with the output path of the multi-dataset config."""
    return Problem(message, document.name, document.line(("output_path",)), "output_path")


def _output_path(multi_config: MultiDatasetConfig) -> Path:
    """The path of the run config; without ``output_path``, a name made of base and datasets beside the base config."""
    if multi_config.output_path is not None:
        path = Path(os.path.expandvars(multi_config.output_path)).expanduser()
        output = path if path.is_absolute() else Path(multi_config.document.folder) / path
    else:
        base = Path(_SHIPPED + SHIPPED_BASE if multi_config.base_cfg is None else multi_config.base_cfg)
        parts = [f"{Path(entry.cfgs[0]).parent.name}__{Path(entry.cfgs[0]).stem}" for entry in multi_config.entries]
        base_file = multi_config.base_cfg and find_file(multi_config.base_cfg, folders_of(multi_config))
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
        raise ConfigError(_problem(message, multi_config.document))
    return Path(os.path.normpath(output))


def _overwritten_inputs(output: Path, documents: Sequence[Document], multi_config: MultiDatasetConfig) -> list[Problem]:
    """A problem for each input that the run config would overwrite."""
    return [
        _problem(f"would overwrite {document.name}, which is an input", multi_config.document)
        for document in {path_of(document): document for document in documents}.values()
        if "://" not in path_of(document) and output.exists() and Path(path_of(document)).samefile(output)
    ]
