"""The workflow that checks a run config and its data before a long run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from rslp.check.findings import Finding
from rslp.check.source_map import SourceMap
from rslp.cli.run_configs import placeholder_values, quieten_rslearn, read_run_configs
from rslp.config import merge, merge_configs, refuse_unrunnable
from rslp.errors import ConfigError, Problem, UsageError
from rslp.io import Document, resolve_paths
from rslp.io.terminal import print_message
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
    """Check a run config and its data before a long run; every error names the file and line to mend.

    The config is parsed as by the run, and model, data modules and trainer are made, on the CPU. Then each dataset is
    checked: folder, layers, bands, windows by split, labels, units of the values, image sizes, and whether held-out
    windows lie on ground that any dataset trains on. A table summarises the datasets.

    Args:
        config_paths: the run config that make_multidataset_config wrote; several are merged, later ones win.
        images: windows of each split whose images are read.
        labels: windows of each split whose labels are read.
        max_overlap: share of a dataset's held-out windows that may lie on training windows of any dataset.
        data: check the datasets too; false checks the config and the checkpoint alone.
        forward: send two samples of each dataset through the model, on the CPU.
        helios_checkpoint_path: fills {CHECKPOINT_PATH} in a config that make_multidataset_config has not made.
        encoder_embedding_size: fills {ENCODER_EMBEDDING_SIZE}, likewise.
        patch_size: fills {PATCH_SIZE}, likewise.
        allow: ids of findings, which are printed in brackets behind them; errors with these ids become warnings.
        trust: packages, beside the installed ones, whose classes the config may name: their code is run.
    """
    if images < 1 or labels < 1 or not 0 <= max_overlap <= 1:
        raise UsageError("--images and --labels must be at least 1, --max_overlap must be 0 to 1")
    documents = read_run_configs(config_paths)
    values = placeholder_values(helios_checkpoint_path, encoder_embedding_size, patch_size)
    config, missing_paths = _merged(documents, values)
    refuse_unrunnable(config, name=documents[-1].name)
    class_paths.trust(trust or ())
    try:
        class_paths.refuse_untrusted(config, documents)
    except ConfigError as error:
        raise ConfigError(map(SourceMap(documents).traced, error.problems)) from None
    quieten_rslearn()
    from rslp.check.check import CheckOptions
    from rslp.check.check import check as check_all
    from rslp.check.table import summary_tables

    options = CheckOptions(
        images=images, labels=labels, max_overlap=max_overlap, data=data, forward=forward, allow=allow or ()
    )
    result = check_all(config, effort=options, console=Console(stderr=True))
    if result.reports:
        Console().print(*summary_tables(result.reports))
    _report(result.findings, documents, missing_paths)
    scope = f" in {len(result.reports)} datasets" if data else "; the data was not looked at"
    sys.stdout.write(f"{', '.join(config_paths)}: no errors{scope}\n")
    return 0


def _report(findings: Sequence[Finding], documents: Sequence[Document], missing_paths: Sequence[Problem]) -> None:
    """Print warnings; raise ``ConfigError`` with all errors among the findings and all missing paths."""
    sources = SourceMap(documents)
    for finding in findings:
        if not finding.error:
            print_message(f"{'allowed' if finding.allowed else 'warning'}: {_problem(sources, finding)}")
    missing = [sources.traced(problem) for problem in missing_paths]
    known = {(problem.file, problem.line, problem.key) for problem in missing}
    errors = [_problem(sources, finding) for finding in findings if finding.error]
    # What reads a missing path has reported it again.
    errors = [*missing, *(error for error in errors if (error.file, error.line, error.key) not in known)]
    if errors:
        raise ConfigError(dict.fromkeys(errors))


def _problem(sources: SourceMap, finding: Finding) -> Problem:
    """The finding with file and line, and its id behind its text."""
    return sources.problem(replace(finding, what=f"{finding.what} [{finding.id}]"))


def _merged(documents: Sequence[Document], values: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[Problem]]:
    """The merged config with absolute paths, and a problem for each path that is missing; raise other errors."""
    last = documents[-1]
    problems: Sequence[Problem] = ()
    notes: list[str] = []
    try:
        merged = merge_configs(documents, values, notes=notes)
        sys.stderr.writelines(f"note: {note}\n" for note in notes)
    except ConfigError as error:
        if not all("does not exist" in problem.what for problem in error.problems):
            raise
        problems = error.problems
        merged = {}
        for document in documents:
            merged = merge(merged, resolve_paths(document.data, document.folder, name=document.name))
    return resolve_paths(merged, last.folder, name=last.name, line=last.nearest_line), problems
