"""Evaluate a run's checkpoint on its splits."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rslp import upstream
from rslp.data.batches import explain_worker_death
from rslp.data.samples import SampleSource
from rslp.errors import RunError
from rslp.evaluate.predictions import write_predictions
from rslp.evaluate.resampling import percentile_intervals, units
from rslp.evaluate.rows import Evaluation, Intervals, rows_of
from rslp.evaluate.samples import write_samples
from rslp.io import write_atomic
from rslp.rundir import RunDir
from rslp.train.build import InstantiatedRun, build
from rslp.train.checkpoints import load_weights, read_with_digest
from rslp.train.metrics import THRESHOLD, Resampler, TaskResult
from rslp.train.metrics.recording import TaskRecords


def evaluate(
    run: RunDir, *, splits: Sequence[str], checkpoint: str | None = None, own_best: bool = False
) -> list[Evaluation]:
    """Evaluate a checkpoint on some splits, and write ``eval/<checkpoint>/<split>.json``, ``.parquet`` and ``.npz``.

    The first has the rows of metrics, the second the predictions, the third some samples to be shown. The best
    checkpoint's rows are copied to ``eval/<split>.json``.

    Args:
        run: the run directory.
        splits: "val", "test" or both.
        checkpoint: name (``best``, ``last``) or path of the checkpoint; the run's best one when None.
        own_best: also evaluate each dataset's own best checkpoint on that dataset, where it is of another step.

    Returns:
        the evaluations of the checkpoint, one for each split; then those of each dataset's own best one.

    Raises:
        RunError: the run has no checkpoint yet, or its config excludes a split.
        CheckpointError: the checkpoint can't be read or does not fit the run's model.
    """
    path = run.find_checkpoint(checkpoint)
    loaded = read_with_digest(run, path)
    cli = build(run, training=False)
    # With Lightning's own handler a SIGTERM would not end the evaluation, and a scheduler would have to kill it.
    upstream.keep_signal_handlers(cli.trainer)
    evaluations = _evaluate(run, cli, path, loaded, splits)
    for dataset in list(cli.datamodule.data_modules) if own_best else ():
        own = run.best(dataset)
        if own.exists() and (content := read_with_digest(run, own))[0]["global_step"] != loaded[0]["global_step"]:
            with cli.datamodule.only(dataset):
                evaluations += _evaluate(run, cli, own, content, splits)
    return evaluations


def _evaluate(
    run: RunDir, cli: InstantiatedRun, path: Path, loaded: tuple[dict[str, Any], str], splits: Sequence[str]
) -> list[Evaluation]:
    """Evaluate a checkpoint (its content and SHA-256) on the datasets of the data module, and write its files."""
    content, digest = loaded
    load_weights(cli.model, content, path=path)
    cli.model.on_load_checkpoint(content)
    cli.model.records_samples = True
    evaluations = []
    for split in splits:
        loop = cli.trainer.validate if split == "val" else cli.trainer.test
        cli.model.results.pop(split, None)
        with explain_worker_death():
            loop(cli.model, datamodule=cli.datamodule, verbose=False)
        if split not in cli.model.results:
            raise RunError(f"nothing of the {split} split was evaluated: trainer.limit_{split}_batches is 0")
        sources, results = cli.datamodule.sources(split), cli.model.results[split]
        intervals = {}
        if cli.trainer.is_global_zero:
            intervals = intervals_of(results, partial(cli.model.resampler, split))
        messages = cli.datamodule.bad_sample_record.messages(split)
        evaluation = Evaluation(
            run=f"{run.project}/{run.experiment}",
            split=split,
            checkpoint=name_in(run, path),
            checkpoint_sha256=digest,
            step=content["global_step"],
            commit=git_commit(),
            data_fingerprint=samples_fingerprint(sources),
            score=cli.model.score(split),
            bad_samples=tuple(message for message in messages if message.partition("/")[0] in sources),
            rows=rows_of(results, intervals),
            data_fingerprints={name: samples_fingerprint({name: source}) for name, source in sources.items()},
        )
        if cli.trainer.is_global_zero:
            records = {key: result.records for key, result in results.items() if result.records is not None}
            folder = _folder_of(run, path, digest)
            write_evaluation(run, evaluation, folder=folder, records=records)
            write_samples(run.evaluation(split, folder).with_suffix(".npz"), cli.model, sources, records)
        evaluations.append(evaluation)
    return evaluations


def _folder_of(run: RunDir, path: Path, digest: str) -> str:
    """The folder of a checkpoint's evaluations: ``best``, ``best-<dataset>`` or ``last``; 12 digits of others' hash."""
    inside = path.resolve().parent == run.checkpoints.resolve() and path.suffix == ".ckpt"
    named = inside and (path.stem in ("best", "last") or path.stem.startswith("best-"))
    return path.stem if named else digest[:12]


def intervals_of(
    results: Mapping[tuple[str, str], TaskResult], resampler: Callable[[tuple[str, str]], Resampler]
) -> dict[tuple[str, str], Intervals]:
    """The intervals of results by (dataset, task).

    Args:
        results: the results, with recorded samples.
        resampler: gives the values of a task's metrics on resamples (``TaskMetrics.resampler``).
    """
    intervals = {}
    for key, result in results.items():
        if result.records is None:
            continue
        records, entries = result.records.records, result.records.states.entries()
        unit_of, unit = units([(r.group, r.window) for r in records], [r.place for r in records])
        values = {name: value for name, value in result.values.items() if name != THRESHOLD}
        ends = percentile_intervals(resampler(key), unit_of, stated=values, seed_of=key[0], entries=entries)
        intervals[key] = Intervals(unit, ends)
    return intervals


def write_evaluation(
    run: RunDir, evaluation: Evaluation, *, folder: str, records: Mapping[tuple[str, str], TaskRecords]
) -> None:
    """Write the rows of metrics and the predictions of a split to ``eval/<folder>/``."""
    text = evaluation.json()
    predictions = run.evaluation(evaluation.split, folder).with_suffix(".parquet")
    if records:
        write_predictions(predictions, records, checkpoint_sha256=evaluation.checkpoint_sha256)
    write_atomic(run.evaluation(evaluation.split, folder), text)
    if folder == run.best().stem:
        write_atomic(run.evaluation(evaluation.split), text)


def name_in(run: RunDir, path: Path) -> str:
    """A path as text, relative to the run directory if it lies inside."""
    return str(path.relative_to(run.path) if path.is_relative_to(run.path) else path)


def samples_fingerprint(sources: Mapping[str, SampleSource]) -> str:
    """Hash the identities of a split's samples; evaluations with equal hashes are comparable."""
    digest = hashlib.sha256()
    for _, source in sorted(sources.items()):
        for identity in sorted(source.identity(i) for i in range(len(source))):
            digest.update(identity.encode() + b"\n")
    return digest.hexdigest()


def git_commit() -> str | None:
    """The git commit of this code; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
