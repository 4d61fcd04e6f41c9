"""The workflow that looks at a run config and its data before a long run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from rslp.check.findings import Finding
from rslp.check.source_map import SourceMap
from rslp.config import merge, merge_configs, refuse_unrunnable
from rslp.errors import ConfigError, Problem, UsageError
from rslp.io import Document, read_yaml, resolve_paths
from rslp.runtime import class_paths


def check(
    config_paths: list[str],
    images: int = 16,
    labels: int = 500,
    max_overlap: float = 0.01,
    data: bool = True,
    forward: bool = True,
    helios_checkpoint_path: str | None = None,
    encoder_embedding_size: int | None = None,
    patch_size: int | None = None,
    allow: list[str] | None = None,
    trust: list[str] | None = None,
) -> int:
    """Check a run config and its data before a long run; every fault is named with the file and line to mend.

    The config is parsed by the parser of the run, and model, data modules and trainer are made, on the CPU. Then, of
    every dataset: folder, layers, bands, windows by split, labels, units of the values, image sizes, and whether
    held-out windows lie on ground that any dataset trains on. A table shows what the run will see.

    Args:
        config_paths: the run config that make_multidataset_config wrote; several are merged, later ones win.
        images: windows of each split whose images are read.
        labels: windows of each split whose labels are read.
        max_overlap: share of a dataset's held-out windows that may lie on training windows of any dataset.
        data: look at the datasets too; false checks the config and the checkpoint alone.
        forward: send two samples of each dataset through the model, on the CPU.
        helios_checkpoint_path: fills {CHECKPOINT_PATH} in a config that make_multidataset_config has not made.
        encoder_embedding_size: fills {ENCODER_EMBEDDING_SIZE}, likewise.
        patch_size: fills {PATCH_SIZE}, likewise.
        allow: ids of findings, as they stand behind them in brackets: errors with these are warnings.
        trust: packages, beside the installed ones, whose classes the config may name: their code is run.
    """
    if not config_paths:
        raise UsageError("--config_paths is empty: name the run config that make_multidataset_config wrote")
    if images < 1 or labels < 1 or not 0 <= max_overlap <= 1:
        raise UsageError("--images and --labels must be at least 1, --max_overlap must be 0 to 1")
    documents = [read_yaml(path) for path in config_paths]
    constants = {
        "CHECKPOINT_PATH": helios_checkpoint_path,
        "ENCODER_EMBEDDING_SIZE": encoder_embedding_size,
        "PATCH_SIZE": patch_size,
    }
    given = {key: value for key, value in constants.items() if value is not None}
    config, missing = _merged(documents, given)
    refuse_unrunnable(config, name=documents[-1].name)
    class_paths.trust(trust or ())
    try:
        class_paths.refuse_untrusted(config, documents)
    except ConfigError as error:
        raise ConfigError(map(SourceMap(documents).traced, error.problems)) from None
    # rslearn gives each of its loggers a handler of its own, at a level that is read from here when it is imported.
    os.environ.setdefault("RSLEARN_LOGLEVEL", "WARNING")
    from rslp.check.check import CheckOptions
    from rslp.check.check import check as check_all
    from rslp.check.table import summary_tables

    effort = CheckOptions(
        images=images, labels=labels, max_overlap=max_overlap, data=data, forward=forward, allow=allow or ()
    )
    checked = check_all(config, effort=effort, console=Console(stderr=True))
    if checked.reports:
        Console().print(*summary_tables(checked.reports))
    _tell(checked.findings, documents, missing)
    seen = f" in {len(checked.reports)} datasets" if data else "; the data was not looked at"
    sys.stdout.write(f"{', '.join(config_paths)}: no errors{seen}\n")
    return 0


def _tell(findings: Sequence[Finding], documents: Sequence[Document], missing: Sequence[Problem]) -> None:
    """Print warnings.

    Raises:
        ConfigError: all that is wrong.
    """
    places = SourceMap(documents)
    for finding in findings:
        if not finding.error:
            sys.stderr.write(f"{'allowed' if finding.allowed else 'warning'}: {_named(places, finding)}\n")
    lost = [places.traced(problem) for problem in missing]
    known = {(problem.file, problem.line, problem.key) for problem in lost}
    found = [_named(places, finding) for finding in findings if finding.error]
    # A path that is missing is met again by what would read it.
    if errors := [*lost, *(one for one in found if (one.file, one.line, one.key) not in known)]:
        raise ConfigError(dict.fromkeys(errors))


def _named(places: SourceMap, finding: Finding) -> Problem:
    """A finding at its place, with its id."""
    return places.problem(replace(finding, what=f"{finding.what} [{finding.id}]"))


def _merged(documents: Sequence[Document], constants: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[Problem]]:
    """The config with usable paths, and the paths that are missing; the check goes on without them.

    Raises:
        ConfigError: a file that is no config, a placeholder without a constant, a variable that is not set.
    """
    last = documents[-1]
    problems: Sequence[Problem] = ()
    try:
        notes: list[str] = []
        merged = merge_configs(documents, constants, notes=notes)
        sys.stderr.writelines(f"note: {note}\n" for note in notes)
    except ConfigError as error:
        if not all("does not exist" in problem.what for problem in error.problems):
            raise
        problems = error.problems
        merged = {}
        for document in documents:
            merged = merge(merged, resolve_paths(document.data, document.folder, name=document.name))
    return resolve_paths(merged, last.folder, name=last.name, line=last.nearest_line), problems
