"""The workflows that show results: the comparison of runs, and the report of a run or a study."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rslp.errors import RunError, UsageError
from rslp.io import full_disk, write_atomic
from rslp.io.terminal import quieten_rslearn
from rslp.launch.runs import open_run, runs_prefix
from rslp.rundir import RunDir


def compare(
    run: list[str],
    split: str = "test",
    checkpoint: str = "best",
    difference: float = 0.01,
    output: str | None = None,
) -> int:
    """Compare evaluated runs: values, differences with intervals, mean relative gain.

    Args:
        run: a run as PROJECT/EXPERIMENT, or its directory; to be given once for each run. The first is the reference.
        split: the evaluated split, val or test.
        checkpoint: the evaluated checkpoint: best, last, best-DATASET, or a folder of eval/.
        difference: a difference, in units of the metrics, of which it is said how many seeds would show it.
        output: a file for the comparison as JSON.
    """
    if len(run) < 2:
        raise UsageError("--run is to be given at least twice: there is nothing to compare a single run with")
    if not difference > 0:
        raise UsageError(f"--difference must be above 0; got {difference}")
    with ExitStack() as stack:
        runs = [stack.enter_context(open_run(name)) for name in run]
        files = [_evaluation(one, split, checkpoint) for one in runs]
        from rslp.study.comparison import ArmResult, Cost, comparison_table
        from rslp.study.comparison import compare as compare_arms

        results = [
            ArmResult(arm, 0, (file,), Cost.of(one.done() or {}))
            for arm, file, one in zip(_arms(runs), files, runs, strict=True)
        ]
        comparison = compare_arms(results, reference=results[0].arm, difference=difference)
    sys.stdout.write(comparison_table(comparison))
    if output is not None:
        try:
            write_atomic(output, json.dumps(comparison, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise full_disk(error, Path(output)) or UsageError(
                f"--output {output} can't be written: {error.strerror}"
            ) from error
    return 0


def _arms(runs: Sequence[RunDir]) -> list[str]:
    """A name for each run: its experiment, with its project where several have the same.

    Raises:
        UsageError: a run is given twice.
    """
    short, long = [run.experiment for run in runs], [f"{run.project}/{run.experiment}" for run in runs]
    names = short if len(set(short)) == len(short) else long
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--run names {twice} twice")
    return names


def _evaluation(run: RunDir, split: str, checkpoint: str) -> Path:
    """The rows of metrics of a run.

    Raises:
        RunError: the run does not exist, is not finished, or was not evaluated with predictions.
    """
    if not run.config.is_file():
        raise RunError(f"there is no run at {run.location}")
    if run.done() is None:
        raise RunError(f"{run.location} is not finished: launch it again, it goes on from its last checkpoint")
    file = run.evaluation(split, checkpoint)
    if not file.is_file():
        others = ", ".join(f"{path.parent.name}/{path.stem}" for path in sorted(run.path.glob("eval/*/*.json")))
        raise RunError(
            f"{run.location} has no evaluation {checkpoint}/{split} ({others or 'it has none'}): "
            "launch it with --do_eval true"
        )
    if not file.with_suffix(".parquet").is_file():
        raise RunError(f"{run.location} was evaluated without predictions: launch it with --do_eval true again")
    return file


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
