"""A few samples of an evaluation as pictures can show them: image, label and prediction, in ``<split>.npz``."""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from rslearn.train.model_context import RasterImage

from rslp.data.bad_samples import READ_ERRORS
from rslp.data.batches import Batch, collate
from rslp.data.samples import SampleSource
from rslp.errors import DataError, RunError
from rslp.io import write_atomic
from rslp.runtime.seeds import stable_seed
from rslp.train.metrics.recording import SampleRecord, TaskRecords
from rslp.train.module import JointModule
from rslp.upstream.task_kinds import kind_of

Array = npt.NDArray[Any]
Key = tuple[str, str]
# The longest side of a picture (px); of an image of fewer px than _SERIES, the series over time is shown.
_SIDE, _SERIES = 128, 4
_MOST_BANDS = 3
# Bands for red, green and blue, by the names of the sensors that rslearn and the encoders know.
_RGB = (("B04", "B03", "B02"), ("B4", "B3", "B2"), ("red", "green", "blue"), ("R", "G", "B"), ("vv", "vh"))
# What a sample was chosen for, and how many samples.
_CHOICE = {"worst": 2, "median": 1, "random": 2}


@dataclass(frozen=True)
class ShownSample:
    """A sample of an evaluation with what a picture of it needs.

    Attributes:
        dataset: the dataset's key.
        task: the task's name.
        reason: ``worst``, ``median`` or ``random``.
        error: by how much its prediction is wrong, see ``sample_error``.
        group: group of its window.
        window: name of its window.
        bounds: the bounds of the crop in px of the window's projection.
        bands: names of the shown bands.
        scale: px of the crop for a px of the picture.
        arrays: ``image`` ``H W 3`` or ``H W`` uint8, or ``series`` ``T C``; for labels of pixels ``truth`` and
            ``prediction`` ``H W``: classes (-1 without a valid label) or numbers (NaN).
    """

    dataset: str
    task: str
    reason: str
    error: float
    group: str
    window: str
    bounds: tuple[int, int, int, int]
    bands: Sequence[str] = ()
    scale: int = 1
    arrays: Mapping[str, Array] = field(default_factory=dict)


def sample_error(columns: Mapping[str, Any], *, threshold: float = 0.5) -> float | None:
    """By how much the prediction of one sample is wrong; None for a kind of task without recorded predictions.

    That is 1 - the score of the label's class; the absolute error; the share of wrong pixels; the mean absolute error
    of the pixels; or the number of objects that were missed and of false detections.

    Args:
        columns: the columns of its record, for a detector with ``state_hits``.
        threshold: the least score of a detection that counts.
    """
    if columns.get("probabilities") is not None:
        return 1 - float(columns["probabilities"][columns["label"]])
    if columns.get("value") is not None:
        return abs(float(columns["value"] - columns["target"]))
    if columns.get("confusion_pixels") is not None:
        pairs = zip(columns["confusion_label"], columns["confusion_predicted"], strict=True)
        pixels = np.array(columns["confusion_pixels"])
        wrong = np.array([label != predicted for label, predicted in pairs], dtype=bool)
        return float(pixels[wrong].sum() / max(pixels.sum(), 1))
    if columns.get("pixels"):
        return float(columns["absolute_error"] / columns["pixels"])
    if columns.get("scores") is not None:
        kept = np.array(columns["scores"], dtype=np.float64) >= threshold
        found = int(np.array(columns["state_hits"], dtype=np.float64)[: len(kept)][kept].sum())
        return float(len(columns["true_labels"]) - found + int(kept.sum()) - found)
    return None


def choose(errors: Sequence[float | None], identities: Sequence[str]) -> list[tuple[int, str]]:
    """Index and reason of the samples that are shown: the worst ones, the median, and some at random by their identity.

    Args:
        errors: of each sample.
        identities: of each sample, which order equal errors and seed the draw.
    """
    known = [i for i, error in enumerate(errors) if error is not None and math.isfinite(error)]
    ranked = sorted(known, key=lambda i: (-(errors[i] or 0.0), identities[i]))
    drawn = sorted(known, key=lambda i: stable_seed("shown", identities[i]))
    ordered = {"worst": ranked, "median": ranked[len(ranked) // 2 :], "random": drawn}
    chosen: dict[int, str] = {}
    for reason, order in ordered.items():
        for index in [i for i in order if i not in chosen][: _CHOICE[reason]]:
            chosen[index] = reason
    return list(chosen.items())


def write_samples(
    path: Path, model: JointModule, sources: Mapping[str, SampleSource], records: Mapping[Key, TaskRecords]
) -> None:
    """Choose samples of each task, read them again, predict those with labels of pixels, and write them to a file.

    A sample that can't be read any more is left out.
    """
    shown: list[ShownSample] = []
    places = {name: _places(source) for name, source in sources.items()}
    for (dataset, task), of_task in sorted(records.items()):
        threshold = model.thresholds.get(dataset, {}).get(task, 0.5)
        hits = of_task.columns().get("hits")
        columns = [
            {**r.columns, **({"state_hits": hits[i]} if hits is not None else {})}
            for i, r in enumerate(of_task.records)
        ]
        errors = [sample_error(one, threshold=threshold) for one in columns]
        names = [f"{r.group}/{r.window}/{r.bounds}" for r in of_task.records]
        for index, reason in choose(errors, names):
            record = of_task.records[index]
            sample = _show(model, sources[dataset], places[dataset], (dataset, task), record)
            if sample is not None:
                shown.append(
                    ShownSample(
                        dataset, task, reason, errors[index] or 0.0, record.group, record.window, record.bounds, *sample
                    )
                )
    index_of = [{name: value for name, value in vars(one).items() if name != "arrays"} for one in shown]
    arrays: dict[str, Any] = {f"{i}_{name}": array for i, one in enumerate(shown) for name, array in one.arrays.items()}
    stream = io.BytesIO()
    np.savez_compressed(stream, index=np.array(json.dumps(index_of)), **arrays)
    write_atomic(path, stream.getvalue())


def read_samples(path: Path) -> list[ShownSample]:
    """The samples of a file.

    Raises:
        RunError: the file is damaged.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as content:
            arrays: dict[int, dict[str, Array]] = {}
            for name in content.files:
                number, _, part = name.partition("_")
                if part:
                    arrays.setdefault(int(number), {})[part] = content[name]
            entries = json.loads(str(content["index"]))
        # A sample without a raster among its inputs has no array.
        return [
            ShownSample(**{**entry, "bounds": tuple(entry["bounds"])}, arrays=arrays.get(number, {}))
            for number, entry in enumerate(entries)
        ]
    except (*READ_ERRORS, BadZipFile, zlib.error) as error:
        raise RunError(f"{path} is no file of samples, or a damaged one: {error}") from error


def _places(source: SampleSource) -> dict[str, int]:
    """The index of each sample by its window, and by its window and bounds."""
    found: dict[str, int] = {}
    for index in range(len(source)):
        found.setdefault("/".join(source.window(index)), index)
        found[source.identity(index).removeprefix(f"{source.name}/")] = index
    return found


def _show(
    model: JointModule, source: SampleSource, places: Mapping[str, int], key: Key, record: SampleRecord
) -> tuple[tuple[str, ...], int, dict[str, Array]] | None:
    """Bands, scale and arrays of a sample; None if it can't be read."""
    window = f"{record.group}/{record.window}"
    index = places.get(f"{window}/{'_'.join(map(str, record.bounds))}", places.get(window))
    if index is None:
        return None
    try:
        sample = source.sample(index)
    except DataError:
        return None
    bands, arrays = _image(sample[0], source.bands())
    if kind_of(model.task_of(key)).dense:
        arrays |= _rasters(model, collate([(sample, ())], dataset=source.name), key)
    side = max((max(array.shape[:2]) for name, array in arrays.items() if name != "series"), default=1)
    scale = -(-side // _SIDE)
    return bands, scale, {n: a if n == "series" else a[::scale, ::scale] for n, a in arrays.items()}


def _image(
    inputs: Mapping[str, Any], bands_of: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], dict[str, Array]]:
    """Names of the bands, and a picture or a series, of the input that shows most: one with red, green and blue."""
    images = {name: value for name, value in inputs.items() if isinstance(value, RasterImage)}
    if not images:
        return (), {}
    named = {n: _names(bands_of.get(n, ()), image.image.shape[0]) for n, image in images.items()}
    name, chosen = next(
        ((n, trio) for trio in _RGB for n in images if set(trio) <= set(named[n])),
        (next(iter(images)), named[next(iter(images))][:1]),
    )
    values = images[name].image.detach().cpu().float().numpy()[[named[name].index(band) for band in chosen]]
    if values.shape[2] * values.shape[3] < _SERIES and values.shape[1] > 1:
        return chosen[:_MOST_BANDS], {"series": values[:, :, 0, 0].T}
    middle = values[:, values.shape[1] // 2]
    if len(chosen) == 2:
        chosen, middle = chosen[:1], middle[:1]
    # One stretch for all bands: with one each, a grey field would be as colourful as a bright one.
    low, high = np.percentile(middle, (2, 98))
    stretched = (255 * np.clip((middle - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)
    return chosen, {"image": stretched[0] if len(stretched) == 1 else stretched.transpose(1, 2, 0)}


def _names(bands: Sequence[str], channels: int) -> tuple[str, ...]:
    """Names of an image's channels; a transform may have made others than the bands that were read."""
    return tuple(bands) if len(bands) == channels else tuple(f"channel {i}" for i in range(channels))


def _rasters(model: JointModule, batch: Batch, key: Key) -> dict[str, Array]:
    """Label and prediction of a sample with labels of pixels, ``H W`` each."""
    task = model.task_of(key)
    kind = kind_of(task)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), model.trainer.precision_plugin.forward_context():
        output = model.outputs(batch.to(model.device))[0][key[1]].detach().cpu()
    model.train(was_training)
    target = batch.targets[0][key[1]]
    labels, valid = kind.labels(target).cpu(), kind.valid(target).cpu()
    if kind.numeric:
        scale = float(getattr(task, "scale_factor", 1) or 1)
        truth = torch.where(valid, labels.double() / scale, torch.nan)
        return {"truth": truth.float().numpy(), "prediction": (output.reshape(labels.shape) / scale).float().numpy()}
    classes = output.argmax(dim=0)
    truth = torch.where(valid & (labels >= 0), labels.long(), -1)
    return {"truth": truth.to(torch.int16).numpy(), "prediction": classes.to(torch.int16).numpy()}
