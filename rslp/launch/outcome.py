"""How a submission ended, as the run directory tells it: what counts is what the run left, not an exit code."""

from __future__ import annotations

from datetime import datetime

from rslp.launch.job import Mode
from rslp.launch.record import Record
from rslp.run import RunDir

# A file's time and the record's come from different clocks, and the record's has no fractions.
_SLACK = 5.0
_SPLITS: dict[str, tuple[str, ...]] = {"validate": ("val",), "test": ("val", "test")}


def succeeded(run: RunDir, record: Record) -> bool:
    """Whether a submission has done what it was to do: trained to the marker of success, or written its evaluation."""
    since = datetime.fromisoformat(record.submitted).timestamp() - _SLACK
    return _finished(run, record.mode, since=since)


def _finished(run: RunDir, mode: Mode, *, since: float = 0) -> bool:
    if mode == "fit":
        return run.done() is not None
    if mode == "predict":
        return run.prediction_marker.exists() and run.prediction_marker.stat().st_mtime >= since
    # Of whichever checkpoint; a run of an earlier version has them in `eval/` alone.
    written = [[run.evaluation(split), *run.evaluations(split)] for split in _SPLITS.get(mode, ())]
    return bool(written) and all(any(p.exists() and p.stat().st_mtime >= since for p in paths) for paths in written)


def checked_code(run: RunDir, mode: Mode, code: int) -> tuple[int, str]:
    """The exit code of a job, and what is wrong when it says 0 without having done its work.

    Args:
        run: the run directory.
        mode: what the job was to do.
        code: what its processes ended with.
    """
    if code == 0 and not _finished(run, mode):
        left = {"fit": run.done_marker, "predict": run.prediction_marker}.get(mode, run.path / "eval")
        return 1, f"the job ended with exit code 0, but {left} is not there: it has not succeeded"
    return code, ""


def steps_done(run: RunDir, mode: Mode = "fit") -> int | None:
    """How far the run is: the optimiser steps of its state, or windows that are predicted; None before the first."""
    if mode == "predict":
        progress = run.prediction_progress
        return progress.read_bytes().count(b"\n") if progress.exists() else None
    step: int | None = run.read_state().get("step")
    return step
