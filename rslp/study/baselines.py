"""Arms without encoder: the best constant, and a random forest on the values of the pixels, on the same splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rslearn.train.model_context import RasterImage, SampleMetadata
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.task import Task

from rslp.data.crops import crop_place
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.data.samples import SampleSource
from rslp.errors import DataError, UsageError
from rslp.evaluate.evaluation import git_commit, intervals_of, samples_fingerprint, write_evaluation
from rslp.evaluate.rows import Evaluation, rows_of
from rslp.io import read_yaml, resolve_paths
from rslp.rundir import RunDir
from rslp.train.baselines import baseline_output, fit_baselines
from rslp.train.build import build_data
from rslp.train.metrics import Resampler, TaskMetrics, TaskResult
from rslp.upstream.task_kinds import kind_of, tasks_by_name

Kind = Literal["constant", "random_forest"]
Values = npt.NDArray[np.float32]
# Gives the output for a sample: its inputs, and the target of the task, which gives the shape.
Predictor = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
# Statistics over time, where samples differ in their number of dates.
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_TREES, _MAX_SAMPLES, _MAX_PIXELS = 200, 10_000, 50_000


def run_baseline(run: RunDir, kind: Kind) -> list[Evaluation]:
    """Fit a baseline to the training split of each dataset, and write its evaluations to ``eval/<kind>/<split>.json``.

    Args:
        run: the run directory, whose config names the datasets and has the seed.
        kind: ``constant``; or ``random_forest``, which leaves out tasks that are neither classes nor numbers.

    Raises:
        UsageError: scikit-learn is not installed.
        DataError: a dataset or a sample can't be read.
    """
    document = read_yaml(run.config)
    config = resolve_paths(document.data, run.path, name=document.name, line=document.line)
    data = build_data(config, document)
    skip = data.bad_sample_record.policy.skips_bad_samples
    constants = fit_baselines(data.sources("train"), skip=skip)
    predictors: dict[tuple[str, str], Predictor] = {}
    for dataset, source in data.sources("train").items():
        for name, task in tasks_by_name(source.task, dataset).items():
            predictor = _constant(task, constants.get(dataset, {}).get(name))
            if kind == "random_forest":
                predictor = _forest(source, name, task, seed=config.get("seed") or 0, skip=skip)
            if predictor is not None:
                predictors[dataset, name] = predictor
    return [_evaluate(run, data, split, kind, predictors, constants) for split in ("val", "test")]


def _evaluate(
    run: RunDir,
    data: MultiDatasetDataModule,
    split: str,
    kind: Kind,
    predictors: Mapping[tuple[str, str], Predictor],
    constants: Mapping[str, Mapping[str, float]],
) -> Evaluation:
    """Evaluate a baseline on a split, and write rows and predictions."""
    results: dict[tuple[str, str], TaskResult] = {}
    resamplers: dict[tuple[str, str], Resampler] = {}
    bad_samples: list[str] = []
    for dataset, source in data.sources(split).items():
        tasks = {
            name: task for name, task in tasks_by_name(source.task, dataset).items() if (dataset, name) in predictors
        }
        metrics = {name: TaskMetrics(task, record=True) for name, task in tasks.items()}
        for inputs, targets, metadata in _samples(source, data, bad_samples) if tasks else ():
            place = crop_place(metadata, overlap=source.overlap)
            for name, task in tasks.items():
                target = targets[name] if isinstance(source.task, MultiTask) else targets
                floor = _constant(task, constants.get(dataset, {}).get(name))
                metrics[name].update(
                    [predictors[dataset, name](inputs, target)],
                    targets=[target],
                    constants=None if floor is None else [floor(inputs, target)],
                    places=[place],
                )
        for name, metric in metrics.items():
            results[dataset, name] = metric.result()
            resamplers[dataset, name] = metric.resampler(results[dataset, name])
    scores = [result.score for result in results.values() if result.score is not None]
    sources = data.sources(split)
    evaluation = Evaluation(
        run=f"{run.project}/{run.experiment}",
        split=split,
        checkpoint=kind,
        checkpoint_sha256="",
        step=0,
        commit=git_commit(),
        data_fingerprint=samples_fingerprint(sources),
        score=sum(scores) / len(scores) if scores else None,
        bad_samples=tuple(bad_samples),
        rows=rows_of(results, intervals_of(results, resamplers.__getitem__)),
        data_fingerprints={name: samples_fingerprint({name: source}) for name, source in sources.items()},
    )
    records = {key: result.records for key, result in results.items() if result.records is not None}
    write_evaluation(run, evaluation, folder=kind, records=records)
    return evaluation


def _samples(source: SampleSource, data: MultiDatasetDataModule, bad_samples: list[str]) -> Any:
    """The good samples of a split; the messages of bad ones are appended to a list, where the config skips them."""
    for index in range(len(source)):
        try:
            sample: tuple[dict[str, Any], dict[str, Any], SampleMetadata] = source.sample(index)
        except DataError as error:
            if not data.bad_sample_record.policy.skips_bad_samples:
                raise
            bad_samples.append(str(error))
            continue
        yield sample


def _constant(task: Task, constant: float | None) -> Predictor | None:
    if constant is None:
        return None
    return lambda _, target: baseline_output(task, constant, target)


def _forest(source: SampleSource, name: str, task: Task, *, seed: int, skip: bool) -> Predictor | None:
    """A random forest of a task; None for a task of objects, or of an unknown kind, or without a valid label."""
    try:
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    except ImportError as error:
        raise UsageError("a random forest needs scikit-learn: pip install 'rslp[study]'") from error
    kind = kind_of(task)
    if kind.unit not in ("window", "pixel"):
        return None
    samples, rng = [], np.random.default_rng(seed)
    indices = range(0, len(source), -(-len(source) // _MAX_SAMPLES))
    for index in indices:
        try:
            inputs, targets, _ = source.sample(index)
        except DataError:
            if not skip:
                raise
            continue
        target = targets[name] if isinstance(source.task, MultiTask) else targets
        labels = kind.labels(target).numpy()
        chosen = _chosen(kind.valid(target).numpy().ravel(), _MAX_PIXELS // len(indices) + 1, rng)
        if len(chosen):
            samples.append((_images(inputs), labels.shape, labels.ravel()[chosen], chosen))
    if not samples:
        return None
    layout = _layout([images for images, *_ in samples])
    features = np.concatenate([_features(images, layout, shape)[chosen] for images, shape, _, chosen in samples])
    forest = (RandomForestRegressor if kind.numeric else RandomForestClassifier)(_TREES, random_state=seed, n_jobs=-1)
    forest.fit(features, np.concatenate([labels for _, _, labels, _ in samples]))
    count = None if kind.class_names is None else len(kind.class_names(task))

    def predict(inputs: Mapping[str, Any], target: Mapping[str, Any]) -> torch.Tensor:
        shape = tuple(kind.labels(target).shape)
        values = _features(_images(inputs), layout, shape)
        if count is None:
            return torch.as_tensor(forest.predict(values), dtype=torch.float64).reshape(shape)
        scores = torch.zeros(count, len(values), dtype=torch.float64)
        scores[torch.as_tensor(forest.classes_, dtype=torch.long)] = torch.as_tensor(forest.predict_proba(values).T)
        return scores.reshape(count, *shape)

    return predict


def _chosen(valid: npt.NDArray[np.bool_], most: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """The places of at most so many valid labels, drawn at random."""
    places = np.flatnonzero(valid)
    return places if len(places) <= most else np.sort(rng.choice(places, most, replace=False))


def _images(inputs: Mapping[str, Any]) -> dict[str, Values]:
    """The images of a sample by input, ``C T H W``."""
    images = {name: value.image if isinstance(value, RasterImage) else value for name, value in sorted(inputs.items())}
    return {name: value.numpy() for name, value in images.items() if torch.is_tensor(value) and value.dim() == 4}


def _layout(samples: Sequence[Mapping[str, Values]]) -> dict[str, tuple[int, int | None]]:
    """For each input its number of channels, and the number of dates of all samples; None if they differ."""
    shapes: dict[str, set[tuple[int, int]]] = {}
    for images in samples:
        for name, image in images.items():
            shapes.setdefault(name, set()).add((image.shape[0], image.shape[1]))
    return {
        name: (min(of_input)[0], min(of_input)[1] if len(of_input) == 1 else None) for name, of_input in shapes.items()
    }


def _features(
    images: Mapping[str, Values], layout: Mapping[str, tuple[int, int | None]], shape: tuple[int, ...]
) -> Values:
    """The values that a forest takes: for labels of pixels a row for each of them, otherwise a single row.

    A pixel has the values of all dates where all samples have the same number of them, otherwise quantiles over time. A
    window has those of its middle pixel, and of the mean of all pixels. An input that a sample lacks is NaN.

    Args:
        images: the images ``C T H W`` by input.
        layout: see ``_layout``.
        shape: the shape of the sample's labels, ``H W`` or nothing.
    """
    columns: list[Values] = []
    for name, (channels, dates) in layout.items():
        image = images.get(name)
        if image is None:
            values = np.full((channels * (dates or len(_QUANTILES)), 1, 1), np.nan, np.float32)
        elif dates == image.shape[1]:
            values = image.reshape(-1, *image.shape[2:])
        else:
            values = np.quantile(image, _QUANTILES, axis=1).reshape(-1, *image.shape[2:])
        height, width = values.shape[1:]
        if shape:
            # Pixel centres of the labels, in pixels of the image.
            rows, cols = ((np.arange(n) + 0.5) * size // n for n, size in zip(shape, (height, width), strict=True))
            columns.append(values[:, rows.astype(int)][:, :, cols.astype(int)].reshape(len(values), -1).T)
        else:
            columns.append(np.concatenate([values[:, height // 2, width // 2], values.mean(axis=(1, 2))])[None])
    return np.concatenate(columns, axis=1).astype(np.float32)
