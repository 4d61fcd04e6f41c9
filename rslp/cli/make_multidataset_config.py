"""Stage 1 on the command line: read what a multi-dataset config names, compose, write."""

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
# File systems take 255, of which some are needed while the file is written and for the provenance's name.
_LONGEST_NAME = 220


def make_multidataset_config(
    cfg: str, keep_class_paths: bool = False, explain: str | None = None, diff: str | None = None
) -> None:
    """Make one run config from a multi-dataset config.

    Args:
        cfg: The multi-dataset config: a YAML file with dataset_cfgs and output_path.
        keep_class_paths: Leave old class paths and arguments as they are, instead of bringing them up to date.
        explain: Write nothing; tell which file and line set this key, for example trainer.max_epochs.
        diff: Write nothing; list how this run config differs from what would be written.
    """
    multi_config = read_multi_dataset_config(read_yaml(cfg))
    output = _output_path(multi_config)
    sources = read_sources(multi_config)
    documents = all_documents(multi_config, sources)
    problems = _inputs_at(output, documents, multi_config)
    try:
        run = compose(multi_config, sources, anchor=anchor_for(multi_config), keep_class_paths=keep_class_paths)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    for note in run.notes:
        sys.stderr.write(f"note: {note}\n")
    names = _Names(output.parent)
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
class _Names:
    """Names files as they are seen from the run config, and shipped ones from the root of the checkout.

    So no name depends on where the checkout lies, or on whether the run config lies in it.
    """

    folder: Path
    known: dict[str, str] = field(default_factory=dict)

    def __call__(self, document: Document) -> str:
        path = path_of(document)
        if path not in self.known:
            root = shipped_config(".")
            apart = Path(path).is_relative_to(root)
            self.known[path] = _SHIPPED + os.path.relpath(path, root) if apart else self._seen(path)
        return self.known[path]

    def _seen(self, path: str) -> str:
        return path if "://" in path else os.path.relpath(path, self.folder)


def _write(run: RunConfig, *, output: Path, documents: Sequence[Document], names: _Names) -> None:
    command = f"python make_multidataset_config.py --cfg {shlex.quote(names(documents[0]))}"
    contents = {
        output.with_suffix(".provenance.json"): provenance_text(run, names),
        output: header(documents, names, command=command) + dump_yaml(run.tree),
    }
    for path, text in contents.items():
        try:
            write_atomic(path, text)
        except OSError as error:
            what = f"cannot write {display_path(str(path))}: {error.strerror}"
            maker = documents[0]
            problem = Problem(what, maker.name, maker.line(("output_path",)), "output_path")
            raise full_disk(error, path) or ConfigError(problem) from None


def _output_path(multi_config: MultiDatasetConfig) -> Path:
    if multi_config.output_path is not None:
        path = Path(os.path.expandvars(multi_config.output_path)).expanduser()
        output = path if path.is_absolute() else Path(multi_config.document.folder) / path
    else:
        base = Path(_SHIPPED + SHIPPED_BASE if multi_config.base_cfg is None else multi_config.base_cfg)
        parts = [f"{Path(entry.cfgs[0]).parent.name}__{Path(entry.cfgs[0]).stem}" for entry in multi_config.entries]
        found = None if multi_config.base_cfg is None else find_file(multi_config.base_cfg, folders_of(multi_config))
        folder = Path(found).parent if found else Path(multi_config.document.folder)
        output = folder / f"{base.stem}__{'__'.join(parts)}.yaml"
    line = multi_config.document.line(("output_path",))
    if "://" in str(multi_config.output_path) or "${" in str(output):
        what = f"must be a local path, with no variable that is not set; got {multi_config.output_path!r}"
        raise ConfigError(Problem(what, multi_config.document.name, line, "output_path"))
    if output.suffix not in (".yaml", ".yml"):
        what = f"must end in .yaml; got {multi_config.output_path!r}"
        raise ConfigError(Problem(what, multi_config.document.name, line, "output_path"))
    if len(output.name.encode()) > _LONGEST_NAME:
        what = f"a file's name may have {_LONGEST_NAME} bytes; this one has {len(output.name.encode())}: {output.name}"
        raise ConfigError(Problem(what, multi_config.document.name, line, "output_path"))
    if output.is_dir():
        raise ConfigError(
            Problem(f"{multi_config.output_path!r} is a folder", multi_config.document.name, line, "output_path")
        )
    return Path(os.path.normpath(output))


def _inputs_at(output: Path, documents: Sequence[Document], multi_config: MultiDatasetConfig) -> list[Problem]:
    """What would be overwritten that the run config is made from."""
    line = multi_config.document.line(("output_path",))
    return [
        Problem(f"would overwrite {document.name}, which is an input", multi_config.document.name, line, "output_path")
        for document in {path_of(document): document for document in documents}.values()
        if "://" not in path_of(document) and output.exists() and Path(path_of(document)).samefile(output)
    ]
