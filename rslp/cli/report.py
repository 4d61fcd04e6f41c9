"""The workflow that writes the report of a run or a study."""

from __future__ import annotations

import sys
from pathlib import Path

from rslp.errors import RunError, UsageError
from rslp.io.terminal import quieten_rslearn
from rslp.launch.runs import open_run, runs_prefix


def report(
    run: str | None = None, study: str | None = None, output: str | None = None, figures: str | None = None
) -> int:
    """Write the report of a run or a study: one HTML file to look at, without any other file or network.

    Args:
        run: the run as PROJECT/EXPERIMENT, or its directory; it may still be training.
        study: the study as PROJECT/NAME, or its directory.
        output: the file; by default report.html in the run's or study's directory.
        figures: a folder in which each figure is also written, as SVG and PNG.
    """
    if (run is None) == (study is None):
        raise UsageError("give one of --run and --study: PROJECT/EXPERIMENT, or a directory")
    quieten_rslearn()
    from rslp.report.write import write_report

    if run is not None:
        with open_run(run) as directory:
            written = write_report(directory, output=output, figures=figures)
    else:
        written = write_report(_study_folder(str(study)), output=output, figures=figures)
    sys.stdout.write(f"{written}\n")
    return 0


def _study_folder(name: str) -> Path:
    """The directory of a study."""
    folder = Path(name) if Path(name).is_dir() else Path(runs_prefix(remote=False)) / "studies" / name
    if not folder.is_dir():
        raise RunError(f"there is no study at {name}, nor at {folder}")
    return folder
