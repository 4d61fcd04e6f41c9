"""Write the report of a run or a study."""

from __future__ import annotations

import sys
from pathlib import Path

from rslp.errors import RunError, UsageError
from rslp.io import full_disk, is_remote, write_atomic
from rslp.report.page import MAX_BYTES, Page, save_figures
from rslp.report.run import run_page
from rslp.report.study import study_page
from rslp.rundir import RUN_FILES, RunDir


def write_run_report(run: RunDir, *, output: str | Path | None = None, figures: str | Path | None = None) -> str:
    """Write the report of a run, by default to ``report.html`` of its directory; returns where it is.

    Args:
        run: the run directory, or a readable copy of the small files of one on an object store.
        output: the file.
        figures: a folder in which each figure is written as SVG and PNG.

    Raises:
        RunError: there is no run.
        UsageError: the file can't be written.
    """
    if not run.config.is_file():
        raise RunError(f"there is no run at {run.location}")
    page = run_page(run)
    name = RUN_FILES.report.name
    if output is None and is_remote(run.location):
        run.files().write(name, _html(page).encode())
        written = f"{run.location}/{name}"
    else:
        written = _write(page, Path(output or run.report))
    if figures is not None:
        save_figures(page, Path(figures))
    return written


def write_study_report(folder: Path, *, output: str | Path | None = None, figures: str | Path | None = None) -> str:
    """Write the report of a study, by default to ``report.html`` of its directory; returns where it is.

    Args:
        folder: the study's directory.
        output: the file.
        figures: a folder in which each figure is written as SVG and PNG.

    Raises:
        RunError: there is no study, or its files are damaged.
        UsageError: the file can't be written.
    """
    page = study_page(folder)
    written = _write(page, Path(output or folder / RUN_FILES.report.name))
    if figures is not None:
        save_figures(page, Path(figures))
    return written


def _html(page: Page) -> str:
    text = page.html()
    if len(text.encode()) > MAX_BYTES:
        sys.stderr.write(f"note: the report is larger than {MAX_BYTES // 1_000_000} MB\n")
    return text


def _write(page: Page, path: Path) -> str:
    text = _html(page)
    try:
        write_atomic(path, text)
    except OSError as error:
        message = f"{path} can't be written: {error.strerror}; --output names another file"
        raise full_disk(error, path) or UsageError(message) from error
    return str(path)
