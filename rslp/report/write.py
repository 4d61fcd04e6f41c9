"""Write the report of a run or a study."""

from __future__ import annotations

import sys
from pathlib import Path

from rslp.errors import UsageError
from rslp.io import full_disk, is_remote, write_atomic
from rslp.report.run import run_page
from rslp.report.study import study_page
from rslp.rundir import RUN_FILES, RunDir

_NAME = RUN_FILES.report.name
# Larger files are not mailed.
_MAX_BYTES = 10_000_000


def write_report(subject: RunDir | Path, *, output: str | Path | None = None, figures: str | Path | None = None) -> str:
    """Write the report of a run or a study, by default ``report.html`` in its directory; returns where it is.

    Args:
        subject: the run, maybe a readable copy of one on an object store; or the directory of a study.
        output: the file.
        figures: a folder in which each figure is written as SVG and PNG.

    Raises:
        RunError: there is no such run or study, or the study's files are damaged.
        UsageError: a file can't be written.
    """
    page = run_page(subject) if isinstance(subject, RunDir) else study_page(subject)
    text = page.html().encode()
    if len(text) > _MAX_BYTES:
        sys.stderr.write(f"note: the report is larger than {_MAX_BYTES // 1_000_000} MB\n")
    place = Path(output or (subject.path if isinstance(subject, RunDir) else subject) / _NAME)
    written = str(place)
    try:
        if isinstance(subject, RunDir) and output is None and is_remote(subject.location):
            subject.files().write(_NAME, text)
            written = f"{subject.location}/{_NAME}"
        else:
            write_atomic(place, text)
        if figures is not None:
            place = Path(figures)
            place.mkdir(parents=True, exist_ok=True)
            for picture in page.pictures():
                picture.save(place)
    except OSError as error:
        raise full_disk(error, place) or UsageError(f"{place} can't be written: {error.strerror}") from error
    return written
