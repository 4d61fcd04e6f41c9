"""Stack samples with gaps for encoders that know bands by position: Galileo and Presto.

The dates of a sample's inputs are aligned on common time steps. What is missing, be it a date, an input, a band or the
value of a pixel (not finite, or at or below -9999), is 0 in the values and false in ``present``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from rslearn.train.model_context import RasterImage, SampleMetadata

from rslp.errors import ConfigError, DataError, Problem
from rslp.helios.encoders import EncoderInput, EncoderSpec, bands_taken, same_band
from rslp.helios.images.dates import Interval, Timeline
from rslp.helios.images.inputs import aligned, common_size, say_once
from rslp.helios.images.units import NODATA_BELOW
from rslp.suggest import did_you_mean
from rslp.upstream.places import place_of

LATLON = "latlon"
_TOLERANCE = timedelta(days=15)


@dataclass(frozen=True)
class SeriesBatch:
    """The samples of a batch on common time steps.

    Attributes:
        months: month of each time step, from 0: int64 ``B T``; 0 for steps that a sample lacks.
        values: for each input that a sample has, float32 ``B C T H W`` in the encoder's order of bands. T is 1 for
            inputs without dates; H and W are 1 for inputs that do not differ between pixels.
        present: which of these values were measured, bool of the same shape.
        latlon: latitude and longitude in degrees, float32 ``B 2``; NaN where unknown.
    """

    months: torch.Tensor
    values: Mapping[str, torch.Tensor]
    present: Mapping[str, torch.Tensor]
    latlon: torch.Tensor

    @property
    def located(self) -> torch.Tensor:
        """Which samples have a known place, bool ``B``."""
        return self.latlon.isfinite().all(dim=1)


def checked_bands(spec: EncoderSpec, bands: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """For each input of an encoder the bands that a dataset gives, in its order: all of the encoder's by default.

    Raises:
        ConfigError: an input or a band that the encoder does not have, or a band twice.
    """
    problems = []
    for name, given in (bands or {}).items():
        known = spec.find(name)
        key = f"{spec.name}.bands.{name}"
        if known is None:
            hint = did_you_mean(name, [one.name for one in spec.inputs], otherwise="its inputs")
            problems.append(Problem(f"the encoder has no such input{hint}", key=key))
            continue
        at = [_position(band, known) for band in given]
        if None in at or not at:
            wrong = next((band for band, position in zip(given, at, strict=True) if position is None), "")
            message = f"the encoder has no band {wrong!r}; its bands: {', '.join(known.bands)}"
            problems.append(
                Problem(message if at else f"no bands; the encoder's are {', '.join(known.bands)}", key=key)
            )
        elif len(set(at)) < len(at):
            problems.append(Problem(f"a band is listed twice: {', '.join(given)}", key=key))
    if problems:
        raise ConfigError(problems)
    return {one.name: bands_taken(spec, one.name, {"bands": dict(bands or {})}) for one in spec.inputs}


def stack_series(
    spec: EncoderSpec,
    samples: Sequence[Mapping[str, Any]],
    metadatas: Sequence[SampleMetadata],
    *,
    bands: Mapping[str, Sequence[str]],
    use_location: bool,
) -> SeriesBatch:
    """Stack the samples of a batch.

    Args:
        spec: the encoder.
        samples: for each sample its inputs; those of the encoder are RasterImages ``C T H W``, raw values.
        metadatas: for each sample where and when it lies; empty if unknown.
        bands: from ``checked_bands``.
        use_location: whether samples without an input ``latlon`` get the place of their window.

    Raises:
        DataError: a sample has no input with dates, or dates, bands or sizes do not fit.
    """
    rows: Sequence[SampleMetadata | None] = metadatas or [None] * len(samples)
    timelines = [_timeline(spec, inputs, metadata) for inputs, metadata in zip(samples, rows, strict=True)]
    steps = max(1, *(len(timeline.steps) for timeline in timelines))
    if spec.max_dates is not None and steps > spec.max_dates:
        raise DataError(f"a sample has {steps} dates; {spec.name} takes {spec.max_dates} at most")
    images = {one.name: [_image(one, inputs, bands[one.name]) for inputs in samples] for one in spec.inputs}
    spatial = [image for one in spec.inputs if one.per_pixel for image in images[one.name] if image is not None]
    # An image of a single pixel holds for all pixels of the others.
    size = common_size({tuple(image.shape[2:]) for image in spatial} - {(1, 1)} or {(1, 1)})
    device = next(image.device for of_input in images.values() for image in of_input if image is not None)
    values, present = {}, {}
    for one in spec.inputs:
        if one.name != LATLON and any(image is not None for image in images[one.name]):
            shape = (len(one.bands), steps if one.dated else 1, *(size if one.per_pixel else (1, 1)))
            positions = [timeline.position.get(one.name, ()) if one.dated else (0,) for timeline in timelines]
            stacked = _stack(images[one.name], positions, shape, device)
            present[one.name] = stacked.isfinite() & (stacked > NODATA_BELOW)
            values[one.name] = torch.where(present[one.name], stacked, 0.0)
    latlon = _latlon(images[LATLON], rows if use_location else [None] * len(samples))
    return SeriesBatch(_months(timelines, steps).to(device), values, present, latlon.to(device))


def _months(timelines: Sequence[Timeline], steps: int) -> torch.Tensor:
    """The month of each step from 0, int64 ``B T``."""
    return torch.tensor([[*(step[1] for step in t.steps), *[0] * (steps - len(t.steps))] for t in timelines])


def _latlon(images: Sequence[torch.Tensor | None], rows: Sequence[SampleMetadata | None]) -> torch.Tensor:
    """Latitude and longitude of each sample ``B 2``: its input's, or else those of its crop; NaN if there are none."""
    unknown = (float("nan"), float("nan"))
    places = [
        image.flatten(1).nanmean(dim=1).tolist() if image is not None else window_place(row) if row else unknown
        for image, row in zip(images, rows, strict=True)
    ]
    return torch.tensor(places, dtype=torch.float32)


def group_present(present: torch.Tensor, bands: Sequence[int]) -> torch.Tensor:
    """Where all bands of a group were measured: ``B C T H W`` becomes ``B T H W``."""
    return present[:, list(bands)].all(dim=1)


def window_place(metadata: SampleMetadata) -> tuple[float, float]:
    """Latitude and longitude of the middle of a sample's crop, in degrees.

    Raises:
        DataError: the crop lies where its projection is not defined.
    """
    longitude, latitude = place_of(metadata.projection, tuple(metadata.crop_bounds))
    if not (math.isfinite(longitude) and math.isfinite(latitude)):
        place = f"{tuple(metadata.crop_bounds)} of window {metadata.window_group}/{metadata.window_name}"
        raise DataError(f"the bounds {place} have no place on the Earth in {metadata.projection.crs}")
    return latitude, longitude


def _position(band: str, known: EncoderInput) -> int | None:
    return next((index for index, name in enumerate(known.bands) if same_band(name, band)), None)


def _image(known: EncoderInput, inputs: Mapping[str, Any], given: Sequence[str]) -> torch.Tensor | None:
    """A sample's input ``C T H W``, float32, with all bands in the encoder's order; NaN in those that it lacks."""
    value = inputs.get(known.name)
    if value is None:
        return None
    image: torch.Tensor = value.image.to(torch.float32)
    if image.shape[0] != len(given):
        raise DataError(
            f"input {known.name!r} has {image.shape[0]} bands, the encoder takes {', '.join(given)}; its argument "
            "`bands` says which of them a dataset has"
        )
    if not known.per_pixel:
        image = image.nanmean(dim=(-1, -2), keepdim=True)
    at = [_position(band, known) for band in given]
    if at == list(range(len(known.bands))):
        return image
    full = image.new_full((len(known.bands), *image.shape[1:]), float("nan"))
    full[at] = image
    return full


def _stack(
    images: Sequence[torch.Tensor | None],
    positions: Sequence[tuple[int, ...]],
    shape: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    """Stack one input of all samples to ``B`` and ``C T H W`` (``shape``), with NaN where there is nothing."""
    stacked = torch.full((len(images), *shape), float("nan"), device=device)
    for target, image, position in zip(stacked, images, positions, strict=True):
        if image is not None and position:
            # Of an input without dates, the first image counts.
            target[:, list(position)] = image[:, : len(position)].expand(-1, -1, *shape[-2:])
    return stacked


def _timeline(spec: EncoderSpec, inputs: Mapping[str, Any], metadata: SampleMetadata | None) -> Timeline:
    """The time steps of one sample."""
    names = [one.name for one in spec.inputs if one.dated]
    images = {name: image for name in names if (image := inputs.get(name)) is not None}
    if not images:
        raise DataError(f"a sample has none of {spec.name}'s inputs {', '.join(names)}; got {', '.join(inputs)}")
    intervals = tuple((name, _intervals(name, image, metadata, spec)) for name, image in images.items())
    return aligned(intervals, _TOLERANCE)


def _intervals(
    name: str, image: RasterImage, metadata: SampleMetadata | None, spec: EncoderSpec
) -> tuple[Interval, ...]:
    dates = image.image.shape[1]
    if image.timestamps is not None and all(interval is not None for interval in image.timestamps):
        if len(image.timestamps) != dates:
            raise DataError(f"input {name!r} has {dates} dates but {len(image.timestamps)} timestamps")
        return tuple(image.timestamps)
    if dates == 1 and metadata is not None and metadata.time_range is not None:
        say_once(f"input {name!r} has no timestamp; the middle of the window's time range is used")
        return (metadata.time_range,)
    raise DataError(f"the input {name!r} has no timestamps, but {spec.name} needs the month of each image")
