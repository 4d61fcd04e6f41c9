"""The check of run configs in files: each finding is a problem with file, line and key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rslp.check.findings import CheckOptions, Finding
from rslp.check.source_map import SourceMap
from rslp.config import merge, merge_configs, refuse_unrunnable
from rslp.errors import ConfigError, Problem
from rslp.io import Document, resolve_paths
from rslp.runtime import class_paths

if TYPE_CHECKING:
    from rslp.check.dataset import DatasetReport


@dataclass(frozen=True)
class FileCheck:
    """Result of a check of run configs and their data.

    Attributes:
        errors: what has to be mended, or allowed by its id, which is in brackets behind each text.
        warnings: what may be a mistake.
        allowed: errors whose ids are allowed.
        notes: arguments that were dropped when the configs were merged.
        datasets: a report for each dataset; none if the data was not checked.
    """

    errors: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    allowed: tuple[Problem, ...]
    notes: tuple[str, ...]
    datasets: tuple[DatasetReport, ...]


def check_files(
    documents: Sequence[Document],
    *,
    constants: Mapping[str, Any],
    options: CheckOptions,
    trust: Sequence[str] = (),
    console: Console,
) -> FileCheck:
    """Check run configs that are merged, and their data.

    Args:
        documents: the run configs; later ones win.
        constants: values of the placeholders.
        options: how much is checked, and which findings are allowed.
        trust: packages, beside the installed ones, whose classes the configs may name: their code is run.
        console: where the progress bar is drawn.

    Raises:
        ConfigError: the configs can't be merged, are no run config, or name a class that is not trusted.
    """
    notes: list[str] = []
    config, missing_paths = _merged(documents, constants, notes)
    refuse_unrunnable(config, name=documents[-1].name)
    class_paths.trust(trust)
    sources = SourceMap(documents)
    try:
        class_paths.refuse_untrusted(config, documents)
    except ConfigError as error:
        raise ConfigError(map(sources.traced, error.problems)) from None
    # After the mistakes above, which need not wait for the training stack.
    from rslp.check.check import check

    result = check(config, effort=options, console=console)
    missing = [sources.traced(problem) for problem in missing_paths]
    known = {(problem.file, problem.line, problem.key) for problem in missing}
    errors = [_problem(sources, finding) for finding in result.findings if finding.error]
    # What reads a missing path has reported it again.
    errors = [*missing, *(error for error in errors if (error.file, error.line, error.key) not in known)]
    others = [(finding.allowed, _problem(sources, finding)) for finding in result.findings if not finding.error]
    return FileCheck(
        errors=tuple(dict.fromkeys(errors)),
        warnings=tuple(problem for allowed, problem in others if not allowed),
        allowed=tuple(problem for allowed, problem in others if allowed),
        notes=tuple(notes),
        datasets=result.reports,
    )


def _problem(sources: SourceMap, finding: Finding) -> Problem:
    """The finding with file and line, and its id behind its text."""
    return sources.problem(replace(finding, what=f"{finding.what} [{finding.id}]"))


def _merged(
    documents: Sequence[Document], constants: Mapping[str, Any], notes: list[str]
) -> tuple[dict[str, Any], Sequence[Problem]]:
    """The merged config with absolute paths, and a problem for each path that is missing; raise other errors."""
    last = documents[-1]
    problems: Sequence[Problem] = ()
    try:
        merged = merge_configs(documents, constants, notes=notes)
    except ConfigError as error:
        if not all("does not exist" in problem.what for problem in error.problems):
            raise
        problems = error.problems
        merged = {}
        for document in documents:
            merged = merge(merged, resolve_paths(document.data, document.folder, name=document.name))
    return resolve_paths(merged, last.folder, name=last.name, line=last.nearest_line), problems
